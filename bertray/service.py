"""The service: requests to answers, with heads over texts that an encoder elsewhere has read. Knows nothing of HTTP or
of Ray."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertray import answers, explain
from bertray import bundle as bundles
from bertray.batcher import Batcher, Input, Late, Lost, Overloaded, Read, Unavailable
from bertray.bundle import Bundle
from bertray.errors import BertrayError, BundleError, CheckpointError, SpecError
from bertray.features import related
from bertray.predict import answers_to, labels_of
from bertray.registry import Head, Reading, Registry, Shelf
from bertray.storage import Location

_PROBE = "a plain text"
_EXPLORED = 8  # texts that may wait to be looked into: each takes as long as dozens that are encoded

# Looks into a text or a pair, for those sections, with so many numbers of each vector: `explorer.explore` as JSON.
# Raises Lost.
Explore = Callable[[Input, Sequence[str], int], Awaitable[bytes]]


class Wrong(BertrayError):
    """What a request holds cannot be answered, whoever answers."""


class TooMuch(BertrayError):
    """A request holds more than is allowed."""


@dataclass(frozen=True)
class Limits:
    """What a request may hold, and how long it may take.

    texts: inputs of a request; characters: of each text; body: bytes of a request; queue: texts that may wait;
    deadline: seconds until a request is given up; cache: bytes of vectors that are kept.
    """

    texts: int = 1_000
    characters: int = 100_000
    body: int = 16_000_000
    queue: int = 4_096
    deadline: float = 30.0
    cache: int = 64_000_000


class Options(NamedTuple):
    """top_k: so many labels at most; raw_scores: logits for probabilities; truncate: whether texts may be cut;
    ood: whether answers tell how unlike the training texts their texts are."""

    top_k: int | None = None
    raw_scores: bool = False
    truncate: bool = True
    ood: bool = False


def inputs_of(bundle: Bundle, given: Any, limits: Limits) -> tuple[list[Input], bool]:
    """What a request asks a head, and whether that was one input and not a list.

    Args:
        given: for a head on single texts a text or a list of texts (each may stand in a list of its own); on pairs
            a pair or a list of pairs; on questions also {"question", "context"} or a list of those.

    Raises:
        Wrong: it is none of these.
        TooMuch: it is more than is allowed.
    """
    paired = bundle.pairs
    single = isinstance(given, str | dict) or (
        paired and isinstance(given, list) and len(given) == 2 and all(isinstance(text, str) for text in given)
    )
    listed = [given] if single else given
    if not isinstance(listed, list):
        raise Wrong(_form(bundle))
    if len(listed) > limits.texts:
        raise TooMuch(f"At most {limits.texts} inputs a request. Got {len(listed)}: send them in several requests.")
    found = []
    for place, item in enumerate(listed):
        texts = _texts(item, paired)
        if texts is None:
            raise Wrong(f"{_form(bundle)} Got another thing at inputs[{place}].")
        for text in texts:
            check_length(text, f"inputs[{place}]", limits)
        found.append(Input(texts[0], texts[1] if paired else None))
    return found, single


def check_length(text: str, place: str, limits: Limits) -> None:
    """Whether a text may be so long.

    Raises:
        TooMuch: it may not.
    """
    if len(text) > limits.characters:
        raise TooMuch(f"At most {limits.characters} characters a text. Got {len(text)} in {place}.")


def _texts(item: Any, paired: bool) -> list[str] | None:
    """The texts of an input; None if it is not one."""
    if paired and isinstance(item, dict) and {"question", "context"} <= {*item}:
        item = [item["question"], item["context"]]
    if not paired and isinstance(item, str):
        item = [item]
    right = isinstance(item, list) and len(item) == 1 + paired and all(isinstance(text, str) for text in item)
    return item if right else None


def _form(bundle: Bundle) -> str:
    one = '["a text", "its pair"]' if bundle.pairs else '"a text"'
    if bundle.task == "question-answering":
        one = '{"question": "...", "context": "..."}'
    return f"inputs must be {one} or [{one}, ...] for this head."


class Service:
    """Heads, and texts on their way to the encoder."""

    def __init__(
        self, registry: Registry, batcher: Batcher, explore: Explore, limits: Limits, folder: Location | None = None
    ) -> None:
        """A service of what the registry holds.

        Args:
            explore: what looks into texts, one at a time.
            folder: where bundles may be put from; None allows none.
        """
        self.registry, self.batcher, self.limits, self.folder = registry, batcher, limits, folder
        self._changing, self._exploring = asyncio.Lock(), asyncio.Lock()
        self._explore, self._explored = explore, 0

    # --- answers ------------------------------------------------------------------------------------------

    async def predict(
        self, shelf: Shelf, head: Head, inputs: Sequence[Input], options: Options, seconds: float
    ) -> list[dict[str, Any]]:
        """What a head predicts for each input: a dict with what its kind of head answers.

        Raises:
            Wrong, TooMuch: an input cannot be encoded, or was cut and must not be.
            Overloaded, Late, Unavailable: see `Batcher.read`.
        """
        reads = await self._read(shelf, head, inputs, options.truncate, seconds)
        bundle = head.bundle
        if not reads:
            return []
        vectors = _vectors(shelf.reading(head), bundle, reads)
        if bundle.task == "text-classification":
            found = _classified(bundle, vectors, options)
        else:
            texts, pairs = [given.text for given in inputs], [given.pair or "" for given in inputs]
            spans = [read.spans for read in reads]
            found = await asyncio.to_thread(_found, bundle, vectors, spans, texts, pairs)
        if options.ood and bundle.ood is not None:
            distances = bundle.ood.distance(np.asarray(vectors, np.float32))
            for prediction, distance in zip(found, distances.tolist(), strict=True):
                threshold = bundle.ood.threshold
                prediction["ood"] = {"distance": distance, "threshold": threshold, "outlier": distance > threshold}
        for prediction, read in zip(found, reads, strict=True):
            prediction["truncated"] = read.truncated
        return found

    async def explain(self, shelf: Shelf, head: Head, given: Input, seconds: float) -> dict[str, Any]:
        """By how much the probability of a text's label (of a number: itself) falls without each of its words.

        Raises:
            As `predict`; Wrong too: the head does not label whole texts.
        """
        bundle = head.bundle
        if bundle.task != "text-classification":
            raise Wrong(f"{head.name} answers {bundle.task}, whose answers are not explained.")
        found = explain.pieces(given.text)
        inputs = [given, *(given._replace(text=text) for text in found.without)]
        reads = await self._read(shelf, head, inputs, True, seconds)
        scores = answers.scores(bundle, bundle.head.logits(_vectors(shelf.reading(head), bundle, reads)))
        best = int(scores[0].argmax())
        words = [
            {"text": given.text[start:stop], "start": start, "end": stop, "weight": float(scores[0, best] - without)}
            for (start, stop), without in zip(found.spans, scores[1:, best], strict=True)
        ]
        return {
            "label": bundle.labels[best],
            "score": float(scores[0, best]),
            "method": "occlusion",
            "words": words,
        }

    async def explore(self, given: Input, show: Sequence[str], dims: int, seconds: float) -> bytes:
        """What the encoder sees of a text or a pair: `explorer.explore` as JSON.

        Raises:
            Wrong: it cannot be looked into.
            Overloaded, Late, Unavailable: see `Batcher.read`.
        """
        if self._explored >= _EXPLORED:
            raise Overloaded(self._explored, 1.0)
        self._explored += 1
        try:
            async with asyncio.timeout(seconds), self._exploring:
                return await self._explore(given, show, dims)
        except TimeoutError:
            raise Late(f"Not looked into within {seconds:g} s.") from None
        except Lost:
            raise Unavailable("The encoder ended while it looked. Try again.") from None
        except BertrayError as error:
            raise Wrong(str(error)) from None
        finally:
            self._explored -= 1

    async def embed(
        self, shelf: Shelf, head: Head, inputs: Sequence[Input], normalize: bool, truncate: bool, seconds: float
    ) -> tuple[NDArray[np.float32], int]:
        """The vectors [n, width] that a head sees of single texts, or for a head that sees words or pairs the mean of
        its last layer; and how many tokens those texts have.

        Raises:
            As `predict`.
        """
        reading, features = self.embedding(shelf, head)
        reads = await self._checked(reading, inputs, truncate, seconds)
        if not reads:
            return np.zeros((0, 0), np.float32), 0
        vectors = np.stack([_selected(read.vectors, reading, features) for read in reads]).astype(np.float32)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors, sum(read.tokens for read in reads)

    def embedding(self, shelf: Shelf, head: Head) -> tuple[Reading, tuple[str, ...]]:
        """How single texts are read for `embed`, and the features of their vectors."""
        reading, bundle = shelf.reading(head), head.bundle
        if bundle.part == "text":
            return reading, bundle.features
        last = (f"mean_{max(int(name.rpartition('_')[2]) for name in bundle.features)}",)
        return reading._replace(part="text", features=last), last

    async def _read(
        self, shelf: Shelf, head: Head, inputs: Sequence[Input], truncate: bool, seconds: float
    ) -> list[Read]:
        reading = shelf.reading(head)
        if not head.bundle.siamese:
            return await self._checked(reading, inputs, truncate, seconds)
        apart = [Input(text or "") for given in inputs for text in (given.text, given.pair)]
        reads = await self._checked(reading, apart, truncate, seconds)
        return [_joined(u, v) for u, v in zip(reads[::2], reads[1::2], strict=True)]

    async def _checked(self, reading: Reading, inputs: Sequence[Input], truncate: bool, seconds: float) -> list[Read]:
        if not inputs:
            return []
        reads = await self.batcher.read(reading, inputs, seconds)
        for given, read in zip(inputs, reads, strict=True):
            if read.reason:
                raise Wrong(f"{_named(given)} cannot be encoded: {read.reason}.")
            if read.truncated and not truncate:
                raise TooMuch(
                    f"{_named(given)} is longer than {reading.max_length} tokens. Shorten it, or allow truncate."
                )
        return reads

    # --- heads --------------------------------------------------------------------------------------------

    async def put(self, name: str, path: str) -> Head:
        """Serve a bundle of the allowed folder under a name, once it is loaded and an encoder is ready for it.

        Raises:
            BertrayError: no folder is allowed, the path leads out of it, or there is no bundle that fits.
        """
        url = self._inside(path)
        async with self._changing:
            bundle = await asyncio.to_thread(bundles.load, url)
            head = self.registry.next(name, bundle, url)
            await self._warm(self.registry.with_heads({name: head}), [head])
            self.registry.put(head)
        return head

    async def replace(self, urls: Mapping[str, str]) -> None:
        """Serve those bundles under those names, and no others, all from the same moment on.

        Raises:
            BertrayError: one of them does not fit; then nothing changes.
        """
        async with self._changing:
            loaded = {name: await asyncio.to_thread(bundles.load, url) for name, url in urls.items()}
            heads = {name: self.registry.next(name, bundle, urls[name]) for name, bundle in loaded.items()}
            await self._warm(Shelf(heads), list(heads.values()))
            self.registry.replace(heads)

    async def remove(self, name: str) -> None:
        """Serve a head no longer."""
        async with self._changing:
            self.registry.remove(name)

    async def roll_back(self, name: str) -> Head:
        """Serve the version before."""
        async with self._changing:
            return self.registry.roll_back(name)

    async def _warm(self, shelf: Shelf, heads: Sequence[Head]) -> None:
        """Ask heads of what will be served for an answer, so that the first request need not wait for what that takes.

        Raises:
            BundleError: one of them cannot answer.
        """
        for head in heads:
            given = Input(_PROBE, _PROBE if head.bundle.pairs else None)
            try:
                await self.predict(shelf, head, [given], Options(ood=True), self.limits.deadline)
            except (CheckpointError, SpecError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise BundleError(f"{head.url} is damaged: it cannot answer ({error}). Fit it again.") from None

    def _inside(self, path: str) -> str:
        if self.folder is None:
            raise BertrayError("Heads cannot be put here: bertray serve was started without --heads FOLDER.")
        parts = path.split("/")
        if not path or path.startswith(("/", "~")) or {*"\\\0?#%"} & {*path} or {"..", ""} & {*parts}:
            raise BertrayError("bundle must be a path below the folder of --heads, such as mood/head.")
        place = self.folder / path
        if place.local and not Path(place.path).resolve().is_relative_to(Path(self.folder.path).resolve()):
            raise BertrayError(f"{path} leads out of the folder of --heads.")
        return place.url


def _named(given: Input) -> str:
    return f"The text {given.text[:40]!r}" if len(given.text) <= 40 else f"The text {given.text[:40]!r}..."


def _joined(u: Read, v: Read) -> Read:
    """Two texts of a pair that were read apart; their vectors side by side, one below the other."""
    vectors = np.stack([u.vectors, v.vectors])
    return Read(vectors, None, u.tokens + v.tokens, u.truncated or v.truncated)


def _selected(vectors: NDArray[Any], reading: Reading, features: Sequence[str]) -> NDArray[Any]:
    """Of vectors [..., all features of a reading] those of some features."""
    if tuple(features) == reading.features:
        return vectors
    places = [reading.features.index(name) for name in features]
    apart = vectors.reshape(*vectors.shape[:-1], len(reading.features), -1)[..., places, :]
    return apart.reshape(*vectors.shape[:-1], -1)


def _vectors(reading: Reading, bundle: Bundle, reads: Sequence[Read]) -> Any:
    """What a head sees of texts: [n, width], or where it sees their words a list of arrays."""
    chosen = [_selected(read.vectors, reading, bundle.features) for read in reads]
    if bundle.part != "text":
        return chosen
    if bundle.siamese:
        both = np.stack(chosen).astype(np.float32)
        return related(both[:, 0], both[:, 1])
    return np.stack(chosen)


def _classified(bundle: Bundle, vectors: NDArray[Any], options: Options) -> list[dict[str, Any]]:
    logits = bundle.head.logits(vectors)
    scores = answers.scores(bundle, logits)
    if bundle.problem == "regression":
        return [{"value": value} for value in scores[:, 0].tolist()]
    order = (-scores).argsort(axis=1, kind="stable")[:, : options.top_k]
    shown = np.take_along_axis(logits if options.raw_scores else scores, order, 1).tolist()
    key, names = "labels" if bundle.problem == "multi_label" else "label", bundle.labels
    return [
        {key: label, "scores": [{"label": names[i], "score": value} for i, value in zip(places, values, strict=True)]}
        for label, places, values in zip(answers.chosen(bundle, scores), order.tolist(), shown, strict=True)
    ]


def _found(
    bundle: Bundle, vectors: Any, spans: Any, texts: Sequence[str], pairs: Sequence[str]
) -> list[dict[str, Any]]:
    """Entities and answers, as Hugging Face's pipelines name them."""
    labels = labels_of(answers_to(bundle, vectors, spans, texts, pairs if bundle.pairs else None))
    if bundle.task == "question-answering":
        return [
            {"answer": found["text"], "score": found["score"], "start": found["start"], "end": found["stop"]}
            for found in labels
        ]
    return [
        {
            "entities": [
                {
                    "entity_group": entity["label"],
                    "score": entity["score"],
                    "word": entity["text"],
                    "start": entity["start"],
                    "end": entity["stop"],
                }
                for entity in entities
            ]
        }
        for entities in labels
    ]
