"""Parts: what exports are made of: a bundle and its encoder without the layers above those that it uses.

Tells whether the two belong together. Knows nothing of formats, or of files that are written.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bertray.bundle import Bundle
from bertray.checkpoints import Checkpoint
from bertray.encoder import pretrained
from bertray.errors import BundleError, CheckpointError
from bertray.features import OF_PAIRS, OF_TOKENS, Feature

_POOLINGS = {
    "text-classification": ("pooler", "cls", "mean", "max"),
    "token-classification": ("first", "mean"),
    "question-answering": ("mean",),
}

Batch = dict[str, torch.Tensor]  # what the tokenizer makes of texts, [texts, tokens] each


@dataclass(frozen=True)
class Parts:
    """A bundle and its checkpoint: what all formats are made of. features: those that the bundle names."""

    bundle: Bundle
    features: tuple[Feature, ...]
    checkpoint: Checkpoint

    @property
    def depth(self) -> int:
        """How many layers are needed."""
        return max(feature.layer for feature in self.features)

    @property
    def of_tokens(self) -> bool:
        """Whether there is an answer to each token."""
        return self.bundle.task != "text-classification"

    @property
    def paired(self) -> bool:
        """Whether two texts make one sequence."""
        return self.bundle.task == "question-answering" or (self.bundle.pairs and not self.bundle.siamese)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name of each output of the head."""
        if self.bundle.task == "question-answering":
            return ("start", "end")
        return self.bundle.labels or ("value",) if self.bundle.problem == "regression" else self.bundle.labels

    @property
    def words(self) -> str:
        """Which of its tokens answer for a word: the `first`, or the `mean` of all. A mean of states gives what the
        mean of their logits gives, so in both cases a token has logits of its own."""
        return self.features[0].pooling

    @cached_property
    def config(self) -> Any:
        """The encoder's config without the layers above those that are needed, but with one at least; with all where
        the family's config ties other things to their number."""
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(self.checkpoint.folder)
        cut = AutoConfig.from_pretrained(self.checkpoint.folder, num_hidden_layers=max(1, self.depth))
        try:
            return type(cut).from_dict(cut.to_dict())
        except Exception:  # what a config holds against itself has many kinds
            return whole

    @property
    def last(self) -> bool:
        """Whether the highest layer that is needed is the last that there is in the export."""
        return self.depth == self.config.num_hidden_layers

    @cached_property
    def plain(self) -> Any:
        """The whole encoder as transformers loads it.

        Raises:
            CheckpointError: it cannot be loaded, or its pooler is needed and not trained.
        """
        model, missing = pretrained(self.checkpoint, "AutoModel")
        pooled = any(feature.pooling == "pooler" for feature in self.features)
        if pooled and (getattr(model, "pooler", None) is None or any("pooler" in key for key in missing)):
            raise CheckpointError(f"{self.checkpoint.name} has no trained pooler. Fit on mean, cls or max.")
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's, with the bundle's max_length, and with token types only where the encoder knows them."""
        from transformers import AutoTokenizer

        typed = getattr(self.config, "type_vocab_size", 0) > 1
        names = ["input_ids", "token_type_ids", "attention_mask"] if typed else ["input_ids", "attention_mask"]
        limit = self.bundle.encoder["max_length"]
        tokenizer = AutoTokenizer.from_pretrained(
            self.checkpoint.folder, model_max_length=limit, max_length=limit, model_input_names=names
        )
        backend = tokenizer.backend_tokenizer  # for those who load tokenizer.json with the package tokenizers alone
        backend.enable_truncation(limit)
        backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        return tokenizer

    def check(self) -> None:
        """Whether checkpoint and head belong together.

        Raises:
            BundleError: they do not.
        """
        layers, width = self.checkpoint.layers, self.plain.config.hidden_size
        for feature in self.features:
            if feature.layer > layers or (feature.pooling == "pooler" and feature.layer < layers):
                raise BundleError(
                    f"The bundle uses {feature}, but {self.checkpoint.name} has {layers} layers and a pooler "
                    "on the last at most. Fit it again."
                )
        asked = self.bundle.task == "question-answering"
        parts = OF_PAIRS if self.bundle.siamese else OF_TOKENS if asked else 1  # see features.related
        wanted = (len(self.labels), parts * len(self.features) * width)
        if self.bundle.head.weight.shape != wanted:
            raise BundleError(f"The bundle's weights are {self.bundle.head.weight.shape}, not {wanted}. Fit it again.")

    def activated(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., outputs] what the bundle answers by its logits; of tokens these are the answer."""
        if self.of_tokens or self.bundle.problem == "regression":
            return logits
        return logits.sigmoid() if self.bundle.problem == "multi_label" else logits.softmax(-1)


def features_of(bundle: Bundle) -> tuple[Feature, ...]:
    """The features that a bundle names.

    Raises:
        BundleError: they are none that an export can compute.
    """
    known = _POOLINGS.get(bundle.task)
    if known is None:
        raise BundleError(f"Bundles for {bundle.task} cannot be exported, only those for {', '.join(_POOLINGS)}.")
    found = tuple(re.fullmatch(rf"({'|'.join(known)})_(\d+)", name) for name in bundle.features)
    features = tuple(Feature(match[1], int(match[2])) for match in found if match)
    if not found or len(features) < len(found):
        raise BundleError(
            f"The bundle's features are {', '.join(bundle.features) or 'none'}: {bundle.task} knows "
            f"{', '.join(known)} with the number of a layer. Fit it again."
        )
    if bundle.task == "token-classification" and len({feature.pooling for feature in features}) > 1:
        raise BundleError(
            "A head on first and mean tokens of words at once sees words, which no exported model does. Fit on "
            "features of one of the two."
        )
    return features
