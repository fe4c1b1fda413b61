"""What a BERT was pretrained to do: fill masked words, and tell whether one sentence follows another (Devlin et al.
2019), where its checkpoint still has the heads for it. Runs in transformers."""

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from bertray.checkpoints import Checkpoint
from bertray.errors import CheckpointError
from bertray.weights import Weights

# A weight that only the head has which scores the vocabulary, in BERT, RoBERTa, DistilBERT, ELECTRA's generator and
# ModernBERT. The scoring itself is mostly by the table of tokens.
_FILLS = (
    "cls.predictions.transform.dense.weight",
    "lm_head.dense.weight",
    "vocab_transform.weight",
    "generator_predictions.dense.weight",
    "decoder.bias",
)
_FOLLOWS = "cls.seq_relationship.weight"
_FOLLOWING = ("bert", "big_bird", "ernie", "megatron-bert", "mobilebert")  # families that were pretrained on that
_DISCRIMINATES = "discriminator_predictions.dense.weight"


class Answers(NamedTuple):
    """fills: for each masked token the most probable [token id, probability]; follows: how probable it is that the
    second text follows the first, or None."""

    fills: list[list[tuple[int, float]]]
    follows: float | None


class Heads:
    """The heads that a checkpoint was pretrained with.

    no_fills, no_follows: why it cannot fill masked words, or tell whether a text follows another; empty where it can.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Weights, family: str) -> None:
        """Look which heads there are, by the names of the weights.

        Args:
            family: the type of the model, such as `bert`.
        """
        self._checkpoint = checkpoint
        lacks = f"{checkpoint.name} came without the head for it, as encoders do that were trained further."
        self.no_fills = "" if any(name in weights.shapes for name in _FILLS) else lacks
        if self.no_fills and _DISCRIMINATES in weights.shapes:
            self.no_fills = "This is ELECTRA's discriminator, which tells replaced words: its generator fills masks."
        self.no_follows = "" if _FOLLOWS in weights.shapes else lacks
        if self.no_follows and family not in _FOLLOWING:
            self.no_follows = f"No {family} was pretrained on that."

    def answers(self, ids: Sequence[int], types: Sequence[int], masked: Sequence[int], most: int) -> Answers:
        """What the heads that there are make of a text or a pair.

        Args:
            masked: places of the masked tokens.
            most: candidates for each of them.

        Raises:
            CheckpointError: the checkpoint cannot be loaded with its heads.
        """
        output = _output(self._model, ids, types)
        fills = []
        scores = output.get("prediction_logits", output.get("logits"))
        for place in masked if not self.no_fills else ():
            best = scores[0, place].float().softmax(-1).topk(most)
            fills.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        follows = output.get("seq_relationship_logits", output.get("logits"))
        return Answers(fills, None if self.no_follows else float(follows.softmax(-1)[0, 0]))

    @cached_property
    def _model(self) -> Any:
        from bertray.encoder import pretrained

        kind = "AutoModelForMaskedLM"
        if not self.no_follows:
            kind = "AutoModelForNextSentencePrediction" if self.no_fills else "AutoModelForPreTraining"
        model, missing = pretrained(self._checkpoint, kind)
        if lacking := {weight for weight in missing if "pooler" not in weight}:
            raise CheckpointError(f"{self._checkpoint.name} lacks weights, such as {min(lacking)}.")
        return model


def _output(model: Any, ids: Sequence[int], types: Sequence[int]) -> Any:
    given = {"input_ids": torch.tensor([list(ids)])}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = torch.tensor([list(types)])
    with torch.no_grad():
        return model(**given)
