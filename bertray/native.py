"""The backend for CPUs with AVX-512 VNNI: native.c, built on first use with the machine's own C compiler.

Runs encoders of BERT's own layout (BERT, RoBERTa and XLM-R, ELECTRA, MiniLM, ...). Knows nothing of tokenizers, and of
checkpoints only the loaded model.
"""

import copy
import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray.cache import home
from bertray.clock import Stopwatch
from bertray.features import Feature
from bertray.progress import log
from bertray.tokens import Tokens

PRECISIONS = ("fp32", "int16", "int8")  # in the order of native.c's numbers
_LARGEST = {"int16": 2047, "int8": 127}
_TYPES = {"fp32": np.float32, "int16": np.int16, "int8": np.int8}
_ACTIVATIONS = {"gelu": 1, "relu": 2}
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # that native.c computes, and tests hold it to
_POOLINGS = {"cls": 0, "first": 0, "mean": 1, "max": 2, "pooler": 3}
_COLUMNS = 32
# Tokens that go through the layers together: few enough for a core's second cache, many enough to use each weight
# that comes from the third often.
_SLAB = 448
_LEAST_SLAB = 56  # fewer are not worth a thread
BLOCK = 8192  # texts that are sorted and packed together
_CPU_FLAGS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"}
_COMPILER_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-O3", "-std=gnu11")
_BUILD_SECONDS = 120


class _Linear(ctypes.Structure):
    _fields_ = [
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "sums")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        *((name, _Norm) for name in ("attention", "output")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("precision", "activation", "layers", "width", "heads", "inner", "first_position")
        ),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("words", "positions", "types")),
        ("embeddings", _Norm),
        ("pooler", _Linear),
        ("layer", ctypes.POINTER(_Layer)),
        ("features", ctypes.c_int32),
        ("at", ctypes.c_void_p),
        ("pooling", ctypes.c_void_p),
    ]


def why_not(model: Any) -> str:
    """Why this machine or backend cannot run a loaded model; empty if it can."""
    if missing := _CPU_FLAGS - cpu_flags():
        return f"this processor has no {min(missing)}"
    config = model.config
    if getattr(config, "is_decoder", False):
        return "it is a decoder"
    if config.model_type not in FAMILIES or hasattr(model.encoder.layer[0], "crossattention"):
        return f"{type(model).__name__} has not BERT's own layers"
    if getattr(model, "embeddings_project", None) is not None:
        return "its embeddings are narrower than its layers"
    if config.hidden_act not in _ACTIVATIONS:
        return f"its activation is {config.hidden_act}"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return "its positions are relative"
    if config.hidden_size % _COLUMNS or config.intermediate_size % _COLUMNS:
        return f"its widths are no multiples of {_COLUMNS}"
    if config.hidden_size // config.num_attention_heads % 16:
        return "the width of its heads is no multiple of 16"
    if reason := _library()[1]:
        _warn(reason)
    return reason


@cache
def _warn(reason: str) -> None:  # once
    log.warning("encoder: bertray's kernels, about twice as fast as torch here, cannot be used: %s", reason)


def first_position(model: Any) -> int:
    """The row of a loaded model's position table that a text's first token takes: RoBERTa's kin number positions from
    padding_idx + 1 on, so their table has rows that no token can use."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@cache
def _library() -> tuple[Any, str]:
    """The compiled library, or why there is none."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "there is no C compiler (cc)"
    source = Path(__file__).with_name("native.c")
    key = hashlib.sha256(source.read_bytes() + repr((compiler, _COMPILER_FLAGS)).encode()).hexdigest()[:16]
    try:
        built = home() / f"native-{key}.so"
        if not built.exists():
            _build(compiler, source, built)
        library = ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {error.stderr.decode(errors='replace').strip().splitlines()[-1:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"it cannot be built: {error}"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.scratch_bytes.argtypes, library.scratch_bytes.restype = (pointer, number, number), number
    texts, segments = (pointer, pointer, pointer, number), (pointer, pointer, number)
    library.encode.argtypes = (pointer, *texts, *segments, pointer, pointer, pointer)
    library.encode.restype = None
    return library, ""


def _build(compiler: str, source: Path, built: Path) -> None:
    """Other processes may build the same at the same time: the last to end replaces a file that is equal."""
    partial = built.with_name(f"{built.name}.{os.getpid()}.{threading.get_ident()}")
    command = [compiler, *_COMPILER_FLAGS, "-shared", "-fPIC", str(source), "-o", str(partial), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
        partial.replace(built)
    finally:
        partial.unlink(missing_ok=True)


class NativeBackend:
    """An encoder whose weights are laid out for native.c, on a number of threads."""

    def __init__(self, model: Any, precision: str, features: Sequence[Feature], threads: int = 0) -> None:
        """Copy a loaded model (float32, see `why_not`) into the layout and precision that native.c takes; of its layers
        those that the features need."""
        self.name = f"{precision} by bertray's kernels for AVX-512 VNNI"
        self.precision = precision
        self.block = BLOCK
        self.budget = _SLAB
        self.steps, self.busy = 0, Stopwatch()
        self._counting = threading.Lock()
        self.width = int(model.config.hidden_size)
        self._library = _library()[0]
        self._arrays: list[NDArray[Any]] = []  # what the pointers below point to
        layers = model.encoder.layer[: max(feature.layer for feature in features)]
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._model = self._laid_out(model)
        self._give(features)
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "bertray-native")
        self._local = threading.local()

    def giving(self, features: Sequence[Feature]) -> "NativeBackend":
        """The same weights and threads, giving other features of the layers that are laid out."""
        other = copy.copy(self)
        other._give(features)
        return other

    def _give(self, features: Sequence[Feature]) -> None:
        layers, poolings = (
            np.array(each, np.int32)
            for each in zip(*((feature.layer, _POOLINGS[feature.pooling]) for feature in features), strict=True)
        )
        self._features, self._given = tuple(features), (layers, poolings)
        self._model = _Model.from_buffer_copy(self._model)
        self._model.layers, self._model.features = int(layers.max()), len(features)
        self._model.at, self._model.pooling = layers.ctypes.data, poolings.ctypes.data

    def start(self, tokens: Tokens) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode texts sorted by falling length; what is returned waits for the vectors of their segments
        [m, features, width]."""
        vectors = np.empty((tokens.edges[-1], len(self._features), self.width), np.float32)
        share = -(-len(tokens.ids) // self._threads)
        slab = min(_SLAB, max(_LEAST_SLAB, share))
        jobs = [self._pool.submit(self._encode, tokens, start, end, vectors) for start, end in tokens.packs(slab)]

        def finish() -> NDArray[np.float32]:
            for job in jobs:
                job.result()
            return vectors

        return finish

    def _encode(self, tokens: Tokens, start: int, stop: int, vectors: NDArray[np.float32]) -> None:
        first, model = tokens.offsets[start], ctypes.byref(self._model)
        offsets = tokens.offsets[start : stop + 1] - first
        size = self._library.scratch_bytes(model, int(offsets[-1]), int(tokens.lengths[start:stop].max()))
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.nbytes < size:
            scratch = self._local.scratch = np.empty(size, np.uint8)
        ids, types, out = tokens.ids[first:], tokens.types[first:], tokens.edges[start]
        segments = [None, None, 0]
        if tokens.segments is not None:
            own = slice(out, tokens.edges[stop])
            starts, stops = tokens.segments.starts[own] - first, tokens.segments.stops[own] - first
            segments = [starts.ctypes.data, stops.ctypes.data, len(starts)]
        firsts = np.arange(len(offsets))
        with self.busy:
            self._library.encode(
                model,
                ids.ctypes.data,
                types.ctypes.data,
                offsets.ctypes.data,
                stop - start,
                *segments,
                firsts.ctypes.data,
                vectors[out:].ctypes.data,
                scratch.ctypes.data,
            )
        with self._counting:
            self.steps += 1

    # --- layout -------------------------------------------------------------------------------------------

    def _laid_out(self, model: Any) -> _Model:
        config, embeddings = model.config, model.embeddings
        pooler = getattr(model, "pooler", None)
        return _Model(
            PRECISIONS.index(self.precision),
            _ACTIVATIONS[config.hidden_act],
            len(self._layers),
            self.width,
            config.num_attention_heads,
            config.intermediate_size,
            first_position(model),
            config.layer_norm_eps,
            self._floats(embeddings.word_embeddings.weight),
            self._floats(embeddings.position_embeddings.weight),
            self._floats(embeddings.token_type_embeddings.weight),
            self._norm(embeddings.LayerNorm),
            self._linear("fp32", pooler.dense) if pooler is not None else _Linear(),
            self._layers,
        )

    def _layer(self, layer: Any) -> _Layer:
        attention, precision = layer.attention, self.precision
        heads = attention.self
        return _Layer(
            self._linear(precision, heads.query, heads.key, heads.value),
            self._linear(precision, attention.output.dense),
            self._linear(precision, layer.intermediate.dense),
            self._linear(precision, layer.output.dense),
            self._norm(attention.output.LayerNorm),
            self._norm(layer.output.LayerNorm),
        )

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._floats(norm.weight), self._floats(norm.bias))

    def _linear(self, precision: str, *parts: Any) -> _Linear:
        """Linear layers side by side as one: each output's weights rounded to its own scale, in words of 4 bytes."""
        weight = torch.cat([part.weight for part in parts]).detach().float().numpy()
        outputs, inputs = weight.shape
        scale = np.abs(weight).max(1) / _LARGEST.get(precision, 1)
        if precision != "fp32":
            weight = np.rint(weight / np.where(scale > 0, scale, 1)[:, None])
        kind = _TYPES[precision]
        a_word = 4 // np.dtype(kind).itemsize
        words = weight.astype(kind).reshape(outputs // _COLUMNS, _COLUMNS, inputs // a_word, a_word)
        return _Linear(
            outputs,
            inputs,
            self._pointer(words.transpose(0, 2, 1, 3)),
            self._pointer(scale.astype(np.float32)),
            self._floats(torch.cat([part.bias for part in parts])),
            self._pointer(weight.sum(1, dtype=np.float64).astype(np.float32)),
        )

    def _floats(self, tensor: torch.Tensor) -> int:
        return self._pointer(tensor.detach().float().numpy())

    def _pointer(self, array: NDArray[Any]) -> int:
        self._arrays.append(np.ascontiguousarray(array))
        return int(self._arrays[-1].ctypes.data)
