"""Exports: the encoder as ONNX and OpenVINO files for the peers that read those.

Made once, in a process of its own, so that no peer's memory holds what only the export needs.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "benchmarks"
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


class ExportError(Exception):
    """An export failed; says why in one line."""


def path(folder: Path, kind: str) -> Path:
    """The file of that kind (a key of KINDS) for the checkpoint in a folder, made now if need be.

    Raises:
        ExportError: it cannot be made, for example since a package is missing.
    """
    name, _ = KINDS[kind]
    target = FOLDER / _fingerprint(folder) / name
    if not target.exists():
        command = [sys.executable, "-m", "benchmarks.exports", str(folder), kind, str(target)]
        quiet = os.environ | {"NNCF_CI": "1"}  # nncf would report its use to its makers
        made = subprocess.run(command, cwd=FOLDER.parents[1], env=quiet, capture_output=True, text=True)
        if made.returncode:
            raise ExportError((made.stderr.strip().splitlines() or ["the export was killed"])[-1])
    return target


def _fingerprint(folder: Path) -> str:
    """Of the weights and of what exports them, this file included."""
    parts = []
    for file in (folder / "model.safetensors", folder / "config.json", Path(__file__)):
        with file.open("rb") as stream:
            parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
    for package in ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf"):
        found = list(importlib.metadata.distributions(name=package))
        parts.append(found[0].version if found else "")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _graph(folder: Path, target: Path, attention: str = "sdpa") -> None:
    """The encoder up to its last hidden states, for any number of texts and tokens.

    The TorchScript exporter is torch's older one, but onnxruntime knows attention only in the form it gives.
    """
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(INPUTS, inputs, strict=True))).last_hidden_state

    ids = torch.full((2, 16), 1000)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    axes = {name: {0: "texts", 1: "tokens"} for name in [*INPUTS, "hidden"]}
    options = {"input_names": INPUTS, "output_names": ["hidden"], "dynamic_axes": axes, "opset_version": 17}
    torch.onnx.export(Hidden(), (ids, mask, torch.zeros_like(ids)), target, dynamo=False, **options)


def _fused(folder: Path, target: Path) -> None:
    """The graph with onnxruntime's own operators for embeddings, attention, normalisation and GELU."""
    from onnxruntime.transformers import optimizer

    _graph(folder, target, "eager")
    config = json.loads((folder / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    # Level 0: these fusions alone. The session does the rest when it loads the file, for the processor it is on.
    model = optimizer.optimize_model(str(target), "bert", num_heads=heads, hidden_size=width, opt_level=0)
    counts = model.get_fused_operator_statistics()
    if counts["Attention"] != config["num_hidden_layers"]:
        raise ExportError(f"onnxruntime fused {counts['Attention']} of {config['num_hidden_layers']} attentions")
    model.save_model_to_file(str(target))


def _dynamic_int8(folder: Path, target: Path) -> None:
    """onnxruntime's dynamic quantization, with weights scaled by channel: with one scale a matrix it is no faster,
    and the least cosine to fp32 falls from 0.96 to 0.80 on tweets."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        path(folder, "fused"),
        target,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _openvino(folder: Path, target: Path) -> None:
    import openvino

    openvino.save_model(openvino.Core().read_model(path(folder, "graph")), target, compress_to_fp16=False)


def _openvino_int8(folder: Path, target: Path) -> None:
    """Weights in 8 bits by channel; OpenVINO then quantizes the activations itself as it runs."""
    import nncf
    import openvino

    model = nncf.compress_weights(openvino.Core().read_model(path(folder, "graph")))
    openvino.save_model(model, target, compress_to_fp16=False)


KINDS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "graph": ("graph.onnx", _graph),
    "fused": ("fused.onnx", _fused),
    "int8": ("int8.onnx", _dynamic_int8),
    "openvino": ("openvino.xml", _openvino),
    "openvino-int8": ("openvino-int8.xml", _openvino_int8),
}


def _make(folder: Path, kind: str, target: Path) -> None:
    """Make a file whole or not at all, so that a broken export is not taken for a good one."""
    draft = target.with_name(f"draft-{target.name}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind][1](folder, draft)
    if target.suffix == ".xml":  # OpenVINO looks for the weights beside it
        draft.with_suffix(".bin").rename(target.with_suffix(".bin"))
    draft.rename(target)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _make(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
