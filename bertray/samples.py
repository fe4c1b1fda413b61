"""Samples: one worker's rows of a store as it fits on them, in memory, on its device, or in a file where they are too
many. Knows nothing of heads, of solvers, or of Ray."""

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import labels
from bertray.errors import StoreError
from bertray.progress import log
from bertray.store import Store, vectors_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Share:
    """A worker's place among all: of every `world` rows in turn one is its own."""

    rank: int
    world: int

    def of(self, count: int) -> int:
        """How many of so many rows are this worker's."""
        return len(range(self.rank, count, self.world))

    def sum(self, *tensors: "torch.Tensor") -> None:
        """Each of the tensors summed over all workers, in place."""
        if self.world > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)


@dataclass(frozen=True)
class Samples:
    """The rows of one worker.

    vectors: [mine, width] in the type they are stored in: in memory, on the device, or mapped from a file.
    classes: [mine] class index of each, on the device.
    count: how many rows all workers have together.
    spare: bytes that may be held besides.
    """

    vectors: "torch.Tensor"
    classes: "torch.Tensor"
    count: int
    spare: int

    @property
    def width(self) -> int:
        return int(self.vectors.shape[1])

    def take(self, rows: "torch.Tensor | slice", dtype: "torch.dtype") -> "torch.Tensor":
        """[rows, width] of some of the vectors, on the device."""
        if not isinstance(rows, slice):
            rows = rows.to(self.vectors.device)
        return self.vectors[rows].to(self.classes.device, dtype)


@contextmanager
def samples(
    store: Store, classes: Mapping[str, int], share: Share, memory: int | str = "auto", device: str = "auto"
) -> Iterator[Samples]:
    """Read a worker's rows of a complete store.

    Args:
        classes: class index of each label.
        memory: megabytes of vectors to hold at most; more are kept in a temporary file. `auto` is a half of what is
            free.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        StoreError: the store is not complete or damaged, or there is no room for the file.
    """
    import torch

    total = store.complete().total("rows")
    found = np.empty(share.of(total), np.int64)
    parts = _parts(store, classes, share, found)
    first = next(parts)
    needed, room = len(found) * first.shape[1] * first.itemsize, _room(memory, share.world)
    place = _device(device, needed)
    with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
        shape = (len(found), first.shape[1])
        if streamed := needed > room:
            log.info("fitting: %d MB of vectors are more than memory has room for: read from a file", needed >> 20)
            vectors = _mapped(f"{folder}/vectors", first.dtype, shape)
        else:
            vectors = np.empty(shape, first.dtype)
        filled = 0
        for part in itertools.chain([first], parts):
            vectors[filled : filled + len(part)] = part
            filled += len(part)
        tensor = torch.from_numpy(vectors)
        yield Samples(
            tensor if streamed else tensor.to(place), torch.from_numpy(found).to(place), total, max(0, room - needed)
        )


def _mapped(file: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """An array in a file, whose room is taken at once: a disk that is full later would end the process."""
    try:
        with open(file, "wb") as sink:
            size = shape[0] * shape[1] * dtype.itemsize
            os.posix_fallocate(sink.fileno(), 0, size) if hasattr(os, "posix_fallocate") else sink.truncate(size)
    except OSError as error:
        raise StoreError(
            f"The vectors cannot be kept in {os.path.dirname(file)}: {error.strerror}. Set TMPDIR to a folder with "
            "more room, or raise ray.fit_memory."
        ) from None
    return np.memmap(file, dtype, "r+", shape=shape)


def _parts(store: Store, classes: Mapping[str, int], share: Share, found: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """A shard's vectors that are this worker's, shard by shard; their class indices go into `found`."""
    seen = filled = 0
    for table in store.tables(["vector", "label"]):
        mine = slice((share.rank - seen) % share.world, None, share.world)
        part = vectors_of(table)[mine]
        found[filled : filled + len(part)] = _classes(table["label"], classes)[mine]
        seen, filled = seen + table.num_rows, filled + len(part)
        yield part


def _classes(column: pa.ChunkedArray, classes: Mapping[str, int]) -> NDArray[np.int64]:
    """[rows] class index of each label: looked up once for each distinct label."""
    encoded = column.combine_chunks().dictionary_encode()
    return labels.to_classes(encoded.dictionary.to_pylist(), classes)[encoded.indices.to_numpy(zero_copy_only=False)]


def _device(wanted: str, needed: int) -> "torch.device":
    """Where to fit: on this process's GPU, if it has one with room for the vectors."""
    import torch

    if wanted == "cpu" or not torch.cuda.is_available() or 2 * needed > torch.cuda.mem_get_info()[0]:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _room(memory: int | str, world: int) -> int:
    """Bytes of vectors that this process may hold; workers may share a node."""
    if memory != "auto":
        return int(memory) << 20
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free // 2 // world
