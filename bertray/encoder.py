"""The frozen BERT: texts to one vector each. Knows nothing of Ray, of files of rows, or of heads.

This is the only inference path: stores, batch prediction and serving all call `Encoder.encode`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray.checkpoints import Checkpoint
from bertray.errors import CheckpointError
from bertray.spec import Encoder as EncoderSpec
from bertray.tokens import Tokenizer, Tokens, packs

Vectors = NDArray[np.float32] | NDArray[np.float16]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens that go through the encoder at once: enough to fill the device, little enough to stay in its caches.
_BUDGETS = {"cpu": 4096, "cuda": 65_536}


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
    """A frozen checkpoint on a device, with its tokenizer and pooling."""

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
        self.device = device
        self.precision = precision_on(device) if spec.precision == "auto" else spec.precision
        self.model = _load(checkpoint, spec, _DTYPES[self.precision]).to(device)
        self.tokenizer = Tokenizer(checkpoint.folder, spec.max_length, spec.truncation)
        self.budget = _BUDGETS[device]
        self._pool = POOLINGS[spec.pooling]
        self._stored = torch.float32 if stored_dtype(spec.precision) == "float32" else torch.float16

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        """Vectors of texts, or of pairs, in their order."""
        tokens = self.tokenizer(texts, pairs)
        vectors = torch.empty((len(texts), self.width), dtype=self._stored)
        for rows in packs(tokens.lengths, self.budget):
            vectors[torch.from_numpy(rows)] = self._forward(tokens, rows)
        if not torch.isfinite(vectors).all():
            raise CheckpointError(
                f"Vectors in {self.precision} exceed what can be stored. Set encoder.precision to fp32."
            )
        return Encoded(vectors.numpy(), tokens.lengths, tokens.truncated)

    @torch.inference_mode()
    def _forward(self, tokens: Tokens, rows: NDArray[np.int64]) -> torch.Tensor:
        """One pack: texts of one length, so neither padding nor a mask. Returns [len(rows), width]."""
        positions = tokens.offsets[rows, None] + np.arange(tokens.lengths[rows[0]])
        inputs = {"input_ids": torch.from_numpy(tokens.ids[positions]).to(self.device)}
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.from_numpy(tokens.types[positions]).to(self.device)
        output = self.model(**inputs)
        return self._pool(output.last_hidden_state, output).to(self._stored).cpu()


# Each takes the last hidden state [n, tokens, width] of texts of one length and gives [n, width].
POOLINGS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "pooler": lambda hidden, output: output.pooler_output,
    "cls": lambda hidden, output: hidden[:, 0],
    "mean": lambda hidden, output: hidden.float().mean(1),
    "max": lambda hidden, output: hidden.amax(1),
}


def precision_on(device: str) -> str:
    """The precision that `auto` stands for: bf16 where the device computes in it, else fp16 on GPUs, fp32 on CPUs."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def stored_dtype(precision: str) -> str:
    """The NumPy type that vectors of a precision (as the spec names it) are stored in."""
    return "float32" if precision == "fp32" else "float16"


def _load(checkpoint: Checkpoint, spec: EncoderSpec, dtype: torch.dtype) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(
            checkpoint.folder, dtype=dtype, output_loading_info=True, local_files_only=True
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
    # RoBERTa's kin number positions from padding_idx + 1 on, so their table has rows that no token can use.
    embeddings = getattr(model, "embeddings", None)
    unused = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    limit -= 0 if unused is None else unused + 1
    if spec.max_length > limit:
        raise CheckpointError(
            f"encoder.max_length must be at most {limit} for {checkpoint.name}. Got {spec.max_length} instead."
        )
    return model.eval().requires_grad_(False)
