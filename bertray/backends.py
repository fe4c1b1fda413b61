"""Backends: what runs an encoder's layers on a device in a precision. Packs of token ids in, pooled vectors out.

Which one runs what is decided by measurement (benchmarks/RESULTS.md): native.c where the processor and the encoder's
layers allow it, else torch. On CUDA texts are packed without padding and attention keeps them apart; a CPU gets packs
of one length each, which need neither padding nor a mask. Each is held against fp32 on made-up texts before it is used.
Knows nothing of texts, files or Ray.
"""

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bertray import native
from bertray.clock import Stopwatch
from bertray.errors import CheckpointError
from bertray.features import Feature
from bertray.progress import log
from bertray.tokens import Tokens

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens that go through the encoder at once: enough to fill the device, little enough to stay in its caches.
_BUDGETS = {"cpu": 4096, "cuda": 65_536}
# Texts that are sorted and packed together: on CUDA a few packs of short ones, so that even a unit of 20,000 rows has
# several blocks, of which one is prepared and one is brought back while another is encoded.
_BLOCKS = {"cpu": native.BLOCK, "cuda": 8192}
_ATTENTION = "bertray_varlen"
_PACKED = (*native.FAMILIES, "distilbert")  # families in which nothing but attention goes across tokens
_SHORT = 64  # tokens a text, on average, up to which they share tiles in attention: longer ones fill those of their own
_FIDELITY = 0.999  # least cosine to fp32 that `auto` takes
_SAME = 0.9  # a lower one is no matter of precision: the backend does not fit the model


class Backend(Protocol):
    """name: what it is, for logs and reports; precision: what it computes in; block: texts to hand over at once;
    steps: how many packs went through the layers so far; busy: the time in which some did; budget: tokens of a pack."""

    name: str
    precision: str
    block: int
    steps: int
    busy: Stopwatch
    budget: int

    def start(self, tokens: Tokens) -> Callable[[], NDArray[Any]]:
        """Begin to encode texts sorted by falling length; the result, once called, waits for the vectors of their
        segments [m, features, width]."""
        ...

    def giving(self, features: Sequence[Feature]) -> "Backend":
        """The same weights, giving other features of the layers that are loaded."""
        ...


def choose(model: Any, precision: str, features: Sequence[Feature], device: str, threads: int = 0) -> Backend:
    """The fastest backend for a loaded model (float32, on the CPU) in a precision, or for `auto` in the fastest one
    that keeps a cosine of 0.999 to fp32.

    Raises:
        CheckpointError: the precision cannot be had on this device.
    """
    wanted = _automatic(model, device) if precision == "auto" else [precision]
    samples = _samples(model)
    reference = TorchBackend(model, "fp32", features, "cpu")
    expected = [reference.start(sample)() for sample in samples]
    for candidate in wanted:
        least = _FIDELITY if precision == "auto" and candidate != "fp32" else _SAME
        for backend in _built(model, candidate, features, device, threads):
            try:
                cosine = min(map(_least_cosine, [backend.start(sample)() for sample in samples], expected))
            except Exception as error:  # compilers and drivers raise many kinds: say what they said
                if not isinstance(backend, VarlenBackend):  # no other will do it
                    raise
                log.warning("encoder: %s cannot be used here: %s", backend.name, " ".join(str(error).split())[:300])
                continue
            if cosine >= least:
                log.debug("encoder: %s, cosine to fp32 at least %.5f on a sample", backend.name, cosine)
                return backend
            log.warning("encoder: %s has a cosine of %.4f to fp32 here and is not used", backend.name, cosine)
    raise CheckpointError(f"encoder.precision {precision} gives other vectors than fp32 on {device}. Set it to fp32.")


def _automatic(model: Any, device: str) -> list[str]:
    """The precisions that `auto` may stand for, the fastest first."""
    if device == "cuda":
        return ["bf16", "fp16", "fp32"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16", "fp32"]
    bf16 = ["bf16"] if _gain_of_bf16() > 1.3 else []
    integers = [] if native.why_not(model) else ["int16"]  # twice the rate of fp32
    if "amx_bf16" in native.cpu_flags():  # told and not timed: processes that answer together must choose alike
        return [*bf16, *integers, "fp32"]
    return [*integers, *bf16, "fp32"]


def _gain_of_bf16(size: int = 512) -> float:
    """How many times faster than float32 this CPU multiplies bfloat16 matrices: that it can does not say that it
    gains by it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _built(model: Any, precision: str, features: Sequence[Feature], device: str, threads: int) -> Iterator[Backend]:
    """What may run a model in a precision, the fastest first; each is built when those before cannot be used."""
    reason = "it is for CPUs" if device != "cpu" else native.why_not(model)
    if precision in native.PRECISIONS and not reason:
        yield native.NativeBackend(model, precision, features, threads)
        if precision != "fp32":  # which torch computes too
            return
    if precision not in _DTYPES:
        raise CheckpointError(f"encoder.precision {precision} cannot be had here: {reason}. Set it to auto.")
    if (device, precision) != ("cpu", "fp32"):  # as it came; other candidates may need it like that
        model = copy.deepcopy(model).to(device, _DTYPES[precision])
    if device == "cuda":
        if reason := _why_not_varlen(model):
            log.warning("encoder: texts are grouped by length, since packed attention cannot be used: %s", reason)
        else:
            plain = model.config._attn_implementation
            yield VarlenBackend(model, precision, features, device, tiled=True)
            yield VarlenBackend(model, precision, features, device)
            model.set_attn_implementation(plain)
    yield TorchBackend(model, precision, features, device)


def _samples(model: Any) -> list[Tokens]:
    """Made-up texts to compare backends on, each sorted by falling length: short ones, and longer ones."""
    rng = np.random.default_rng(0)
    limit = int(getattr(model.config, "max_position_embeddings", None) or 512) - native.first_position(model)
    found = []
    for lengths in ([48, 31, 31, 12, 5, 3], [150, 70]):
        offsets = np.cumsum([0, *np.minimum(lengths, limit)])
        ids = rng.integers(0, model.config.vocab_size, offsets[-1])
        found.append(Tokens(ids, np.zeros_like(ids), offsets, np.zeros(len(lengths), bool)))
    return found


def _least_cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(norms, 1e-30)).min())


class TorchBackend:
    """Any encoder of transformers, a pack of texts of one length at a time."""

    equal = True

    def __init__(self, model: Any, precision: str, features: Sequence[Feature], device: str) -> None:
        self.precision = precision
        self.name = f"{precision} by torch on {device}"
        self.block = _BLOCKS[device]
        self.budget = _BUDGETS[device]
        self.steps, self.busy = 0, Stopwatch()
        self._model, self._device = model, device
        self._pooler = getattr(model, "pooler", None)
        self._give(features)
        self._types = getattr(model.config, "type_vocab_size", 0) > 1

    def giving(self, features: Sequence[Feature]) -> "TorchBackend":
        """The same model, giving other features."""
        other = copy.copy(self)
        other._give(features)
        return other

    def _give(self, features: Sequence[Feature]) -> None:
        self._features = tuple(features)
        self._layers = sorted({feature.layer for feature in features})

    @torch.inference_mode()
    def start(self, tokens: Tokens) -> Callable[[], NDArray[Any]]:
        """Begin to encode texts sorted by falling length. On CUDA this returns while the device works."""
        if self._device == "cpu":
            with self.busy:
                return self._vectors(tokens).numpy
        begun, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        vectors = self._vectors(tokens)
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        copied.record()

        def finish() -> NDArray[Any]:
            copied.synchronize()
            self.busy.add(begun.elapsed_time(copied) / 1000)  # blocks follow one another on the device's one stream
            return host.numpy()

        return finish

    def _vectors(self, tokens: Tokens) -> torch.Tensor:
        ids, types = self._moved(tokens.ids), self._moved(tokens.types)
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(tokens.truncated):
            end = tokens.pack_end(start, self.budget, self.equal)
            try:
                parts.append(
                    self._pooled(self._states(ids, types, tokens.offsets[start : end + 1]), tokens, start, end)
                )
                start = end
                self.steps += 1
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._halve(end - start, int(tokens.offsets[end] - tokens.offsets[start]))
        # Vectors leave the device in the precision that is stored.
        return torch.cat(parts).to(_stored(self.precision))

    def _moved(self, array: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)

    def _halve(self, texts: int, tokens: int) -> None:
        """The device is out of memory: this pack and all later ones become smaller."""
        if texts == 1:
            raise CheckpointError(
                f"A text of {tokens} tokens does not fit the memory of the {self._device} device. "
                "Lower encoder.max_length, or take a smaller encoder or precision."
            )
        if self._device == "cuda":
            torch.cuda.empty_cache()
        self.budget = tokens // 2
        log.warning("encoder: out of memory on %s; packs now hold %d tokens", self._device, self.budget)

    def _states(self, ids: torch.Tensor, types: torch.Tensor, offsets: NDArray[np.int64]) -> dict[int, torch.Tensor]:
        """layer -> states [tokens, width] of texts of one length, for the layers that features need."""
        texts = len(offsets) - 1
        span = slice(int(offsets[0]), int(offsets[-1]))
        inputs = {"input_ids": ids[span].view(texts, -1)}
        if self._types:
            inputs["token_type_ids"] = types[span].view(texts, -1)
        return self._run(inputs)

    def _run(self, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        last = int(self._model.config.num_hidden_layers)
        if self._layers == [last]:
            states = {last: self._model(**inputs).last_hidden_state}
        else:
            every = self._model(**inputs, output_hidden_states=True).hidden_states
            states = {layer: every[layer] for layer in self._layers}
        return {layer: hidden.reshape(-1, hidden.shape[-1]) for layer, hidden in states.items()}

    def _pooled(self, states: dict[int, torch.Tensor], tokens: Tokens, start: int, end: int) -> torch.Tensor:
        """[m, features, width] of the segments of texts start to end."""
        pool = self._of_texts(tokens, start, end) if tokens.segments is None else self._of_words(tokens, start, end)
        return torch.stack([pool(states[layer], pooling).float() for pooling, layer in self._features], 1)

    def _of_texts(self, tokens: Tokens, start: int, end: int) -> Callable[[torch.Tensor, str], torch.Tensor]:
        # Sorted by length: each run of one length is a rectangle.
        lengths = tokens.lengths[start:end].tolist()
        shapes = [(length, len(list(run))) for length, run in groupby(lengths)]

        def pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
            runs = hidden.split([length * texts for length, texts in shapes])
            parts = (run.view(texts, length, -1) for run, (length, texts) in zip(runs, shapes, strict=True))
            return torch.cat([_pool_texts(part, pooling, self._pooler) for part in parts])

        return pool

    def _of_words(self, tokens: Tokens, start: int, end: int) -> Callable[[torch.Tensor, str], torch.Tensor]:
        segments, own = tokens.segments, slice(tokens.edges[start], tokens.edges[end])
        assert segments is not None
        counts = segments.stops[own] - segments.starts[own]
        behind = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(
            segments.starts[own] - tokens.offsets[start] - behind + counts, counts
        )
        moved, lengths = self._moved(places), self._moved(counts)
        return lambda hidden, pooling: _pool_words(hidden[moved], lengths, pooling)


def _pool_texts(hidden: torch.Tensor, pooling: str, pooler: Any) -> torch.Tensor:
    """[n, width] of states [n, tokens, width]."""
    if pooling == "pooler":
        return pooler(hidden)
    if pooling == "mean":
        return hidden.float().mean(1)
    return hidden.amax(1) if pooling == "max" else hidden[:, 0]


def _pool_words(hidden: torch.Tensor, counts: torch.Tensor, pooling: str) -> torch.Tensor:
    """[m, width] of the states of segments one after another, so many each; zeros of those that have none."""
    if not len(hidden):
        return hidden.new_zeros(len(counts), hidden.shape[-1])
    if pooling in ("cls", "first"):
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:1])])
        first = (counts.cumsum(0) - counts).masked_fill(counts == 0, len(hidden) - 1)
        return hidden[first]
    pooled = torch.segment_reduce(hidden.float(), pooling, lengths=counts, axis=0)
    return pooled.masked_fill((counts == 0)[:, None], 0)


class VarlenBackend(TorchBackend):
    """Texts of any lengths one after another in one row, without padding; attention knows where each begins and ends.

    transformers gives the lengths to the attention function and nowhere else, so it has to be one of our own:
    without a mask of its own making, other attention would run across texts.
    """

    equal = False

    def __init__(
        self, model: Any, precision: str, features: Sequence[Feature], device: str, tiled: bool = False
    ) -> None:
        """Take a model of that precision on that device.

        Args:
            tiled: whether short texts share the tiles of bertray's own kernel for attention.
        """
        super().__init__(model, precision, features, device)
        self.name += ", packed, short texts in tiles" if tiled else ", packed"
        model.set_attn_implementation(_registered_attention())
        self._first_position = native.first_position(model)
        self._tiled = tiled

    def _states(self, ids: torch.Tensor, types: torch.Tensor, offsets: NDArray[np.int64]) -> dict[int, torch.Tensor]:
        """layer -> states [tokens, width] of texts sorted by falling length."""
        span = slice(int(offsets[0]), int(offsets[-1]))
        offsets = offsets - offsets[0]
        edges = self._moved(offsets)
        longest = int(offsets[1])
        tokens = torch.arange(int(offsets[-1]), device=self._device)
        behind = torch.searchsorted(edges, tokens, right=True)
        starts = edges[behind - 1]
        # RoBERTa's kin number tokens from behind that of the padding, which keeps its place where a text has it.
        real = ids[span] != self._first_position - 1 if self._first_position else torch.ones_like(tokens)
        counts = real.cumsum(0)
        positions = (counts - (counts - real.long())[starts]) * real + self._first_position - 1
        inputs: dict[str, Any] = {"input_ids": ids[None, span], "position_ids": positions[None]}
        if self._types:
            inputs["token_type_ids"] = types[None, span]
        if self._tiled and offsets[-1] <= _SHORT * (len(offsets) - 1):
            inputs["text_bounds"] = starts.to(torch.int32), edges[behind].to(torch.int32)
        edges = edges.to(torch.int32)
        inputs |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
        return self._run(inputs)


def _why_not_varlen(model: Any) -> str:
    """Why texts cannot be packed for a model; empty if they can."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    if any(getattr(model.config, name, None) for name in ("sliding_window", "local_attention")):
        return f"some layers of {type(model).__name__} attend within a window"
    if model.config.model_type not in _PACKED:  # others may have ways of their own for a token to see those beside it
        return f"{type(model).__name__} is not known to keep packed texts apart"
    if model.dtype == torch.float32:
        return "it has no float32"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than its kernels"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return ""


def _registered_attention() -> str:
    """The name under which transformers finds attention over packed texts."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    return _ATTENTION


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    text_bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each of the texts that lie one after another.

    Args:
        query, key, value: [1, heads, tokens, depth] each.
        cu_seq_lens_q: [texts + 1] where each text begins, and the end.
        max_length_q: tokens of the longest.
        text_bounds: [tokens] each, where the text of each token starts and ends, if texts are to share tiles.

    Returns:
        [1, tokens, heads, depth], and no weights.
    """
    if cu_seq_lens_q is None:
        raise CheckpointError(f"{type(module).__name__} does not hand the texts' lengths to its attention.")
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if text_bounds is not None:
        from bertray import attention

        return attention.within_texts(query, key, value, *text_bounds, scale).unsqueeze(0), None
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        packed: Any = varlen_attn(
            query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scale
        )
        return packed.unsqueeze(0), None
    out = torch.empty_like(query)
    for start, stop in pairwise(cu_seq_lens_q.tolist()):  # without a GPU: for tests
        q, k, v = (part[start:stop].transpose(0, 1)[None] for part in (query, key, value))
        out[start:stop] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out.unsqueeze(0), None


def _stored(precision: str) -> torch.dtype:
    """The type that vectors of a precision are stored in: float16 is finer than bf16, and its range is checked."""
    return torch.float32 if precision == "fp32" else torch.float16


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
