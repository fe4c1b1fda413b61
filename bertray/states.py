"""States that are encoded again whenever they are wanted, instead of being stored: the same vectors, no room, more
time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray import checkpoints
from bertray.annotations import Ints
from bertray.errors import CheckpointError
from bertray.features import parse, with_surroundings
from bertray.spec import Encoder as EncoderSpec
from bertray.store import Store
from bertray.tokens import gathered
from bertray.vectors import edges_of, spans_of, with_vectors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Again:
    """What encodes again: an encoder as it is found by name."""

    model: str
    revision: str
    identity: dict[str, str]
    spec: EncoderSpec
    part: str
    features: tuple[str, ...]

    def encoder(self, device: str = "auto") -> Any:
        """The encoder.

        Raises:
            CheckpointError: it cannot be had, or is another than the one that the stores were made with.
        """
        import torch

        from bertray.encoder import Encoder

        checkpoint = checkpoints.find(self.model, self.revision)
        if checkpoint.identity != self.identity:
            raise CheckpointError(f"{self.model} is not what it was when its words were counted. Run the spec again.")
        cuda = device != "cpu" and torch.cuda.is_available()
        return Encoder(checkpoint, self.spec, "cuda" if cuda else "cpu", 0, self.part, list(map(parse, self.features)))


def tables(store: Store, columns: Sequence[str], encoder: Any = None) -> Iterator[pa.Table]:
    """The shards of a store as tables of those columns; with an encoder those of its features are made again."""
    if encoder is None:
        yield from store.tables(columns)
        return
    names = list(map(str, encoder.features))
    kept = list(dict.fromkeys([*(name for name in columns if name not in names), "text", "starts", "stops"]))
    if encoder.tokenizer.part == "token" and "text_pair" not in kept:
        kept.append("text_pair")
    for table in store.tables(kept):
        texts = Texts.of(table, encoder)
        encoded = encoder.encode(texts.texts, texts.pairs, texts.words)
        made = with_vectors(table.drop_columns(["starts", "stops"]), encoded, names)
        yield made.select(list(columns))


@dataclass
class Texts:
    """Texts whose words have vectors, made when they are asked for: what a tensor [words, features, width] would be."""

    encoder: Any
    texts: list[str]
    pairs: list[str] | None
    words: list[Ints] | None
    edges: Ints
    _last: tuple[tuple[int, ...], NDArray[Any]] | None = None

    @classmethod
    def of(cls, table: pa.Table, encoder: Any) -> "Texts":
        edges, spans = edges_of(table), spans_of(table)
        words = [spans[i:j] for i, j in pairwise(edges.tolist())]
        single = encoder.tokenizer.part == "word"
        pairs = table["text_pair"].to_pylist() if "text_pair" in table.column_names else None
        return cls(encoder, table["text"].to_pylist(), pairs, words if single else None, edges)

    def __add__(self, other: "Texts") -> "Texts":
        pairs = None if self.pairs is None or other.pairs is None else self.pairs + other.pairs
        words = None if self.words is None or other.words is None else self.words + other.words
        edges = np.concatenate([self.edges, self.edges[-1] + other.edges[1:]])
        return Texts(self.encoder, self.texts + other.texts, pairs, words, edges)

    def vectors(self, rows: Ints) -> NDArray[Any]:
        """[rows, features, width] of some words."""
        owners = np.searchsorted(self.edges, rows, side="right") - 1
        texts, places = np.unique(owners, return_inverse=True)
        flat = self._encoded(tuple(texts.tolist()))
        _, begun = gathered(self.edges, texts)
        return flat[begun[places] + rows - self.edges[owners]]

    def _encoded(self, chosen: tuple[int, ...]) -> NDArray[Any]:
        """The vectors of the words of some texts, with what is around the tokens of questions. The last ones are kept:
        questions are asked for right after their tokens."""
        if (last := self._last) and last[0] == chosen:
            return last[1]
        encoded = self.encoder.encode(
            [self.texts[i] for i in chosen],
            self.pairs and [self.pairs[i] for i in chosen],
            self.words and [self.words[i] for i in chosen],
        )
        count = len(self.encoder.features)
        vectors = [words.reshape(len(words), count, words.shape[1] // count) for words in encoded.vectors]
        flat: NDArray[Any] = np.concatenate(vectors)
        if self.encoder.tokenizer.part == "token":
            flat = with_surroundings(flat, np.cumsum([0, *map(len, vectors)]))
        self._last = (chosen, flat)
        return flat


class Recoded:
    """Words' vectors as `Samples` takes them, in place of a tensor: encoded again each time."""

    def __init__(self, texts: Texts, rows: Ints) -> None:
        """The words of those numbers, of all words of the texts."""
        features = len(texts.encoder.features)
        width, times = texts.encoder.width // features, 2 if texts.encoder.tokenizer.part == "token" else 1
        self._texts, self._rows = texts, rows
        self.shape, self.nbytes, self.device = (len(rows), times * features, width), 0, "cpu"

    def __getitem__(self, rows: Any) -> "torch.Tensor":
        import torch

        chosen = self._rows[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        return torch.from_numpy(self._texts.vectors(chosen))
