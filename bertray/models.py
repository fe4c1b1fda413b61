"""Models: encoder and head as one model of transformers, of the family's own class or of templates/modeling_bertray.py.

Knows nothing of files that are written, or of how exact a model is.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bertray.bundle import Bundle
from bertray.encoder import pretrained
from bertray.parts import Batch, Parts

WRAPPER = Path(__file__).parent / "templates" / "modeling_bertray.py"
_CLASSES = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_PIPELINES = {"text-classification": "BertrayTextPipeline", "token-classification": "BertrayTokenPipeline"}


def stock(parts: Parts) -> Any:
    """The family's own class with the bundle's head in it; None where its head is no single linear layer on the one
    feature of the bundle."""
    import transformers

    bundle = parts.bundle
    wanted = "first" if parts.of_tokens else "pooler"
    if parts.features != ((wanted, parts.depth),) or not parts.last:
        return None
    config = type(parts.config).from_dict({**parts.config.to_dict(), **_labelled(parts)})
    auto = getattr(transformers, f"AutoModel{_CLASSES[bundle.task]}")
    try:
        model = auto.from_pretrained(
            parts.checkpoint.folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # of a head of its own for other labels: the bundle's takes its place
        ).eval()
    except ValueError:  # the family has no such class
        return None
    own = [part for name, part in model.named_children() if name != model.base_model_prefix]
    heads = [part for part in own if not isinstance(part, torch.nn.Dropout)]
    if len(heads) != 1 or not isinstance(heads[0], torch.nn.Linear):
        return None
    return model if _filled(heads[0], bundle) else None


def wrapped(parts: Parts) -> Any:
    """The class of templates/modeling_bertray.py with encoder and head in it."""
    bundle = parts.bundle
    wrapper = _wrapper_module()
    name = f"Bertray{_CLASSES[bundle.task]}"
    unneeded = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")
    encoder = {key: value for key, value in parts.config.to_dict().items() if key not in unneeded}
    features = [f"{'first' if parts.of_tokens else pooling}_{layer}" for pooling, layer in parts.features]
    separator = parts.tokenizer.sep_token_id if bundle.task == "question-answering" else -1
    config = wrapper.BertrayConfig(encoder, features, separator, **_labelled(parts))
    auto = f"AutoModel{_CLASSES[bundle.task]}"
    config.auto_map = {
        "AutoConfig": f"{WRAPPER.stem}.BertrayConfig",
        auto: f"{WRAPPER.stem}.{name}",
    }
    if bundle.task in _PIPELINES:
        config.custom_pipelines = {bundle.task: {"impl": f"{WRAPPER.stem}.{_PIPELINES[bundle.task]}", "pt": [auto]}}
    model = getattr(wrapper, name)(config)
    pooled = getattr(model.encoder, "pooler", None) is not None
    model.encoder, _ = pretrained(parts.checkpoint, "AutoModel", config=parts.config)
    if not pooled and hasattr(model.encoder, "pooler"):
        model.encoder.pooler = None
    _filled(model.head, bundle)
    return model.eval()


def _wrapper_module() -> ModuleType:
    """templates/modeling_bertray.py, from its place: it is copied, so it can import nothing of bertray."""
    spec = importlib.util.spec_from_file_location(WRAPPER.stem, WRAPPER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _labelled(parts: Parts) -> dict[str, Any]:
    """What a config says of labels."""
    problems = {"multi_label": "multi_label_classification", "regression": "regression"}
    problem = problems.get(parts.bundle.problem, "single_label_classification")
    return {
        "id2label": dict(enumerate(parts.labels)),
        "label2id": {label: i for i, label in enumerate(parts.labels)},
        "problem_type": None if parts.of_tokens else problem,
    }


def _filled(linear: torch.nn.Linear, bundle: Bundle) -> bool:
    """Put the bundle's head into a layer, if it fits."""
    weight, bias = (torch.from_numpy(np.array(part, np.float32)) for part in (bundle.head.weight, bundle.head.bias))
    if linear.weight.shape != weight.shape or linear.bias is None:
        return False
    linear.load_state_dict({"weight": weight, "bias": bias})
    return True


def answering(parts: Parts, model: Any) -> Callable[[Batch], torch.Tensor]:
    """From a batch to answers, by a model with a head."""
    return lambda batch: parts.activated(logits(model(**batch)))


def logits(output: Any) -> torch.Tensor:
    """[texts, labels], or [texts, tokens, outputs]."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
