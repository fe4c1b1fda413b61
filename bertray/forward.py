"""One text through the layers of a BERT, with all that it passes through kept: for looking, not for speed.

BERT's own layers (Devlin et al. 2019: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, MiniLM) are written out and
read a layer at a time; other encoders, such as ModernBERT, run in transformers, whose import alone takes longer.
Tests hold both against plain transformers.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
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
TESTED = {*_OWN, "modernbert"}
# RoBERTa's kin, whose positions count from behind that of the padding, which stands at no place.
_SHIFTED = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text", "ibert"}
_SHIFTED |= {"longformer", "mpnet", "luke", "esm", "xmod"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Passage:
    """What a text of T tokens passes through.

    parts: [T, E] each: what the tables `token`, `position` and `type` (those that there are) give.
    normalized: [T, E] the layer norm of their sum.
    states: L + 1 of [T, W]: what the first layer is given, which is `normalized`, or in ELECTRA's small ones a
        projection of it; and what each layer makes of it.
    attention: L of [heads, T, T]: how much of each token (column) goes into which (row); rows sum to 1. Empty where it
        was not to be kept, or the encoder does not tell.
    pooled: [W] what the pooler gives: tanh of a dense layer on the last state of the first token; None without one.
    """

    parts: dict[str, Tensor]
    normalized: Tensor
    states: list[Tensor]
    attention: list[Tensor]
    pooled: Tensor | None

    def vector(self, pooling: str, layer: int) -> Tensor:
        """[W] the text as one vector: what `features.Feature` names. With `pooler` there has to be one."""
        if pooling == "pooler":
            assert self.pooled is not None
            return self.pooled
        state = self.states[layer]
        return state.mean(0) if pooling == "mean" else state.amax(0) if pooling == "max" else state[0]


class Layers:
    """A checkpoint that texts are taken through. What it takes is read when it is first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def config(self) -> Any:
        """The checkpoint's config, as transformers reads it.

        Raises:
            CheckpointError: it cannot be read, or is of no encoder of BERT's family.
        """
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        name = self._checkpoint.name
        try:
            config = AutoConfig.from_pretrained(self._checkpoint.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds: say what it said
            raise CheckpointError(f"{name} cannot be looked into: {' '.join(str(error).split())[:200]}") from error
        decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        if config.model_type not in ENCODERS or decodes:
            raise CheckpointError(
                f"{name} is no encoder of BERT's family but a {config.model_type}. "
                "Give one, such as google-bert/bert-base-uncased."
            )
        return config

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's weights."""
        return Weights(self._checkpoint.folder)

    @cached_property
    def _model(self) -> Any:
        from bertray.encoder import load

        return load(self._checkpoint, attention="eager")

    @property
    def limit(self) -> int:
        """Tokens of a text that it can read; 0 where nothing limits them."""
        positions = getattr(self.config, "max_position_embeddings", None) or 0
        return max(0, int(positions) - self.first_position)

    @property
    def typed(self) -> bool:
        """Whether it tells the texts of a pair apart."""
        return (getattr(self.config, "type_vocab_size", 0) or 0) > 1

    @property
    def first_position(self) -> int:
        """The row of the position table that a text's first token takes."""
        padding = self.config.pad_token_id
        return 0 if padding is None or self.config.model_type not in _SHIFTED else int(padding) + 1

    def positions(self, ids: Sequence[int]) -> list[int]:
        """[T] rows of the position table that tokens take."""
        if not self.first_position:
            return list(range(len(ids)))
        padding = int(self.config.pad_token_id)
        counts = accumulate(number != padding for number in ids)
        return [padding + count * (number != padding) for number, count in zip(ids, counts, strict=True)]

    def table(self, kind: str) -> str:
        """The name of the table of `token`, `position` or `type` embeddings; empty if there is none."""
        return next(filter(None, map(self.weights.name, TABLES[kind])), "")

    def passage(self, ids: Sequence[int], types: Sequence[int], keep: bool = True, gradient: bool = False) -> Passage:
        """Take a text through the layers.

        Args:
            ids, types: [T] of its tokens.
            keep: whether to keep the attention, which takes L * heads * T * T numbers.
            gradient: whether states are to be differentiated by `parts["token"]`.

        Raises:
            CheckpointError: weights are missing.
        """
        with torch.set_grad_enabled(gradient):
            parts = self._parts(ids, types)
            parts["token"].requires_grad_(gradient)
            return (self._written_out if self._is_written_out else self._by_transformers)(parts, types, keep)

    def _parts(self, ids: Sequence[int], types: Sequence[int]) -> dict[str, Tensor]:
        rows = {"token": ids, "position": self.positions(ids), "type": types}
        found = {kind: self.weights.rows(name, own) for kind, own in rows.items() if (name := self.table(kind))}
        if "token" not in found:
            raise CheckpointError(f"{self._checkpoint.name} has no table of token embeddings that bertray knows.")
        return found

    @property
    def _is_written_out(self) -> bool:
        config = self.config
        return (
            config.model_type in _OWN
            and (getattr(config, "position_embedding_type", None) or "absolute") == "absolute"
            and self._activation in _ACTIVATIONS
            and bool(self.table("position"))
        )

    @property
    def _activation(self) -> str:
        return str(getattr(self.config, "hidden_act", None) or getattr(self.config, "activation", ""))

    def _written_out(self, parts: dict[str, Tensor], types: Sequence[int], keep: bool) -> Passage:
        config, weights = self.config, self.weights
        names, epsilon = _OWN[config.model_type], float(getattr(config, "layer_norm_eps", 1e-12))
        prefix = self.table("token").removesuffix(TABLES["token"][0])

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            weight, bias = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

        try:
            normalized = x = norm(torch.stack(list(parts.values())).sum(0), "embeddings.LayerNorm")
            if f"{prefix}embeddings_project.weight" in weights.shapes:  # ELECTRA's are narrower than its layers
                x = linear(x, "embeddings_project")
            states, attention = [x], []
            for layer in range(config.num_hidden_layers):
                own = {key: f"{names['layers']}.{layer}.{name}" for key, name in names.items()}
                q, k, v = (_heads(linear(x, own[key]), config.num_attention_heads) for key in ("query", "key", "value"))
                looks = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [heads, T, T]
                mixed = (looks @ v).transpose(0, 1).flatten(1)
                x = norm(x + linear(mixed, own["out"]), own["attended"])
                inner = _ACTIVATIONS[self._activation](linear(x, own["up"]))
                x = norm(x + linear(inner, own["down"]), own["norm"])
                states.append(x)
                attention += [looks] if keep else []
            has_pooler = f"{prefix}pooler.dense.weight" in weights.shapes
            pooled = linear(x[0], "pooler.dense").tanh() if has_pooler else None
        except KeyError as error:
            raise CheckpointError(f"{self._checkpoint.name} lacks weights, such as {error.args[0]}.") from None
        return Passage(parts, normalized, states, attention, pooled)

    def _by_transformers(self, parts: dict[str, Tensor], types: Sequence[int], keep: bool) -> Passage:
        model, facts = self._model
        given = {"inputs_embeds": parts["token"][None]}
        if facts.typed and "token_type_ids" in inspect.signature(model.forward).parameters:
            given["token_type_ids"] = torch.tensor([list(types)])
        output = model(**given, output_hidden_states=True, output_attentions=keep)
        attention = [looks[0] for looks in getattr(output, "attentions", None) or () if looks is not None]
        pooled = getattr(output, "pooler_output", None) if facts.pooler else None
        states = [*(state[0] for state in output.hidden_states[:-1]), output.last_hidden_state[0]]
        return Passage(parts, states[0], states, attention, None if pooled is None else pooled[0])


def _heads(x: Tensor, heads: int) -> Tensor:
    """[heads, T, W / heads] of [T, W]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)
