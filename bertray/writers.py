"""Writers: a bundle's parts to the files of a format: transformers, ONNX or sentence-transformers.

Each holds what it makes against plain transformers. Knows nothing of cards, or of folders that hold other things.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray.errors import BertrayError, BundleError
from bertray.models import WRAPPER, answering, logits, stock, wrapped
from bertray.parts import Batch, Parts
from bertray.reference import TOLERANCE, Reference

_ONE_FILE = 1 << 30  # bytes of weights that model.onnx holds itself; protobuf ends at 2 GiB


@dataclass(frozen=True)
class Written:
    """What a writer has made.

    classes: what loads it, by name.
    wrapper: whether that is code in the folder.
    difference: the largest to plain transformers.
    more: what export.json says of it besides.
    """

    classes: str
    wrapper: bool
    difference: float
    more: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """What both its maker and export.json are told."""
        return {"classes": self.classes, "wrapper": self.wrapper, "difference": self.difference}


def _to_transformers(parts: Parts, folder: Path) -> Written:
    """Weights, config and tokenizer: of the family's own class where there is one, else with the wrapper."""
    reference = Reference(parts)
    model, wrapper = stock(parts), False
    difference = np.inf if model is None else reference.difference(answering(parts, model), reference.answers)
    if not difference <= TOLERANCE:
        model, wrapper = wrapped(parts), True
        difference = reference.held(answering(parts, model), reference.answers)
        shutil.copy(WRAPPER, folder / WRAPPER.name)
    model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return Written(type(model).__name__, wrapper, difference, {})


def _to_onnx(parts: Parts, folder: Path) -> Written:
    """model.onnx, with texts and tokens of any number, and the tokenizer."""
    _check_packages()
    import onnxruntime

    reference = Reference(parts)
    batch = reference.batch()
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    output = "logits" if parts.of_tokens else "values" if parts.bundle.problem == "regression" else "probabilities"
    path = folder / "model.onnx"
    _write_graph(parts, {name: batch[name] for name in names}, output, path)
    session = onnxruntime.InferenceSession(path)

    def run(batch: Batch) -> NDArray[np.float32]:
        return session.run([output], {name: batch[name].numpy() for name in names})[0]

    difference = reference.held(run, reference.answers)
    parts.tokenizer.save_pretrained(folder)
    more = {"inputs": names, "output": output}
    return Written("onnxruntime.InferenceSession", False, difference, more)


class _Graph(torch.nn.Module):
    """What model.onnx computes: answers to texts, or logits of tokens."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model = wrapped(parts)
        self.activated = parts.activated

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Of input_ids, attention_mask and maybe token_type_ids, [texts, tokens] each."""
        return self.activated(logits(self.model(*inputs)))


def _check_packages() -> None:
    """Whether what makes and runs graphs is installed.

    Raises:
        BertrayError: it is not.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise BertrayError(f"--format onnx needs {package}, which is not installed: pip install 'bertray[export]'")


def _write_graph(parts: Parts, inputs: Batch, output: str, path: Path) -> None:
    """Have torch trace the model over inputs, of which texts and tokens may be of any number.

    Raises:
        BundleError: torch cannot.
    """
    graph = _Graph(parts).eval()
    size = sum(weights.nbytes for weights in graph.parameters())
    try:
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(tuple({0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")} for _ in inputs),),
            external_data=size > _ONE_FILE,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds: say what it said
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"torch cannot make a graph of {parts.checkpoint.name}: {reason}") from error


def _to_sentence_transformers(parts: Parts, folder: Path) -> Written:
    """Transformer and Pooling, and for the pooler a Dense: they give the vectors. The head is no part of it."""
    bundle = parts.bundle
    poolings = [pooling for pooling, _ in parts.features]
    layers = {layer for _, layer in parts.features}
    if parts.of_tokens or len(layers) > 1 or not parts.last or ("pooler" in poolings and len(poolings) > 1):
        raise BundleError(
            f"sentence-transformers pools the last layer of an encoder for a vector a text, which "
            f"{', '.join(bundle.features)} of {parts.checkpoint.name} is not. "
            "Export with --format transformers or onnx."
        )
    model = wrapped(parts)
    difference = Reference(parts).held(lambda batch: model.vectors(**batch), lambda vectors: vectors)
    modules = ["Transformer", "Pooling"]
    if poolings == ["pooler"]:
        modules.append("Dense")
        poolings = ["cls"]
        _write_pooler(model.encoder, folder / "2_Dense")
    model.encoder.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(modules[1:], 1))]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(modules, paths, strict=True))
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": bundle.encoder["max_length"]})
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(poolings, parts.config.hidden_size))
    return Written(" + ".join(modules), False, difference, {})


def _pooling_config(poolings: Sequence[str], width: int) -> dict[str, Any]:
    """What Pooling reads: as all its versions do where its own order of poolings is the bundle's."""
    if list(poolings) != sorted(poolings):
        return {"embedding_dimension": width, "pooling_mode": list(poolings)}
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
    return {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{name}": pooling in poolings for pooling, name in names.items()},
    }


def _write_pooler(encoder: Any, folder: Path) -> None:
    """BERT's pooler, a dense layer and tanh over [CLS], as a Dense module."""
    from safetensors.torch import save_file

    dense = getattr(encoder.pooler, "dense", None)
    if not isinstance(dense, torch.nn.Linear) or not isinstance(
        getattr(encoder.pooler, "activation", None), torch.nn.Tanh
    ):
        raise BundleError(
            f"The pooler of {type(encoder).__name__} is not BERT's dense layer and tanh, which alone "
            "sentence-transformers can hold. Export with --format transformers or onnx."
        )
    width = dense.out_features
    tanh = "torch.nn.modules.activation.Tanh"
    config = {"in_features": width, "out_features": width, "bias": True, "activation_function": tanh}
    _write_json(folder / "config.json", config)
    weights = {f"linear.{name}": values.contiguous() for name, values in dense.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


WRITERS: dict[str, Callable[[Parts, Path], Written]] = {
    "transformers": _to_transformers,
    "onnx": _to_onnx,
    "sentence-transformers": _to_sentence_transformers,
}
