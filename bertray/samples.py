"""Samples: one worker's rows of stores as a head is fitted on them, in memory, on its device, or in a file where they
are too many. Knows nothing of heads, of solvers, or of Ray."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import labels
from bertray.annotations import Ints
from bertray.errors import StoreError
from bertray.features import OF_PAIRS, OF_TOKENS, related, with_surroundings
from bertray.progress import log
from bertray.states import Again, Recoded, Texts, tables
from bertray.store import Store
from bertray.vectors import edges_of, spans_of, vectors_of

if TYPE_CHECKING:
    import torch

_GROUPS = Path("/sys/fs/cgroup")  # Linux's control groups, of version 2 and 1: limit, and what is used
_CONTAINER = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
KINDS = {"name": "softmax", "names": "sigmoid", "number": "squared", "tokens": "softmax", "answers": "span"}


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

    def gather(self, mine: Any) -> list[Any]:
        """What all workers have, in their order."""
        if self.world == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found


@dataclass(frozen=True)
class Wanted:
    """What is to be learned from which stores.

    stores: of the rows to fit on, and where there are some, of those to choose by.
    form: of the labels; classes: the index of each name; outputs: of the head.
    folds: how many parts of the training rows are left out in turn. Rows to choose by are part 0, and count for nothing
        else.
    seed: of the parts.
    balanced: whether rows of rare classes count more.
    pairs: the store of the distinct texts of pairs, where each is encoded by itself.
    again: what encodes the vectors again each time, where they are not stored.
    names: of the outputs, where labels are tags: `classes` may know them by numbers, or only those that occur.
    """

    stores: tuple[Store, ...]
    form: str
    classes: Mapping[str, int]
    outputs: int
    folds: int = 0
    seed: int = 0
    balanced: bool = False
    pairs: Store | None = None
    again: Again | None = None
    names: tuple[str, ...] = ()

    @cached_property  # it is in storage
    def features(self) -> list[str]:
        return (self.pairs or self.stores[0]).complete().features


@dataclass(frozen=True)
class Samples:
    """The rows of one worker; where words or tokens have vectors, those are its rows.

    vectors: [mine, features, width] in the type they are stored in: in memory, on the device, mapped from a file, or
        encoded again each time. Of pairs whose texts are encoded by themselves [texts, features, width].
    targets: what is asked of the head, on the device: [mine] classes, or [mine, outputs] numbers.
    edges: [groups + 1] which rows are of one text or question; None where each row is one.
    folds: [mine] which part of the training rows each belongs to.
    weights: [mine] how much each counts.
    count: how many rows (or groups) all workers have together.
    spare: bytes that may be held besides.
    kind: of the loss: softmax, sigmoid, squared or span.
    others: what a row is related to: [mine, 2] the two texts of a pair, or [mine] the question of a token, whose vector
        is in `questions` [groups, features, width].
    chosen: which features are taken; averaged: whether as their mean.
    """

    vectors: Any
    targets: "torch.Tensor"
    folds: "torch.Tensor"
    weights: "torch.Tensor"
    count: int
    spare: int
    kind: str
    outputs: int
    edges: "torch.Tensor | None" = None
    others: "torch.Tensor | None" = None
    questions: Any = None
    chosen: tuple[int, ...] = ()
    averaged: bool = False

    @property
    def device(self) -> "torch.device":
        return self.targets.device

    @property
    def blocks(self) -> int:
        """Features side by side."""
        return 1 if self.averaged else len(self.chosen)

    @property
    def times(self) -> int:
        """How often a head sees each number of a vector."""
        return 1 if self.others is None else OF_PAIRS if self.questions is None else OF_TOKENS

    @property
    def width(self) -> int:
        return self.times * self.blocks * int(self.vectors.shape[2])

    def of(self, chosen: Sequence[int], averaged: bool) -> "Samples":
        """The same rows by some features, side by side or averaged."""
        return replace(self, chosen=tuple(chosen), averaged=averaged)

    def take(self, rows: "torch.Tensor | slice", dtype: "torch.dtype") -> "torch.Tensor":
        """[rows, width] of some of the rows, on the device."""
        if self.others is None:
            return self._flat(self.vectors, rows, dtype)
        others = self.others[rows]
        if self.questions is None:
            u, v = (self._flat(self.vectors, part, dtype) for part in others.unbind(1))
            return related(u, v)
        behind = self.vectors.shape[1] // 2
        u, around = (self._flat(self.vectors, rows, dtype, behind=place) for place in (0, behind))
        return related(u, self._flat(self.questions, others, dtype), around)

    def _flat(
        self, vectors: Any, rows: "torch.Tensor | slice", dtype: "torch.dtype", behind: int = 0
    ) -> "torch.Tensor":
        if not isinstance(rows, slice):
            rows = rows.to(vectors.device)
        found, chosen = vectors[rows], [behind + place for place in self.chosen]
        if chosen != list(range(vectors.shape[1])):
            found = found[:, chosen]
        found = found.to(self.device, dtype)
        return found.mean(1) if self.averaged else found.flatten(1)


@contextmanager
def samples(wanted: Wanted, share: Share, memory: int | str = "auto", device: str = "auto") -> Iterator[Samples]:
    """Read a worker's rows of complete stores.

    Args:
        memory: megabytes of vectors to hold at most; more are kept in a temporary file. `auto` is a half of what is
            free.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        StoreError: a store is not complete or damaged, or there is no room for the file.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
        room = _room(memory, share.world)
        reading = _Reading(
            wanted, share, _Vectors(folder, room), wanted.again.encoder(device) if wanted.again else None
        )
        reading.read()
        vectors, parts = reading.states()
        place = _device(device, vectors.nbytes)
        arrays: dict[str, Any] = {name: torch.from_numpy(array).to(place) for name, array in reading.arrays().items()}
        yield Samples(
            vectors=vectors.to(place)
            if isinstance(vectors, torch.Tensor) and not reading.vectors.streamed
            else vectors,
            count=reading.total,
            spare=max(0, room - vectors.nbytes),
            kind=KINDS[wanted.form],
            outputs=wanted.outputs,
            chosen=tuple(range(len(wanted.features))),
            **arrays,
            **parts,
        )


@dataclass
class _Reading:
    """Reads a worker's rows, shard by shard."""

    wanted: Wanted
    share: Share
    vectors: "_Vectors"
    encoder: Any = None  # where vectors are encoded again
    texts: Texts | None = None
    places: list[Ints] = field(default_factory=list)  # of words, and of questions, among those of the texts
    asked: list[Ints] = field(default_factory=list)
    total: int = 0  # rows or groups of all workers so far
    targets: list[NDArray[Any]] = field(default_factory=list)
    folds: list[Ints] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)
    counts: list[Ints] = field(default_factory=list)  # words of each text
    others: list[Ints] = field(default_factory=list)
    questions: list[NDArray[Any]] = field(default_factory=list)

    def read(self) -> None:
        wanted = self.wanted
        if not self.encoder:
            self.vectors.rows = self._rows()
        if wanted.pairs:
            for table in wanted.pairs.tables(wanted.features):
                self.vectors.add(self._features(table))
        for number, store in enumerate(wanted.stores):
            for table in tables(store, self._columns(), self.encoder):
                mine = np.arange((self.share.rank - self.total) % self.share.world, table.num_rows, self.share.world)
                self.total += table.num_rows
                self._add(table.take(mine), number > 0)
        if not self.encoder:
            self.vectors.done()

    def states(self) -> tuple[Any, dict[str, Any]]:
        """The vectors, and those of the questions, as Samples takes them."""
        import torch

        if self.texts:
            words = Recoded(self.texts, np.concatenate(self.places))
            return words, {"questions": Recoded(self.texts, np.concatenate(self.asked))} if self.asked else {}
        return torch.from_numpy(self.vectors.array), {}

    def _columns(self) -> list[str]:
        paired = self.wanted.form == "answers" or (self.encoder and self._paired())
        columns = ["text", "label", *(["text_pair"] if paired else [])]
        words = ["starts", "stops"] if self.wanted.form in ("tokens", "answers") else []
        return [*columns, *words, *(["first", "second"] if self.wanted.pairs else self.wanted.features)]

    def _paired(self) -> bool:
        return bool(self.wanted.stores[0].complete().made_by["columns"]["text_pair"])

    def _rows(self) -> int:
        """How many vectors there will be, at most."""
        if self.wanted.pairs:
            return self.wanted.pairs.complete().total("rows")
        rows = sum(store.complete().total("rows") for store in self.wanted.stores)
        if self.wanted.form not in ("tokens", "answers"):
            return self.share.of(rows)
        seen = words = 0
        for store in self.wanted.stores:
            for table in store.tables(["starts"]):
                mine = slice((self.share.rank - seen) % self.share.world, None, self.share.world)
                counts = np.diff(edges_of(table))[mine]
                words += int(counts.sum()) - (len(counts) if self.wanted.form == "answers" else 0)
                seen += table.num_rows
        return words

    def _add(self, table: pa.Table, choosing: bool) -> None:
        """Add the rows of a table that are this worker's."""
        wanted, edges, spans = self.wanted, None, None
        rows = table["label"].to_pylist()
        if wanted.form in ("tokens", "answers"):
            edges, spans = edges_of(table), spans_of(table)
        if wanted.pairs:
            self.others.append(np.stack([table[name].to_numpy().astype(np.int64) for name in ("first", "second")], 1))
        else:
            vectors = self._features(table)
            kept = np.arange(len(vectors))
            if wanted.form == "answers" and edges is not None and spans is not None:
                # The first is the question's; its tokens are related to it, but for those that were cut off.
                first, seen = edges[:-1], np.asarray(vectors.any((1, 2)))
                seen[first], seen[first + 1] = False, True
                vectors, kept = with_surroundings(vectors, edges), np.flatnonzero(seen)
                begun = sum(map(len, self.asked or self.questions))
                self._ask(vectors, first)
                spans, edges = spans[kept], np.searchsorted(kept, edges)
                self.others.append(begun + np.repeat(np.arange(len(rows)), np.diff(edges)))
            vectors = vectors[kept]
            if self.encoder:
                self.places.append(kept + (self.texts.edges[-1] if self.texts else 0))
                more = Texts.of(table, self.encoder)
                self.texts = self.texts + more if self.texts else more
            else:
                self.vectors.add(vectors)
        found = labels.targets(wanted.form, rows, wanted.classes, wanted.outputs, edges, spans)
        self.targets.append(found)
        weights = np.full(len(found), 0.0 if choosing else 1.0, np.float32)
        if edges is not None:
            self.counts.append(np.diff(edges))
            if wanted.form == "tokens":
                weights[~vectors.any((1, 2))] = 0  # words that were cut off
        self.weights.append(weights)
        each = np.zeros(len(rows), np.int64) if choosing else self._folds(table)
        self.folds.append(each if edges is None else np.repeat(each, np.diff(edges)))

    def _ask(self, vectors: NDArray[Any], first: Ints) -> None:
        """Note the vectors of questions."""
        if self.encoder:
            self.asked.append(first + (self.texts.edges[-1] if self.texts else 0))
        else:
            self.questions.append(vectors[first])

    def _folds(self, table: pa.Table) -> Ints:
        """[rows] which part each row belongs to, by what its text (of a question the context) is: equal ones are left
        out together."""
        if len(self.wanted.stores) > 1 or not self.wanted.folds:
            return np.full(table.num_rows, 1, np.int64)
        texts = table["text_pair" if self.wanted.form == "answers" else "text"].to_pylist()
        key = self.wanted.seed.to_bytes(8, "little")
        hashes = (hashlib.blake2b(text.encode(), digest_size=8, key=key).digest() for text in texts)
        return np.array([int.from_bytes(each, "little") % self.wanted.folds for each in hashes], np.int64)

    def _features(self, table: pa.Table) -> NDArray[Any]:
        names = self.wanted.features
        vectors = vectors_of(table, names)
        return vectors.reshape(len(vectors), len(names), vectors.shape[1] // len(names))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All but the vectors."""
        targets, weights = np.concatenate(self.targets), np.concatenate(self.weights)
        if self.wanted.balanced:
            weights *= self._balance(targets, weights)
        found = {"targets": targets, "weights": weights, "folds": np.concatenate(self.folds)}
        if self.counts:
            found["edges"] = np.concatenate([[0], np.cumsum(np.concatenate(self.counts))])
        if self.others:
            found["others"] = np.concatenate(self.others)
        if self.questions:
            found["questions"] = np.concatenate(self.questions)
        return found

    def _balance(self, targets: Ints, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """[mine] so that all classes count the same: rows / (classes * rows of the class), as scikit-learn has it."""
        mine = np.bincount(targets[weights > 0], minlength=self.wanted.outputs)
        counts = np.sum(self.share.gather(mine), 0)
        occurring = np.maximum(1, (counts > 0).sum())
        each: NDArray[np.float32] = (counts.sum() / (occurring * np.maximum(counts, 1)))[targets].astype(np.float32)
        return each


class _Vectors:
    """Room for so many vectors at most, in memory or in a file, and what is in it so far."""

    def __init__(self, folder: str, room: int, rows: int = 0) -> None:
        self._folder, self._room, self.rows = folder, room, rows
        self.array: NDArray[Any] = np.zeros((0, 1, 1), np.float16)
        self.streamed, self._made, self._filled = False, False, 0

    def add(self, part: NDArray[Any]) -> None:
        if not self._made:
            self._make(part)
        self.array[self._filled : self._filled + len(part)] = part
        self._filled += len(part)

    def _make(self, part: NDArray[Any]) -> None:
        self._made, shape = True, (self.rows, *part.shape[1:])
        needed = int(np.prod(shape)) * part.itemsize
        self.streamed = needed > self._room
        if self.streamed:
            log.info("fitting: %d MB of vectors are more than memory has room for: read from a file", needed >> 20)
            self.array = _mapped(f"{self._folder}/vectors", part.dtype, shape)
        else:
            self.array = np.empty(shape, part.dtype)

    def done(self) -> None:
        self.array = self.array[: self._filled]


def _mapped(file: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array in a file, whose room is taken at once: a disk that is full later would end the process."""
    try:
        with open(file, "wb") as sink:
            size = int(np.prod(shape)) * dtype.itemsize
            os.posix_fallocate(sink.fileno(), 0, size) if hasattr(os, "posix_fallocate") else sink.truncate(size)
    except OSError as error:
        raise StoreError(
            f"The vectors cannot be kept in {os.path.dirname(file)}: {error.strerror}. Set TMPDIR to a folder with "
            "more room, or raise ray.fit_memory."
        ) from None
    return np.memmap(file, dtype, "r+", shape=shape)


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
    return _free() // 2 // world


def _free() -> int:
    """Bytes of memory that are free, to the machine and to the container that this may be."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in _CONTAINER:
        with suppress(OSError, ValueError, StopIteration):  # no such control groups, or no limit
            most, now = (int((_GROUPS / name).read_text()) for name in (limit, used))
            stat = (_GROUPS / used).with_name("memory.stat").read_text().splitlines()
            cached = next(int(line.split()[1]) for line in stat if line.split()[0].endswith("inactive_file"))
            free = min(free, max(0, most - now + cached))
    return free
