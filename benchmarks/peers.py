"""Peers: what a user could encode texts with instead. Each gives the mean over a text's tokens, not normalized.

Each is set up as its own documentation recommends, and where that leaves a choice takes what is fastest on the texts
at hand. Nothing of a peer's package is imported before that peer is made.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks import exports

Vectors = NDArray[np.float32]
_LENGTH = 512  # most tokens a text may have


class UnavailableError(Exception):
    """This peer cannot run here; says why in one line."""


class Peer(Protocol):
    """What is measured.

    precision: what it multiplies matrices in.
    sizes: sizes of batches that it may take; size: the one it takes.
    fed: tokens that the last call gave to the encoder, padding included.
    """

    precision: str
    sizes: Sequence[int]
    size: int
    fed: int

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, width] of n texts, in their order."""
        ...


class Notebook:
    """The seed notebook's loop: batches in the order of the rows, padded to the longest text of each."""

    precision = "fp32"
    sizes = (32,)

    def __init__(self, folder: Path, device: str, threads: int, size: int = 32) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(threads)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._device, self.size, self.fed = device, size, 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        import torch

        self.fed = 0
        vectors = []
        for start in range(0, len(texts), self.size):
            batch = list(texts[start : start + self.size])
            inputs = self._tokenizer(batch, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
            self.fed += inputs["input_ids"].numel()
            with torch.no_grad():
                hidden = self._model(**inputs.to(self._device)).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            vectors.append(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())
        return np.concatenate(vectors)


class SentenceTransformers:
    """`encode` of sentence-transformers; with its defaults unless told otherwise."""

    def __init__(self, folder: Path, device: str, threads: int, half: bool = False) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        torch.set_num_threads(threads)
        encoder = Transformer(str(folder), max_seq_length=_LENGTH)
        pooling = Pooling(encoder.model.config.hidden_size, "mean")
        self._model = SentenceTransformer(modules=[encoder, pooling], device=device)
        self._model = self._model.half() if half else self._model
        self._model[0].register_forward_pre_hook(self._count)
        self.precision = "fp16" if half else "fp32"
        self.sizes = (32, 128, 256) if half else (32,)
        self.size, self.fed = 32, 0

    def _count(self, module: Any, inputs: tuple[dict[str, Any]]) -> None:
        self.fed += inputs[0]["input_ids"].numel()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.fed = 0
        return self._model.encode(list(texts), batch_size=self.size, show_progress_bar=False)


class OnnxRuntime:
    """onnxruntime on CPUs: a graph that its own optimizer has fused, in fp32 or with its dynamic quantization."""

    sizes = (8, 16, 32)

    def __init__(self, folder: Path, device: str, threads: int, kind: str, precision: str) -> None:
        _only_on_cpu(device)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = exports.path(folder, kind)
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._names = [item.name for item in self._session.get_inputs()]
        self._tokenizer = _tokenizer(folder)
        self.precision, self.size, self.fed = precision, 32, 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.fed = 0
        vectors: dict[int, Vectors] = {}
        for rows, inputs in _batches(self._tokenizer, texts, self.size):
            self.fed += inputs["input_ids"].size
            hidden = self._session.run(None, {name: inputs[name] for name in self._names})[0]
            vectors.update(zip(rows, _mean(hidden, inputs["attention_mask"]), strict=True))
        return np.stack([vectors[row] for row in range(len(texts))])


class OpenVino:
    """OpenVINO on CPUs in the precision that it chooses itself, set up for throughput: batches run side by side."""

    sizes = (8, 16, 32)

    def __init__(self, folder: Path, device: str, threads: int, kind: str) -> None:
        _only_on_cpu(device)
        import openvino

        config = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": threads}
        self._model = openvino.compile_model(exports.path(folder, kind), "CPU", config)
        self._queue = openvino.AsyncInferQueue(self._model)
        self._queue.set_callback(self._collect)
        self._tokenizer = _tokenizer(folder)
        self._vectors: dict[int, Vectors] = {}
        computed = {"f32": "fp32", "f16": "fp16"}
        name = self._model.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision = "int8" if kind.endswith("int8") else computed.get(name, name)
        self.size, self.fed = 32, 0

    def _collect(self, request: Any, batch: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
        rows, mask = batch
        self._vectors.update(zip(rows, _mean(request.get_output_tensor().data, mask), strict=True))

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.fed, self._vectors = 0, {}
        for rows, inputs in _batches(self._tokenizer, texts, self.size):
            self.fed += inputs["input_ids"].size
            self._queue.start_async({name: inputs[name] for name in exports.INPUTS}, (rows, inputs["attention_mask"]))
        self._queue.wait_all()
        return np.stack([self._vectors[row] for row in range(len(texts))])


def tune(peer: Peer, texts: Sequence[str]) -> None:
    """Settle on the size of batches, of those that the peer may take, that is fastest on a sample of the texts."""
    if len(peer.sizes) < 2:
        return
    sample = texts[:: max(1, len(texts) // (4 * max(peer.sizes)))]
    peer.size = min(peer.sizes, key=lambda size: _seconds(peer, size, sample))


def _seconds(peer: Peer, size: int, texts: Sequence[str]) -> float:
    """The shortest of three times that a peer takes with batches of that size."""
    peer.size = size
    times = []
    for _ in range(3):
        started = time.perf_counter()
        peer(texts)
        times.append(time.perf_counter() - started)
    return min(times)


def _only_on_cpu(device: str) -> None:
    if device != "cpu":
        raise UnavailableError("it is measured on CPUs alone")


def _tokenizer(folder: Path) -> Any:
    """Hugging Face's tokenizer without transformers and torch, which these peers do not need."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_LENGTH)
    tokenizer.enable_padding()
    return tokenizer


def _batches(tokenizer: Any, texts: Sequence[str], size: int) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """Batches by falling length in characters, as sentence-transformers cuts them: rows, and inputs padded to
    [texts, tokens]."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    for start in range(0, len(texts), size):
        rows = order[start : start + size]
        encoded = tokenizer.encode_batch_fast([texts[row] for row in rows])
        lists = ([item.ids, item.attention_mask, item.type_ids] for item in encoded)
        yield rows, dict(zip(exports.INPUTS, np.array(list(lists), np.int64).transpose(1, 0, 2), strict=True))


def _mean(hidden: Vectors, mask: NDArray[np.int64]) -> Vectors:
    """The mean over tokens: hidden [texts, tokens, width], mask [texts, tokens], gives [texts, width]."""
    weights = (mask / mask.sum(1, keepdims=True)).astype(np.float32)
    return np.matmul(weights[:, None, :], hidden)[:, 0]


def _sentence_transformers_fp16(folder: Path, device: str, threads: int) -> Peer:
    if device != "cuda":
        raise UnavailableError("it is measured on GPUs alone")
    return SentenceTransformers(folder, device, threads, half=True)


# name: what makes the peer from the folder of a checkpoint, a device (`cpu` or `cuda`) and a number of threads.
PEERS: dict[str, Callable[[Path, str, int], Peer]] = {
    "notebook": Notebook,
    "sentence-transformers": SentenceTransformers,
    "sentence-transformers-fp16": _sentence_transformers_fp16,
    "onnxruntime-fp32": partial(OnnxRuntime, kind="fused", precision="fp32"),
    "onnxruntime-int8": partial(OnnxRuntime, kind="int8", precision="int8"),
    "openvino": partial(OpenVino, kind="openvino"),
    "openvino-int8": partial(OpenVino, kind="openvino-int8"),
}
