"""The frozen BERT: texts to one vector each. Knows nothing of Ray, of files of rows, or of heads.

This is the only inference path: stores, batch prediction and serving all call `Encoder.encode`. Texts are tokenized
once and sorted by length inside a large block; a backend runs them in packs without padding; vectors come back in the
order of the texts. While one block is encoded the next is tokenized.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray import backends
from bertray.checkpoints import Checkpoint
from bertray.errors import CheckpointError
from bertray.native import first_position
from bertray.spec import Encoder as EncoderSpec
from bertray.tokens import Tokenizer, Tokens

Vectors = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True)
class Encoded:
    """What encoding n texts gives.

    vectors: [n, width] float32 for fp32, otherwise float16 (finer than bf16; its narrower range is checked).
    tokens: [n] how many tokens each text has.
    truncated: [n] whether it lost its tail.
    """

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]


class Encoder:
    """A frozen checkpoint on a device, with its tokenizer and pooling. Threads may share one: while one of them
    encodes, the others tokenize."""

    def __init__(self, checkpoint: Checkpoint, spec: EncoderSpec, device: str = "cpu", threads: int = 0) -> None:
        """Load the checkpoint.

        Args:
            device: `cpu` or `cuda` (the first one this process sees).
            threads: CPU threads to compute with; 0 leaves torch's default.

        Raises:
            CheckpointError: the checkpoint lacks what the spec asks of it.
        """
        if threads:
            torch.set_num_threads(threads)
            os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's own pool
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        model = _load(checkpoint, spec)
        self.width = int(model.config.hidden_size)
        self.tokenizer = Tokenizer(checkpoint.folder, spec.max_length, spec.truncation)
        self.backend = backends.choose(model, spec.precision, spec.pooling, device, threads)
        self._name, self._stored = checkpoint.name, stored_dtype(spec.precision)
        self._vocabulary = int(model.config.vocab_size)
        self._typed = getattr(model.config, "type_vocab_size", 0) > 1
        self._beginning = Lock()

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        """Vectors of texts, or of pairs, in their order.

        Raises:
            CheckpointError: the texts or their vectors exceed what the checkpoint or the precision can hold.
            SourceError: a text is too long, where that is an error.
        """
        vectors = np.empty((len(texts), self.width), self._stored)
        lengths, truncated = np.empty(len(texts), np.int64), np.empty(len(texts), bool)
        waiting: Callable[[], None] | None = None
        for span, tokens in self._tokenized(texts, pairs):
            lengths[span], truncated[span] = tokens.lengths, tokens.truncated
            with self._beginning:
                begun = self._begin(tokens, vectors[span])
            if waiting:
                waiting()
            waiting = begun
        if waiting:
            waiting()
        return Encoded(vectors, lengths, truncated)

    def _tokenized(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[tuple[slice, Tokens]]:
        """Blocks of texts, each tokenized while the one before is encoded."""
        edges = [*range(0, len(texts), self.backend.block), len(texts)]
        spans = [slice(start, stop) for start, stop in pairwise(edges)]
        with ThreadPoolExecutor(1, "bertray-tokenize") as pool:
            jobs = [pool.submit(self.tokenizer, texts[span], pairs[span] if pairs else None) for span in spans[:2]]
            for number, span in enumerate(spans):
                tokens = jobs.pop(0).result()
                if number + 2 < len(spans):
                    ahead = spans[number + 2]
                    jobs.append(pool.submit(self.tokenizer, texts[ahead], pairs[ahead] if pairs else None))
                yield span, tokens

    def _begin(self, tokens: Tokens, out: Vectors) -> Callable[[], None]:
        """Begin to encode a block into `out`; what is returned waits until it is there."""
        if tokens.ids.max(initial=0) >= self._vocabulary:
            raise CheckpointError(
                f"The tokenizer of {self._name} gives token {tokens.ids.max()}, but its model knows "
                f"{self._vocabulary}. Give a checkpoint whose tokenizer belongs to it."
            )
        if not self._typed:
            tokens.types[:] = 0
        order = np.argsort(-tokens.lengths, kind="stable")
        result = self.backend.start(tokens.take(order))

        def finish() -> None:
            vectors = result()
            with np.errstate(over="ignore"):
                out[order] = vectors
            if not np.isfinite(out).all():
                raise CheckpointError(
                    f"Vectors in {self.backend.precision} exceed what can be stored. Set encoder.precision to fp32."
                )

        return finish


def stored_dtype(precision: str) -> Any:
    """The NumPy type that vectors of a precision (as the spec names it) are stored in."""
    return np.float32 if precision == "fp32" else np.float16


def _load(checkpoint: Checkpoint, spec: EncoderSpec) -> Any:
    """The model in float32 on the CPU, whole and fit for what the spec asks."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds: say what it said
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if "pooler" in key}
    if missing - pooler:
        raise CheckpointError(
            f"{checkpoint.name} lacks weights, such as {min(missing - pooler)}. "
            "Give a checkpoint of an encoder of BERT's family."
        )
    if spec.pooling == "pooler" and (pooler or getattr(model, "pooler", None) is None):
        raise CheckpointError(f"{checkpoint.name} has no trained pooler. Set encoder.pooling to mean, cls or max.")
    limit = getattr(model.config, "max_position_embeddings", spec.max_length)
    limit -= first_position(model)
    if spec.max_length > limit:
        raise CheckpointError(
            f"encoder.max_length must be at most {limit} for {checkpoint.name}. Got {spec.max_length} instead."
        )
    return model.eval().requires_grad_(False)
