"""A linear head of bertray on the encoder that it was fitted on, for transformers 5.

bertray copies this file, as it is, beside weights that no class of transformers fits: heads on a mean or maximum over
tokens, or on several layers side by side. config.json names the classes, so that this loads and answers:

    pipeline(TASK, model=FOLDER, trust_remote_code=True)

The config's `features` are the states that the head's input consists of, in their order: `mean_6` is the mean over the
tokens of the sixth layer's output, `cls_0` that of the embeddings at [CLS], `first_6` that of each token itself. Where
the encoder's family allows it, there are no layers above the highest of them. For inference only: there is no loss.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

_REACH = 12


class BertrayConfig(PreTrainedConfig):
    """encoder: the encoder's own config; features: see above; separator: of questions and texts, the id between
    them."""

    model_type = "bertray"

    def __init__(
        self, encoder: dict[str, Any] | None = None, features: Any = (), separator: int = -1, **kwargs: Any
    ) -> None:
        self.encoder = encoder
        self.features = list(features)
        self.separator = separator
        super().__init__(**kwargs)


class BertrayModel(PreTrainedModel):
    """The encoder, the features of it, and the linear layer on them."""

    config_class = BertrayConfig
    base_model_prefix = "encoder"
    times = 1  # how often a head sees each feature

    def __init__(self, config: BertrayConfig) -> None:
        super().__init__(config)
        self.features = [(name.split("_")[0], int(name.split("_")[1])) for name in config.features]
        self.encoder = AutoModel.from_config(AutoConfig.for_model(**(config.encoder or {})))
        if "pooler" not in dict(self.features) and hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None
        self.head = nn.Linear(self.times * len(self.features) * self.encoder.config.hidden_size, config.num_labels)
        self.post_init()

    def vectors(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[texts, features * width], or [texts, tokens, features * width] for features of each token.

        Args:
            input_ids, attention_mask, token_type_ids: [texts, tokens] each; what the mask leaves out changes nothing.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, **types)
        layers = (*output.hidden_states[:-1], output.last_hidden_state)
        pooler = getattr(output, "pooler_output", None)
        return torch.cat([_pooled(name, layers[layer], mask, pooler) for name, layer in self.features], -1)


def _pooled(name: str, states: torch.Tensor, mask: torch.Tensor, pooler: Any) -> torch.Tensor:
    """[texts, width] of states [texts, tokens, width], or these themselves for `first`."""
    if name == "first":
        return states
    if name == "cls":
        return states[:, 0]
    if name == "pooler":
        return pooler
    weights = mask.unsqueeze(-1).to(states.dtype)
    if name == "mean":
        return (states * weights).sum(1) / weights.sum(1)
    return states.masked_fill(weights == 0, torch.finfo(states.dtype).min).amax(1)


class BertrayForSequenceClassification(BertrayModel):
    """logits: [texts, labels]"""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.vectors(input_ids, attention_mask, token_type_ids)))


class BertrayForTokenClassification(BertrayModel):
    """logits: [texts, tokens, labels]"""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> TokenClassifierOutput:
        return TokenClassifierOutput(logits=self.head(self.vectors(input_ids, attention_mask, token_type_ids)))


class BertrayForQuestionAnswering(BertrayModel):
    """start_logits, end_logits: [texts, tokens]; token 0, [CLS], is "no answer". Those of the question and of
    separators are -10000.

    A token's answer comes from its state u, u * q and n * q, where q is the mean over the question's tokens and n that
    over the token and its neighbours in the text, up to 12 on either side ([CLS] being before the first).
    """

    times = 3

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> QuestionAnsweringModelOutput:
        states = self.vectors(input_ids, attention_mask, token_type_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        apart = (input_ids == self.config.separator).long()
        behind, there = apart.cumsum(1) > 0, (mask > 0) & (apart == 0)
        first = torch.arange(input_ids.shape[1], device=input_ids.device)[None] == 0
        asked, own = there & ~behind & ~first, there & (behind | first)
        question = _mean(states, asked[:, None].to(states.dtype))
        places = own.long().cumsum(1)
        near = own[:, None] & ((places[:, None] - places[:, :, None]).abs() <= _REACH)
        seen = torch.cat([states, states * question, _mean(states, near.to(states.dtype)) * question], -1)
        start, end = self.head(seen).masked_fill(~own[..., None], -10000.0).unbind(-1)
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def _mean(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[texts, n, width] of states [texts, tokens, width] by weights [texts, n, tokens]."""
    return (weights @ states) / weights.sum(-1, keepdim=True).clamp_min(1)


class BertrayTextPipeline(TextClassificationPipeline):
    """transformers' own, but that one would complain of a class that it does not know."""

    def check_model_type(self, supported_models: Any) -> None:
        pass


class BertrayTokenPipeline(TokenClassificationPipeline):
    """transformers' own with two differences: with aggregation_strategy="average" a word's probabilities are those of
    the mean over its tokens (of their states, or what is the same: of their logits), and with is_split_into_words=True
    the words are the ones that were given."""

    def check_model_type(self, supported_models: Any) -> None:
        pass

    def gather_pre_entities(self, *args: Any, word_ids: Any = None, **kwargs: Any) -> Any:
        entities = super().gather_pre_entities(*args, word_ids=word_ids, **kwargs)
        before = None
        for entity in entities if word_ids is not None else ():
            word = word_ids[entity["index"]]
            entity["is_subword"], before = word == before, word
        return entities

    def aggregate_word(self, entities: Any, aggregation_strategy: Any) -> Any:
        if getattr(aggregation_strategy, "value", aggregation_strategy) == "average":
            least = np.finfo(np.float32).tiny
            scores = np.exp(np.mean([np.log(np.maximum(entity["scores"], least)) for entity in entities], 0))
            entities = [{**entity, "scores": scores / scores.sum()} for entity in entities]
        return super().aggregate_word(entities, aggregation_strategy)
