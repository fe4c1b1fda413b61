"""The frozen BERT: texts, or their words, to one vector each. Knows nothing of Ray, of files of rows, or of heads.

This is the only inference path: stores, batch prediction and serving all call `Encoder`. Texts are tokenized
once and sorted by length inside a large block; a backend runs them in packs without padding; vectors come back in the
order of the texts. While one block is encoded the next is tokenized.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from bertray import backends
from bertray.checkpoints import Checkpoint
from bertray.clock import Stopwatch
from bertray.errors import BertrayError, CheckpointError
from bertray.features import Feature, features
from bertray.native import first_position
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Pooling
from bertray.tokens import Ints, Tokenizer, Tokens, Windows, Words

Vectors = NDArray[Any]


# Characters of the texts of a block, for each text that it may hold: long texts make blocks of fewer, since tokenizing
# takes hundreds of bytes a token for a while.
_CHARACTERS = 2048
_BLOCK_OF_WORDS = 512  # texts of a block whose words all become vectors
_PROBE = "a plain text"
_PARTS = 4  # of a block that failed: with many bad rows halves take twice as many passes over the good ones
_REASON = 300  # characters of a reason


@dataclass(frozen=True)
class Encoded:
    """What encoding n texts gives.

    vectors: [n, width of all features] float32 for fp32, otherwise float16 (finer than bf16; its narrower range is
        checked). Where words become vectors: n arrays [words, width]; zeros for a word that was cut off, or that the
        tokenizer makes nothing of.
    tokens: [n] how many tokens were encoded of each text: those of all its windows.
    truncated: [n] whether it lost something.
    windows: [n] how many windows it was encoded in.
    spans: [n] of each text [words, 2] where its words begin and end, in characters; None where texts become vectors.
    """

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    windows: NDArray[np.int64]
    spans: NDArray[np.object_]

    def take(self, rows: slice | NDArray[np.int64]) -> "Encoded":
        """Some texts of it; of a slice in the same memory."""
        return Encoded(*(getattr(self, field.name)[rows] for field in fields(self)))


class _Overflow(CheckpointError):
    """Some texts' vectors cannot be stored; all others are in their places."""

    def __init__(self, precision: str, rows: NDArray[np.int64]) -> None:
        super().__init__(f"Vectors in {precision} exceed what can be stored. Set encoder.precision to fp32.")
        self.rows = rows


class Encoder:
    """A frozen checkpoint on a device, with its tokenizer and pooling. Threads may share one: while one of them
    encodes, the others tokenize."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: EncoderSpec,
        device: str = "cpu",
        threads: int = 0,
        part: str = "text",
        wanted: Sequence[Feature] = (),
    ) -> None:
        """Load the checkpoint.

        Args:
            device: `cpu` or `cuda` (the first one this process sees).
            threads: CPU threads to compute with; 0 leaves torch's default.
            part: what becomes a vector: each `text` or pair; each `word` of the texts; or, of pairs, the first text
                whole, [CLS], and each `token` of the second text.
            wanted: the features to give; left out, those that the spec tells.

        Raises:
            CheckpointError: the checkpoint lacks what the spec asks of it.
        """
        if threads:
            torch.set_num_threads(threads)
            os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's own pool
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        self.features = tuple(wanted) or features(spec.pooling, spec.layers, checkpoint.layers)
        model, self._facts = load(checkpoint)
        self._facts.check(spec, self.features)
        self.backend = backends.choose(model, spec.precision, self.features, device, threads)
        self._checkpoint, self._stored = checkpoint, stored_dtype(spec.precision)
        self.tokenizing, self._beginning = Stopwatch(), Lock()
        self._blocks_begun = 0
        self._read(spec, part)

    def reading(self, spec: EncoderSpec, part: str = "text", wanted: Sequence[Feature] = ()) -> "Encoder":
        """The same weights, reading texts in another way: with another limit on their length, another part of them
        becoming vectors, other features of the layers that are loaded.

        Args:
            spec: its precision is that of the weights, whatever it says.

        Raises:
            CheckpointError: the checkpoint lacks what the spec asks of it.
        """
        other = copy.copy(self)
        other.features = tuple(wanted) or features(spec.pooling, spec.layers, self._checkpoint.layers)
        self._facts.check(spec, other.features)
        other.backend = self.backend.giving(other.features)
        other._read(spec, part)
        return other

    def _read(self, spec: EncoderSpec, part: str) -> None:
        self.width = len(self.features) * self._facts.width
        folder = self._checkpoint.folder
        self.tokenizer = Tokenizer(folder, spec.max_length, spec.truncation, spec.overlap, part)
        self._block = self.backend.block if part == "text" else _BLOCK_OF_WORDS

    def flops(self, tokens: NDArray[np.int64], windows: NDArray[np.int64]) -> float:
        """Operations that the layers up to the highest one asked for take for texts of so many tokens in so many
        windows: two for each weight and token, and for attention four for each pair of tokens and each of its
        numbers."""
        layers = max(feature.layer for feature in self.features)
        pairs = tokens * (tokens / np.maximum(windows, 1))
        return layers * float(2 * self._facts.weights * tokens.sum() + 4 * self._facts.width * pairs.sum())

    @property
    def steps(self) -> int:
        """A number that grows while there is progress: by each block that was tokenized and each pack that went
        through the layers (on CUDA: that was sent to the device, which is at most a few packs behind)."""
        return self._blocks_begun + self.backend.steps

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, words: Sequence[Ints] | None = None
    ) -> Encoded:
        """Vectors of texts, or of pairs, in their order.

        Args:
            words: where the words of each text begin and end, in characters, if those become vectors and are known.

        Raises:
            CheckpointError: the texts or their vectors exceed what the checkpoint or the precision can hold.
            SourceError: a text is too long, where that is an error.
            SpecError: max_length leaves no room beside the special tokens and the overlap.
        """
        out = self._empty(len(texts))
        for _, finish in self._blocks(_Inputs(texts, pairs, words), out, strict=True):
            finish()
        return out

    def encode_rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, words: Sequence[Ints] | None = None
    ) -> tuple[Encoded, dict[int, str]]:
        """The same, but a text that cannot be encoded stops nothing: it has zeros (or no words) for its results.

        Returns:
            What encoding gives, and for each row that failed the reason, a line.

        Raises:
            Exception: what is no text's fault: memory, files and devices fail, or a plain text too cannot be encoded.
        """
        out, inputs = self._empty(len(texts)), _Inputs(texts, pairs, words)
        failed: dict[int, str] = {}
        for span, finish in self._blocks(inputs, out, strict=False):
            failed.update(self._salvage(inputs, span, out, finish))
        for row in np.flatnonzero(out.truncated & (out.tokens == 0)).tolist():
            failed[row] = f"longer than {self.tokenizer.max_length} tokens"
        nothing = self._empty(1)
        for field in fields(out):
            for row in failed:
                getattr(out, field.name)[row] = getattr(nothing, field.name)[0]
        return out, dict(sorted(failed.items()))

    def _empty(self, texts: int) -> Encoded:
        """Room for what encoding gives."""
        tokens, truncated, windows = (np.zeros(texts, kind) for kind in (np.int64, bool, np.int64))
        vectors, spans = np.zeros((texts, self.width), self._stored), np.full(texts, None)
        if self.tokenizer.part != "text":
            vectors = np.empty(texts, object)
            for row in range(texts):
                vectors[row], spans[row] = np.zeros((0, self.width), self._stored), np.zeros((0, 2), np.int64)
        return Encoded(vectors, tokens, truncated, windows, spans)

    def _salvage(self, inputs: "_Inputs", span: slice, out: Encoded, finish: Callable[[], None]) -> dict[int, str]:
        """Finish a block. Where it fails, encode it in parts, and those in theirs, down to the rows that fail."""
        try:
            finish()
            return {}
        except _Overflow as error:
            self._probe(error, inputs.paired)
            reason = f"its vector exceeds what {np.dtype(self._stored)} can hold"
            return {span.start + row: reason for row in error.rows.tolist()}
        except Exception as error:
            if _is_no_texts_fault(error):
                raise
            if span.stop - span.start == 1:
                self._probe(error, inputs.paired)
                return {span.start: _reason(error)}
        failed: dict[int, str] = {}
        edges = np.unique(np.linspace(span.start, span.stop, _PARTS + 1).astype(int)).tolist()
        for part in (slice(start, stop) for start, stop in pairwise(edges)):
            begun = self._begun(self._job(inputs, part, strict=False), out.take(part))
            failed.update(self._salvage(inputs, part, out, begun))
        return failed

    def _probe(self, error: Exception, paired: bool) -> None:
        """Raise the error of a text if a plain text cannot be encoded either."""
        plain = _Inputs([_PROBE], [_PROBE] if paired else None)
        try:
            self._begun(self._job(plain, slice(0, 1), strict=False), self._empty(1))()
        except Exception:
            raise error from None

    def _blocks(self, inputs: "_Inputs", out: Encoded, strict: bool) -> Iterator[tuple[slice, Callable[[], None]]]:
        """Blocks of texts, and what waits until the part of `out` that is theirs is filled, or raises what kept it
        from that. Meanwhile the next one is begun."""
        waiting = None
        for span, tokenized in self._tokenized(inputs, strict):
            begun = span, self._begun(tokenized, out.take(span))
            if waiting:
                yield waiting
            waiting = begun
        if waiting:
            yield waiting

    def _tokenized(self, inputs: "_Inputs", strict: bool) -> Iterator[tuple[slice, Callable[[], Tokens]]]:
        """Blocks of texts, each tokenized while the one before is encoded."""
        spans = _spans(inputs, self._block)
        if len(spans) < 2:  # not worth a thread
            yield from ((span, self._job(inputs, span, strict)) for span in spans)
            return
        with ThreadPoolExecutor(1, "bertray-tokenize") as pool:
            jobs = [pool.submit(self._job(inputs, span, strict)) for span in spans[:2]]
            for number, span in enumerate(spans):
                if number + 2 < len(spans):
                    jobs.append(pool.submit(self._job(inputs, spans[number + 2], strict)))
                yield span, jobs.pop(0).result

    def _job(self, inputs: "_Inputs", span: slice, strict: bool) -> Callable[[], Tokens]:
        texts, pairs, words = inputs

        def tokenize() -> Tokens:
            with self.tokenizing:
                return self.tokenizer(texts[span], pairs and pairs[span], strict, words and words[span])

        return tokenize

    def _begun(self, tokenized: Callable[[], Tokens], out: Encoded) -> Callable[[], None]:
        """Begin to encode a block into `out`; what is returned waits until it is there, and raises what went wrong."""
        try:
            tokens = tokenized()
            with self._beginning:
                self._blocks_begun += 1
                return self._begin(tokens, out)
        except Exception as error:
            return partial(_raise, error)

    def _begin(self, tokens: Tokens, out: Encoded) -> Callable[[], None]:
        if tokens.ids.max(initial=0) >= self._facts.vocabulary:
            raise CheckpointError(
                f"The tokenizer of {self._checkpoint.name} gives token {tokens.ids.max()}, but its model knows "
                f"{self._facts.vocabulary}. Give a checkpoint whose tokenizer belongs to it."
            )
        if not self._facts.typed:
            tokens.types[:] = 0
        lengths, windows = tokens.lengths, tokens.windows
        out.tokens[:] = lengths if windows is None else np.add.reduceat(lengths, windows.first)
        out.truncated[:] = tokens.truncated if windows is None else tokens.truncated[windows.first]
        out.windows[:] = 1 if windows is None else windows.counts
        order = np.argsort(-lengths, kind="stable")
        if skipped := int((tokens.truncated & (lengths == 0)).sum()):
            order = order[: len(order) - skipped]
        if not len(order):
            return lambda: None
        taken = tokens.take(order)
        result = self.backend.start(taken)

        def finish() -> None:
            vectors = result()
            vectors = vectors.reshape(len(vectors), self.width)
            with np.errstate(over="ignore", invalid="ignore"):
                if tokens.words is not None:
                    _to_words(vectors, taken, tokens.words, out)
                elif windows is None:
                    out.vectors[order] = vectors
                else:
                    rows = np.empty_like(vectors)
                    rows[order] = vectors
                    _join(rows, windows, self.features, out.vectors)
            if len(infinite := _infinite(out.vectors)):
                raise _Overflow(self.backend.precision, infinite)

        return finish


class _Inputs(NamedTuple):
    """Texts to encode, their pairs, and where their words are."""

    texts: Sequence[str]
    pairs: Sequence[str] | None = None
    words: Sequence[Ints] | None = None

    @property
    def paired(self) -> bool:
        return self.pairs is not None


def _spans(inputs: _Inputs, block: int) -> list[slice]:
    """Blocks of so many texts, or of fewer long ones."""
    texts, pairs, _ = inputs
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    if pairs is not None:
        sizes += np.fromiter(map(len, pairs), np.int64, len(texts))
    ends = np.cumsum(sizes)
    spans, start = [], 0
    while start < len(texts):
        before = ends[start] - sizes[start]
        stop = int(np.searchsorted(ends, before + block * _CHARACTERS, side="right"))
        stop = min(start + block, max(start + 1, stop), len(texts))
        spans.append(slice(start, stop))
        start = stop
    return spans


def _join(rows: NDArray[Any], windows: Windows, features: Sequence[Feature], out: Vectors) -> None:
    """Vectors of windows [rows, width] to those of texts [n, width]: the mean by weight, or of `max` the maximum."""
    first = windows.first
    out[:] = rows[first]
    highest = np.repeat([feature.pooling == "max" for feature in features], rows.shape[1] // len(features))
    for text in np.flatnonzero(windows.counts > 1):
        own = slice(first[text], first[text] + windows.counts[text])
        many = rows[own].astype(np.float64)
        out[text] = np.where(highest, many.max(0), np.average(many, 0, windows.weights[own]))


def _to_words(vectors: NDArray[Any], taken: Tokens, words: Words, out: Encoded) -> None:
    """Vectors of the segments of `taken` to those of the words of each text."""
    assert taken.segments is not None
    flat = np.zeros((len(words.spans), vectors.shape[1]), out.vectors[0].dtype)
    flat[taken.segments.words] = vectors
    for row, (start, stop) in enumerate(pairwise(words.edges.tolist())):
        out.vectors[row], out.spans[row] = flat[start:stop], words.spans[start:stop]


def _infinite(vectors: Vectors) -> Ints:
    """The texts that have a vector that is not finite."""
    if vectors.dtype == object:
        return np.flatnonzero([not np.isfinite(words).all() for words in vectors])
    if vectors.dtype == np.float16:  # by its bits, in a tenth of the time that NumPy takes
        return np.flatnonzero(((vectors.view(np.uint16) & 0x7C00) == 0x7C00).any(1))
    return np.flatnonzero(~np.isfinite(vectors).all(1))


def _is_no_texts_fault(error: Exception) -> bool:
    """Whether an error is the machine's. That a single text does not fit a device is a CheckpointError, and its own."""
    device = isinstance(error, RuntimeError) and ("CUDA" in str(error) or "DefaultCPUAllocator" in str(error))
    return device or isinstance(error, MemoryError | OSError)


def _reason(error: Exception) -> str:
    """An error in a line that any file can hold."""
    kind = "" if isinstance(error, BertrayError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".encode(errors="backslashreplace").decode().split())[:_REASON]


def _raise(error: Exception) -> None:
    raise error


def stored_dtype(precision: str) -> Any:
    """The NumPy type that vectors of a precision (as the spec names it) are stored in."""
    return np.float32 if precision == "fp32" else np.float16


@dataclass(frozen=True)
class _Facts:
    """What a checkpoint has: its name, how many layers, the weights of a layer, the size of its vectors and vocabulary,
    how many tokens it can read, whether it tells the texts of a pair apart, whether its pooler is trained."""

    name: str
    layers: int
    width: int
    vocabulary: int
    limit: int | None
    typed: bool
    pooler: bool
    weights: int

    def check(self, spec: EncoderSpec, features: Sequence[Feature]) -> None:
        """Whether it has what is asked of it.

        Raises:
            CheckpointError: it has not.
        """
        for feature in features:  # what is not there, native code would read all the same
            if feature.pooling not in get_args(Pooling) or not 0 <= feature.layer <= self.layers:
                raise CheckpointError(f"{self.name} has no {feature}: its layers are 0 (embeddings) to {self.layers}.")
        if not self.pooler and any(feature.pooling == "pooler" for feature in features):
            raise CheckpointError(f"{self.name} has no trained pooler. Set encoder.pooling to mean, cls or max.")
        if self.limit is not None and spec.max_length > self.limit:
            raise CheckpointError(
                f"encoder.max_length must be at most {self.limit} for {self.name}. Got {spec.max_length} instead."
            )


def pretrained(checkpoint: Checkpoint, kind: str, **settings: Any) -> tuple[Any, set[str]]:
    """A checkpoint in float32 on the CPU as a model of transformers, such as `AutoModel`, and the weights it lacks.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what a checkpoint has beyond the model is no news, and what it lacks is given
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **settings
        )
    except Exception as error:  # transformers raises many kinds: say what it said
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), set(info["missing_keys"])


def load(checkpoint: Checkpoint, attention: str = "") -> tuple[Any, _Facts]:
    """The model in float32 on the CPU, without a pooler that was never trained.

    Args:
        attention: how transformers is to compute it, if not in its own best way; `eager` tells its maps.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights.
    """
    model, missing = pretrained(checkpoint, "AutoModel", **({"attn_implementation": attention} if attention else {}))
    pooler = {key for key in missing if "pooler" in key}
    if missing - pooler:
        raise CheckpointError(
            f"{checkpoint.name} lacks weights, such as {min(missing - pooler)}. "
            "Give a checkpoint of an encoder of BERT's family."
        )
    if pooler:
        model.pooler = None
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    facts = _Facts(
        checkpoint.name,
        int(config.num_hidden_layers),
        int(config.hidden_size),
        int(config.vocab_size),
        None if limit is None else int(limit) - first_position(model),
        getattr(config, "type_vocab_size", 0) > 1,
        getattr(model, "pooler", None) is not None,
        _weights_of_layers(model) // int(config.num_hidden_layers),
    )
    return model.requires_grad_(False), facts


def _weights_of_layers(model: Any) -> int:
    """Weights that every token is multiplied with: all matrices but those of embeddings and pooler."""
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and not name.startswith(("embeddings.", "pooler."))
    )
