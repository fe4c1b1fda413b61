"""One text through the layers of a BERT, with all that it passes through kept: for looking, not for speed.

BERT's own layers (Devlin et al. 2019: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, MiniLM) are written out and
read a layer at a time; other encoders, such as ModernBERT, run in transformers, whose import alone takes longer.
Tests hold both against plain transformers.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bertray.checkpoints import Checkpoint
from bertray.errors import CheckpointError
from bertray.weights import Weights

TABLES = {  # of the embeddings: how their names end
    "token": ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight"),
    "position": ("embeddings.position_embeddings.weight",),
    "type": ("embeddings.token_type_embeddings.weight",),
}
_BERT = {
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attended": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_DISTIL = {
    "layers": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attended": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm": "output_layer_norm",
}
_OWN = {name: _BERT for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra")} | {"distilbert": _DISTIL}
_SHIFTED = {"roberta", "xlm-roberta", "camembert"}  # positions count from behind the padding's
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Passage:
    """What a text of T tokens passes through.

    parts: [T, E] each: what the tables `token`, `position` and `type` (those that there are) give.
    states: L + 1 of [T, W]: what the layers are given, and what each makes of it. Where the embeddings are as wide as
        the layers, the first is the layer norm of the parts' sum.
    attention: L of [heads, T, T]: how much of each token (column) goes into which (row); rows sum to 1. Empty where it
        was not to be kept, or the encoder does not tell.
    pooled: [W] what the pooler gives: tanh of a dense layer on the last state of the first token; None without one.
    """

    parts: dict[str, Tensor]
    states: list[Tensor]
    attention: list[Tensor]
    pooled: Tensor | None


def config_of(checkpoint: Checkpoint) -> Any:
    """A checkpoint's config, as transformers reads it.

    Raises:
        CheckpointError: it cannot be read, or is of no encoder of BERT's family.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds: say what it said
        raise CheckpointError(
            f"{checkpoint.name} cannot be looked into: {' '.join(str(error).split())[:200]}"
        ) from error
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type not in ENCODERS or decodes:
        raise CheckpointError(
            f"{checkpoint.name} is no encoder of BERT's family but a {config.model_type}. "
            "Give one, such as google-bert/bert-base-uncased."
        )
    return config


def first_position(config: Any) -> int:
    """The row of the position table that a text's first token takes."""
    return int(config.pad_token_id) + 1 if config.model_type in _SHIFTED else 0


def table(weights: Weights, kind: str) -> str:
    """The name of a checkpoint's table of `token`, `position` or `type` embeddings; empty if it has none."""
    return next(filter(None, map(weights.name, TABLES[kind])), "")


def passage(
    checkpoint: Checkpoint,
    config: Any,
    weights: Weights,
    ids: Sequence[int],
    types: Sequence[int],
    keep: bool = True,
    gradient: bool = False,
) -> Passage:
    """Take a text through the layers.

    Args:
        ids, types: [T] of its tokens.
        keep: whether to keep the attention, which takes L * heads * T * T numbers.
        gradient: whether states are to be differentiated by `parts["token"]`.

    Raises:
        CheckpointError: weights are missing.
    """
    with torch.set_grad_enabled(gradient):
        parts = _parts(config, weights, ids, types)
        parts["token"].requires_grad_(gradient)
        if _written_out(config, weights):
            return _through_layers(config, weights, parts, keep)
        return _through_transformers(checkpoint, types, parts, keep)


def _written_out(config: Any, weights: Weights) -> bool:
    return (
        config.model_type in _OWN
        and (getattr(config, "position_embedding_type", None) or "absolute") == "absolute"
        and _activation(config) in _ACTIVATIONS
        and bool(table(weights, "position"))
    )


def _parts(config: Any, weights: Weights, ids: Sequence[int], types: Sequence[int]) -> dict[str, Tensor]:
    first = first_position(config)
    rows = {"token": ids, "position": range(first, first + len(ids)), "type": types}
    found = {}
    for kind, own in rows.items():
        if name := table(weights, kind):
            last = weights.shapes[name][0] - 1
            found[kind] = weights.rows(name, [min(row, last) for row in own] if kind == "type" else list(own))
    if "token" not in found:
        raise CheckpointError("This checkpoint has no table of token embeddings that bertray knows.")
    return found


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "activation", ""))


def _through_layers(config: Any, weights: Weights, parts: dict[str, Tensor], keep: bool) -> Passage:
    epsilon = float(getattr(config, "layer_norm_eps", 1e-12))
    names = _OWN[config.model_type]
    prefix = table(weights, "token").removesuffix(TABLES["token"][0])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    try:
        x = norm(torch.stack(list(parts.values())).sum(0), "embeddings.LayerNorm")
        if f"{prefix}embeddings_project.weight" in weights.shapes:  # ELECTRA's are narrower than its layers
            x = linear(x, "embeddings_project")
        states, attention = [x], []
        for layer in range(config.num_hidden_layers):
            own = {key: f"{names['layers']}.{layer}.{name}" for key, name in names.items()}
            q, k, v = (_heads(linear(x, own[key]), config.num_attention_heads) for key in ("query", "key", "value"))
            looks = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [heads, T, T]
            mixed = (looks @ v).transpose(0, 1).flatten(1)
            x = norm(x + linear(mixed, own["out"]), own["attended"])
            inner = _ACTIVATIONS[_activation(config)](linear(x, own["up"]))
            x = norm(x + linear(inner, own["down"]), own["norm"])
            states.append(x)
            attention += [looks] if keep else []
        has_pooler = f"{prefix}pooler.dense.weight" in weights.shapes
        pooled = linear(x[0], "pooler.dense").tanh() if has_pooler else None
    except KeyError as error:
        raise CheckpointError(f"The checkpoint lacks weights, such as {error.args[0]}.") from None
    return Passage(parts, states, attention, pooled)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[heads, T, W / heads] of [T, W]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _through_transformers(
    checkpoint: Checkpoint, types: Sequence[int], parts: dict[str, Tensor], keep: bool
) -> Passage:
    from bertray.encoder import load

    model, facts = load(checkpoint, attention="eager" if keep else "")
    given = {"inputs_embeds": parts["token"][None]}
    if facts.typed and "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = torch.tensor([list(types)])
    output = model(**given, output_hidden_states=True, output_attentions=keep)
    looks = [map_[0] for map_ in (getattr(output, "attentions", None) or ()) if map_ is not None] if keep else []
    pooled = getattr(output, "pooler_output", None) if facts.pooler else None
    states = [*(state[0] for state in output.hidden_states[:-1]), output.last_hidden_state[0]]
    return Passage(parts, states, looks, None if pooled is None else pooled[0])
