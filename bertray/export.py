"""Export: a bundle to a folder that another library loads: transformers, ONNX Runtime or sentence-transformers.

Knows nothing of Ray, or of how a format is written. What was made is held against plain transformers on a few texts,
one at a time, before anything comes into the folder. It computes in float32, and cuts longer texts, whatever precision
and truncation the bundle was fitted with.

export.json   of every export: its format, labels, inputs and files; the mark by which a later export replaces it
README.md     what it is, how to use it, how exact it is
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertray.bundle import Bundle
from bertray.cards import card
from bertray.errors import BertrayError, BundleError
from bertray.parts import Parts, features_of
from bertray.predict import checkpoint_of
from bertray.storage import Location
from bertray.writers import WRITERS, Written

FORMATS = tuple(WRITERS)
_MARK = "export.json"


def export(bundle: Bundle, format: str, output: str) -> dict[str, Any]:
    """Write a bundle and its encoder for another library.

    Args:
        format: one of FORMATS.
        output: a local folder: new, empty, or holding an earlier export, whose files are replaced.

    Returns:
        output, format, classes (what loads it), wrapper (whether that is code in the folder, for which transformers
        wants trust_remote_code=True), difference (the largest to plain transformers, on a few texts) and files.

    Raises:
        BundleError: the bundle is none that the format can hold.
        CheckpointError: its encoder cannot be had, or lacks what the bundle uses.
        BertrayError: the folder is not free, or a package is missing.
    """
    if format not in FORMATS:
        raise BertrayError(f"--format must be one of {', '.join(FORMATS)}. Got {format!r} instead.")
    folder = _free(output)
    earlier = _files(folder)
    features = features_of(bundle)
    if bundle.siamese and format != "sentence-transformers":
        raise BundleError(
            f"A siamese bundle encodes two texts apart, which --format {format} cannot. Export its encoder with "
            "--format sentence-transformers, or fit on pairs in one sequence."
        )
    with _quiet():
        parts = Parts(bundle, features, checkpoint_of(bundle.encoder))
        parts.check()
        written, files = _replace(parts, format, folder, earlier)
    return {"output": str(folder), "format": format, **written.summary, "files": files}


def _free(output: str) -> Path:
    """The folder to write to.

    Raises:
        BertrayError: it is on a store, or holds other things.
    """
    if "://" in output:
        raise BertrayError(f"{output} is a URL: --output must be a local folder. Copy it there afterwards.")
    folder = Path(Location(output).path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise BertrayError(f"{folder} is there and is no earlier export. Give a new or empty folder as --output.")
    return folder


def _files(folder: Path) -> list[str]:
    """What an earlier export wrote there.

    Raises:
        BertrayError: its mark is damaged.
    """
    mark = folder / _MARK
    if not mark.exists():
        return []
    try:
        files = [Path(name) for name in json.loads(mark.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError):
        raise BertrayError(f"{mark} is damaged. Delete {folder}, or give another --output.") from None
    return [str(file) for file in files if ".." not in file.parts and not file.is_absolute()]


def _replace(parts: Parts, format: str, folder: Path, earlier: Sequence[str]) -> tuple[Written, list[str]]:
    """Write beside the folder, and move what is whole into it; also the names of all files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
        written = WRITERS[format](parts, Path(made))
        _finish(parts, format, Path(made), written)
        return written, _move(Path(made), folder, earlier)


def _finish(parts: Parts, format: str, folder: Path, written: Written) -> None:
    """The card, and the mark with the names of all files."""
    bundle = parts.bundle
    (folder / "README.md").write_text(card(parts, format, written), encoding="utf-8")
    words = {"words": parts.words} if bundle.task == "token-classification" else {}
    files = sorted([*(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()), _MARK])
    mark = {
        "format": format,
        "task": bundle.task,
        "problem": bundle.problem,
        "labels": parts.labels,
        "features": bundle.features,
        **words,
        "pairs": parts.paired,
        "max_length": bundle.encoder["max_length"],
        "model": bundle.encoder["model"],
        "revision": bundle.encoder["revision"],
        "fingerprint": bundle.fingerprint,
        "threshold": bundle.threshold,
        **({"lengths": bundle.lengths} if bundle.lengths else {}),
        **written.summary,
        **written.more,
        "files": files,
    }
    (folder / _MARK).write_text(json.dumps(mark, indent=1, ensure_ascii=False), encoding="utf-8")


def _move(made: Path, folder: Path, earlier: Sequence[str]) -> list[str]:
    """Put what was made in place of an earlier export, of which nothing but what it wrote is deleted. The mark comes
    last, and an earlier one stays until then: what breaks off can be done again."""
    files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    mode = (made / "README.md").stat().st_mode  # some libraries make files that nobody else may read
    for name in set(earlier) - {_MARK}:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == _MARK):
        (made / name).chmod(mode)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(folder / name)
    for inner in {(folder / name).parent for name in earlier} - {folder}:
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and torch's exporter say of weights and layers that are left out on purpose."""
    from transformers.utils import logging as library

    exporter = logging.getLogger("torch.onnx")
    levels = library.get_verbosity(), exporter.level
    bars = library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(levels[0])
        exporter.setLevel(levels[1])
        if bars:
            library.enable_progress_bar()
