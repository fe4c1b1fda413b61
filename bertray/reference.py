"""Reference: what plain transformers answers to a few texts, one at a time, and how far an export is from that.

Knows nothing of how exports are made, nor of files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray.errors import BundleError
from bertray.features import related, with_surroundings
from bertray.parts import Batch, Parts

TOLERANCE = 1e-4  # of probabilities; of logits and vectors as a part of the largest, if that is over 1
_SAMPLE = (
    ("a plain text", "of a few words"),
    ("Nobody could say why the 12 trains, all of them late, were unbelievably full that day.", "They were."),
    ("yes", "A second text, which is the longer one of the two: what comes of it?"),
)


@dataclass(frozen=True)
class Reference:
    """The whole encoder, as transformers loads it, with the bundle's head behind it."""

    parts: Parts

    def batch(self) -> Batch:
        """The sample, padded."""
        texts = [[pair[side] for pair in _SAMPLE] for side in range(1 + self.parts.paired)]
        return dict(self.parts.tokenizer(*texts, truncation=True, padding=True, return_tensors="pt"))

    def answers(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., outputs] of vectors: logits for tokens, else what the bundle answers."""
        logits = torch.from_numpy(vectors @ self.parts.bundle.head.weight.T + self.parts.bundle.head.bias)
        return self.parts.activated(logits).numpy()

    @torch.inference_mode()
    def difference(self, run: Callable[[Batch], Any], of: Callable[[NDArray[np.float32]], Any]) -> float:
        """The largest difference, on the sample, between what an export makes of the padded texts, and plain
        transformers of each alone.

        Args:
            run: from a batch to [texts, outputs], or [texts, tokens, outputs].
            of: from vectors to the same of one text.
        """
        batch, worst = self.batch(), 0.0
        for row, (found, mask) in enumerate(zip(run(batch), batch["attention_mask"].bool(), strict=True)):
            expected = of(self._vectors({name: values[row : row + 1, mask] for name, values in batch.items()}))
            kept = mask & self._own(batch["input_ids"][row])
            found = np.asarray(found)[kept.numpy()] if self.parts.of_tokens else np.asarray(found)
            worst = max(worst, float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())))
        return worst

    def held(self, run: Callable[[Batch], Any], of: Callable[[NDArray[np.float32]], Any]) -> float:
        """The same, where it is small enough.

        Raises:
            BundleError: it is over TOLERANCE.
        """
        difference = self.difference(run, of)
        if not difference <= TOLERANCE:
            raise BundleError(
                f"{self.parts.checkpoint.name}, cut after layer {self.parts.depth} and with padding, answers otherwise "
                f"than alone, by {difference:.2g}. Fit on a checkpoint of BERT's family."
            )
        return difference

    @torch.inference_mode()
    def _vectors(self, inputs: Batch) -> NDArray[np.float32]:
        """What the head is put on, by plain transformers: [features * width] of a text, or [tokens, ...] of its tokens.

        Args:
            inputs: of one text, [1, tokens] each, without padding.
        """
        output = self.parts.plain(**inputs, output_hidden_states=True)
        pooled = {
            "first": lambda states: states,
            "cls": lambda states: states[0],
            "mean": lambda states: states if self.parts.of_tokens else states.mean(0),
            "max": lambda states: states.amax(0),
            "pooler": lambda states: output.pooler_output[0],
        }
        found = torch.cat([pooled[name](output.hidden_states[at][0]) for name, at in self.parts.features], -1).numpy()
        return self._related(found, inputs) if self.parts.bundle.task == "question-answering" else found

    def _related(self, states: NDArray[np.float32], inputs: Batch) -> NDArray[np.float32]:
        """[own tokens, 3 * width] of a question and its text: see `answers.logits`."""
        ids = inputs["input_ids"][0]
        question = states[1 : int((ids == self.parts.tokenizer.sep_token_id).nonzero()[0])].mean(0, keepdims=True)
        own = np.concatenate([question, states[self._own(ids).numpy()]])[:, None]
        both = with_surroundings(own, np.array([0, len(own)]))[1:]
        return related(both[:, 0], np.repeat(question, len(both), 0), both[:, 1])

    def _own(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., tokens] which of them answer: of a question and its text [CLS] and the text's tokens, else all."""
        if self.parts.bundle.task != "question-answering":
            return torch.ones_like(ids, dtype=torch.bool)
        apart = ids == self.parts.tokenizer.sep_token_id
        found = (apart.cumsum(-1) > 0) & ~apart
        found[..., 0] = True
        return found
