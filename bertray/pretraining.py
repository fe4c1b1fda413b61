"""What a BERT was pretrained to do: fill masked words, and tell whether one sentence follows another (Devlin et al.
2019), where its checkpoint still has the heads for it. Runs in transformers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bertray.checkpoints import Checkpoint
from bertray.errors import CheckpointError
from bertray.weights import Weights

# How the weights are called that give a score to each token of the vocabulary, in BERT, RoBERTa, DistilBERT, ELECTRA's
# generator and ModernBERT; others have them tied to the table of tokens, and tell by what stands before that.
_FILLS = (
    "cls.predictions.transform.dense.weight",
    "lm_head.dense.weight",
    "vocab_transform.weight",
    "generator_predictions.dense.weight",
    "head.dense.weight",
)
_FOLLOWS = "cls.seq_relationship.weight"


class Tasks(NamedTuple):
    """fills: whether it can fill masked words; follows: whether it can tell if a sentence follows another."""

    fills: bool
    follows: bool


def tasks(weights: Weights) -> Tasks:
    """What a checkpoint has heads for, by the names of its weights."""
    fills = any(name in weights.shapes for name in _FILLS)
    return Tasks(fills, _FOLLOWS in weights.shapes)


class Answers(NamedTuple):
    """fills: for each masked token the most probable [token id, probability]; follows: how probable it is that the
    second text follows the first, or None."""

    fills: list[list[tuple[int, float]]]
    follows: float | None


def answers(
    checkpoint: Checkpoint, can: Tasks, ids: Sequence[int], types: Sequence[int], masked: Sequence[int], most: int
) -> Answers:
    """What the heads of a checkpoint make of a text or a pair.

    Args:
        can: what it has heads for; for what it has not, or is not asked, the answer is empty.
        masked: places of the masked tokens.
        most: candidates for each of them.

    Raises:
        CheckpointError: it cannot be loaded with its heads.
    """
    output = _output(_model(checkpoint, can), ids, types)
    fills = []
    scores = output.get("prediction_logits", output.get("logits"))
    for place in masked if can.fills else ():
        best = scores[0, place].float().softmax(-1).topk(most)
        fills.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    follows = output.get("seq_relationship_logits", None if can.fills else output.get("logits"))
    return Answers(fills, float(follows.softmax(-1)[0, 0]) if can.follows and follows is not None else None)


def _model(checkpoint: Checkpoint, can: Tasks) -> Any:
    from transformers import AutoModelForMaskedLM, AutoModelForNextSentencePrediction, AutoModelForPreTraining
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind = AutoModelForMaskedLM
    if can.follows:
        kind = AutoModelForPreTraining if can.fills else AutoModelForNextSentencePrediction
    try:
        model, info = kind.from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds: say what it said
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if lacking := {name for name in info["missing_keys"] if "pooler" not in name}:
        raise CheckpointError(f"{checkpoint.name} lacks weights, such as {min(lacking)}.")
    return model.eval()


def _output(model: Any, ids: Sequence[int], types: Sequence[int]) -> Any:
    import inspect

    given = {"input_ids": torch.tensor([list(ids)])}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = torch.tensor([list(types)])
    with torch.no_grad():
        return model(**given)
