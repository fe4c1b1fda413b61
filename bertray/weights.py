"""The weights of a checkpoint by name, read no further than asked. Knows nothing of what they compute.

Names are those of transformers' models today: `gamma` and `beta` of layer norms in checkpoints of TensorFlow's days are
`weight` and `bias`.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bertray.checkpoints import weight_files
from bertray.errors import CheckpointError

_KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors says it, and torch
_OLD = {"gamma": "weight", "beta": "bias"}
_BLOCK = 8192  # rows at once


class Weights:
    """What the files of a checkpoint hold.

    shapes: of each weight; numbers that are no weights, such as positions counted up, are left out.
    kind: of its numbers, such as float32.
    """

    def __init__(self, folder: Path) -> None:
        """Look at the files' heads; weights themselves are read when they are asked for.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            found = list(_tensors(folder))
        except Exception as error:  # safetensors and torch raise many kinds: say what they said
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(f"The weights in {folder} cannot be read: {said}") from error
        self._parts: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kind = ""
        for name, part, shape, kind in found:
            if kind in _KINDS.values():
                start, dot, last = name.rpartition(".")
                name = start + dot + _OLD.get(last, last)
                self._parts[name], self.shapes[name] = part, shape
                self.kind = self.kind or kind

    def name(self, ending: str) -> str:
        """The name of the weight that ends so, whatever model it is part of; empty if there is none."""
        return min((name for name in self.shapes if f".{name}".endswith(f".{ending}")), key=len, default="")

    def __getitem__(self, name: str) -> torch.Tensor:
        """A weight in float32."""
        return self._rows(name, slice(None))

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """[rows, width] of a table in float32."""
        own = {row: self._rows(name, slice(row, row + 1)) for row in dict.fromkeys(rows)}
        return torch.cat([own[row] for row in rows])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A table in float32, some thousand rows at a time."""
        for start in range(0, self.shapes[name][0], _BLOCK):
            yield self._rows(name, slice(start, start + _BLOCK))

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        tensor: torch.Tensor = self._parts[name][rows]
        return tensor.float()


def _tensors(folder: Path) -> Iterator[tuple[str, Any, tuple[int, ...], str]]:
    """Name, what gives it in slices, shape and type of each tensor."""
    from safetensors import safe_open

    known = set()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                part = opened.get_slice(name)
                yield name, part, tuple(part.get_shape()), _KINDS.get(part.get_dtype(), "")
            continue
        mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not
        for name, tensor in torch.load(file, map_location="cpu", mmap=mapped, weights_only=True).items():
            place = tensor.data_ptr(), tensor.shape
            if place in known and tensor.numel():  # tied to another, which safetensors leave out
                continue
            known.add(place)
            yield name, tensor, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
