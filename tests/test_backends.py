"""What runs the layers: each family and each way of packing gives what plain transformers gives."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import ModernBertModel

from bertray import backends, native
from bertray.backends import TorchBackend, VarlenBackend
from bertray.errors import CheckpointError
from bertray.features import Feature, features
from bertray.spec import Pooling
from bertray.tokens import Segments, Tokens

LENGTHS = [70, 33, 33, 32, 17, 16, 15, 5, 2, 1]


def families():
    """Small random encoders of BERT's kin."""
    import transformers as t

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    small = {**sizes, "vocab_size": 200}
    distilbert = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "vocab_size": 200}
    return {
        "bert": (t.BertModel, t.BertConfig(**small)),
        "bert-deep-heads": (t.BertModel, t.BertConfig(**{**small, "num_attention_heads": 4})),
        "bert-relu": (t.BertModel, t.BertConfig(**small, hidden_act="relu")),
        "roberta": (t.RobertaModel, t.RobertaConfig(**small)),
        "xlm-roberta": (t.XLMRobertaModel, t.XLMRobertaConfig(**small)),
        "electra": (t.ElectraModel, t.ElectraConfig(**small, embedding_size=64)),
        "electra-small": (t.ElectraModel, t.ElectraConfig(**small, embedding_size=32)),
        "distilbert": (t.DistilBertModel, t.DistilBertConfig(**distilbert)),
        "modernbert": (t.ModernBertModel, t.ModernBertConfig(**small, pad_token_id=0)),
    }


@pytest.fixture(scope="module", params=list(families()))
def model(request):
    kind, config = families()[request.param]
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that every bias and norm counts
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens_of(lengths, vocabulary=200):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(1).integers(5, vocabulary, offsets[-1])
    return Tokens(ids, np.zeros_like(ids), offsets, np.zeros(len(lengths), bool))


def one_at_a_time(model, tokens, features):
    """[m, features, width] by plain transformers."""
    rows = []
    for text, (start, stop) in enumerate(pairwise(tokens.offsets)):
        with torch.inference_mode():
            output = model(input_ids=torch.from_numpy(tokens.ids[None, start:stop]), output_hidden_states=True)
        parts = [(0, stop - start)]
        if tokens.segments is not None:
            own = slice(tokens.edges[text], tokens.edges[text + 1])
            parts = zip(tokens.segments.starts[own] - start, tokens.segments.stops[own] - start, strict=True)
        for first, last in parts:
            rows.append(torch.stack([pooled(output, feature, first, last) for feature in features]))
    return torch.stack(rows).numpy()


def pooled(output, feature, first, last):
    hidden = output.hidden_states[feature.layer][0, first:last]
    if not len(hidden):
        return torch.zeros(hidden.shape[-1])
    by_name = {"cls": hidden[0], "first": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0)}
    return output.pooler_output[0] if feature.pooling == "pooler" else by_name[feature.pooling]


def in_words(tokens):
    """The same texts, to be pooled by made-up words: of one token or several, some of none, not all tokens covered."""
    starts, stops, edges = [], [], [0]
    for start, stop in pairwise(tokens.offsets):
        place = start + 1
        while place < stop:
            length = place % 4
            starts.append(place)
            stops.append(min(place + length, stop))
            place += max(1, length)
        edges.append(len(starts))
    return replace(tokens, segments=Segments(*map(np.array, (starts, stops, edges, range(len(starts))))))


MEAN = features("mean", "last", 2)
MIXED = (*features(["max", "cls", "mean"], "all", 2), Feature("pooler", 2))


@pytest.fixture(
    params=[*((Feature(pooling, 2),) for pooling in get_args(Pooling)), (Feature("cls", 1),), MIXED], ids=str
)
def wanted(request, model):
    if Feature("pooler", 2) in request.param and getattr(model, "pooler", None) is None:
        pytest.skip(f"{type(model).__name__} has no pooler")
    return request.param


@pytest.fixture(params=["texts", "words"])
def tokens(request, wanted):
    if request.param == "words" and Feature("pooler", 2) in wanted:
        pytest.skip("the pooler is for texts")
    return tokens_of(LENGTHS) if request.param == "texts" else in_words(tokens_of(LENGTHS))


def test_groups_of_one_length(model, wanted, tokens):
    vectors = TorchBackend(model, "fp32", wanted, "cpu").start(tokens)()
    np.testing.assert_allclose(vectors, one_at_a_time(model, tokens, wanted), atol=1e-5)


def test_packed_without_padding(model, wanted, tokens):
    """The layout that CUDA gets, with attention text by text in place of its kernel."""
    if "window" in (reason := backends._why_not_varlen(model)):
        assert isinstance(model, ModernBertModel)
        pytest.skip(reason)
    backend = VarlenBackend(copy.deepcopy(model), "fp32", wanted, "cpu")
    for budget in (4096, 50, 1):
        backend.budget = budget
        np.testing.assert_allclose(backend.start(tokens)(), one_at_a_time(model, tokens, wanted), atol=1e-5)


def test_packed_with_short_texts_in_tiles(model):
    """The same with bertray's kernel for short texts, interpreted without a GPU; the first text alone is too long."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    if "window" in (reason := backends._why_not_varlen(model)):
        pytest.skip(reason)
    backend = VarlenBackend(copy.deepcopy(model).half(), "fp16", MEAN, "cpu", tiled=True)
    tokens = tokens_of(LENGTHS)
    for budget in (4096, 50):
        backend.budget = budget
        np.testing.assert_allclose(backend.start(tokens)(), one_at_a_time(model, tokens, MEAN), atol=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_a_padding_token_in_a_text_keeps_its_place(model, packed):
    """As transformers counts the positions of RoBERTa's kin."""
    reason = backends._why_not_varlen(model) if packed else native.why_not(model)
    if reason and "float32" not in reason:
        pytest.skip(reason)
    tokens = tokens_of(LENGTHS)
    tokens.ids[[3, 75, 76, 223]] = 1
    kind = VarlenBackend if packed else native.NativeBackend
    backend = kind(copy.deepcopy(model), "fp32", MEAN, *(["cpu"] if packed else []))
    np.testing.assert_allclose(backend.start(tokens)(), one_at_a_time(model, tokens, MEAN), atol=1e-4)


def test_families_that_are_not_known_run_as_transformers_runs_them():
    """Some look like BERT and compute more, such as ERNIE's embeddings of tasks; some have layers of their own."""
    import transformers as t

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    small = {**sizes, "vocab_size": 200}
    for kind, config in (
        (t.ErnieModel, t.ErnieConfig(**small, use_task_id=True)),
        (t.RemBertModel, t.RemBertConfig(**small, input_embedding_size=32)),
        (t.DebertaV2Model, t.DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"])),
        (t.MegatronBertModel, t.MegatronBertConfig(**small)),
    ):
        torch.manual_seed(0)
        other = kind(config).eval().requires_grad_(False)
        backend = backends.choose(other, "fp32", MEAN, "cpu")
        tokens = tokens_of(LENGTHS)
        np.testing.assert_allclose(backend.start(tokens)(), one_at_a_time(other, tokens, MEAN), atol=1e-5)
        assert "packed texts apart" in backends._why_not_varlen(other)


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999999), ("int16", 0.9999), ("int8", 0.99)])
def test_native(model, wanted, tokens, precision, least):
    if reason := native.why_not(model):
        pytest.skip(reason)
    vectors = native.NativeBackend(model, precision, wanted, threads=3).start(tokens)()
    expected = one_at_a_time(model, tokens, wanted)
    empty = ~expected.any(-1)
    assert not vectors[empty].any()
    assert backends._least_cosine(vectors[~empty], expected[~empty]) > least
    again = native.NativeBackend(model, precision, wanted, threads=1).start(tokens)()
    np.testing.assert_array_equal(vectors, again)


@pytest.fixture
def small():
    kind, config = families()["bert"]
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False)


class Cramped(torch.nn.Module):
    """A model on a device whose memory holds so many tokens at once."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens, self.config, self.pooler = model, tokens, model.config, model.pooler

    def forward(self, **inputs):
        if inputs["input_ids"].numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(**inputs)


def test_out_of_memory_halves_the_packs_and_goes_on(small, caplog):
    tokens = tokens_of([20] * 40 + [6] * 40)
    backend = TorchBackend(Cramped(small, 150), "fp32", MEAN, "cpu")
    backend.budget = 1000
    np.testing.assert_allclose(backend.start(tokens)(), one_at_a_time(small, tokens, MEAN), atol=1e-5)
    assert 75 <= backend.budget <= 150  # remembered
    caplog.clear()
    backend.start(tokens)()
    assert "out of memory" not in caplog.text
    with pytest.raises(CheckpointError, match="A text of 200 tokens does not fit the memory of the cpu device"):
        backend.start(tokens_of([200]))


def test_auto_is_never_far_from_fp32(small):
    backend = backends.choose(small, "auto", MEAN, "cpu")
    tokens = tokens_of(LENGTHS)
    assert backends._least_cosine(backend.start(tokens)(), one_at_a_time(small, tokens, MEAN)) > 0.999


def test_a_backend_that_differs_is_not_used(small, monkeypatch, caplog):
    class Wrong(TorchBackend):
        def start(self, tokens):
            finish = super().start(tokens)
            return lambda: finish() + 0.3 * np.arange(self._model.config.hidden_size)

    monkeypatch.setattr(backends, "_automatic", lambda model, device: ["bf16", "fp32"])
    right = backends._built
    monkeypatch.setattr(
        backends,
        "_built",
        lambda model, precision, features, *rest: (
            [Wrong(model, "bf16", features, "cpu")] if precision == "bf16" else right(model, precision, features, *rest)
        ),
    )
    assert backends.choose(small, "auto", MEAN, "cpu").precision == "fp32"
    assert "is not used" in caplog.text
    with pytest.raises(CheckpointError, match="precision bf16 gives other vectors than fp32"):
        backends.choose(small, "bf16", MEAN, "cpu")


def test_packed_attention_that_fails_gives_way_and_says_so(small, monkeypatch, caplog):
    class Failing(VarlenBackend):
        def start(self, tokens):
            raise ImportError("No module named 'triton'")

    monkeypatch.setattr(
        backends,
        "_built",
        lambda model, precision, features, device, threads: (
            kind(copy.deepcopy(model), precision, features, device) for kind in (Failing, VarlenBackend, TorchBackend)
        ),
    )
    assert type(backends.choose(small, "fp32", MEAN, "cpu")) is VarlenBackend
    (line,) = (record.message for record in caplog.records)
    assert line == "encoder: fp32 by torch on cpu, packed cannot be used here: No module named 'triton'"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_on_a_gpu(model, precision):
    tokens = tokens_of(LENGTHS)
    last = features("mean", "last", 2)
    backend = backends.choose(model, precision, last, "cuda")
    for budget in (65_536, 50):  # all in tiles; the first text, by itself, too long for them
        backend.budget = budget
        assert backends._least_cosine(backend.start(tokens)(), one_at_a_time(model, tokens, last)) > 0.999
    packs = precision != "fp32" and not isinstance(model, ModernBertModel) and torch.cuda.get_device_capability() > (8,)
    assert backend.name.endswith("packed, short texts in tiles") == packs


@pytest.fixture
def afresh():
    """Whatever is known of this machine is found out again, before and after."""
    for found in (native._library, native.cpu_flags):
        found.cache_clear()
    yield
    for found in (native._library, native.cpu_flags):
        found.cache_clear()


def test_another_processor_gets_torch(small, monkeypatch):
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    assert isinstance(backends.choose(small, "fp32", MEAN, "cpu"), TorchBackend)
    assert isinstance(backends.choose(small, "auto", MEAN, "cpu"), TorchBackend)
    with pytest.raises(CheckpointError, match=r"precision int8 cannot be had here: this processor has no avx512.*auto"):
        backends.choose(small, "int8", MEAN, "cpu")


def test_without_a_compiler_torch_is_used(small, monkeypatch, afresh, caplog):
    if "no avx512" in native.why_not(small):
        pytest.skip(native.why_not(small))
    native._library.cache_clear()
    native._warn.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert native.why_not(small) == "there is no C compiler (cc)"
    assert isinstance(backends.choose(small, "auto", MEAN, "cpu"), TorchBackend)
    assert [record.message for record in caplog.records if "kernels" in record.message] == [
        "encoder: bertray's kernels, about twice as fast as torch here, cannot be used: there is no C compiler (cc)"
    ]


def test_a_compiler_that_fails_says_so(small, monkeypatch, afresh, tmp_path):
    if "no avx512" in native.why_not(small):
        pytest.skip(native.why_not(small))
    native._library.cache_clear()
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho cannot compile this >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cannot compile this" in native.why_not(small)


def test_the_build_is_kept(small, monkeypatch, afresh, tmp_path):
    if reason := native.why_not(small):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        native._library.cache_clear()
        assert native.why_not(small) == ""
        (built,) = (tmp_path / "bertray").glob("native-*.so")
    first = built.stat().st_mtime_ns
    native._library.cache_clear()
    assert native.why_not(small) == ""
    assert built.stat().st_mtime_ns == first


def test_attention_without_lengths_is_an_error():
    empty = torch.zeros(1, 2, 3, 4)
    with pytest.raises(CheckpointError, match="does not hand the texts' lengths"):
        backends._attention(torch.nn.Identity(), empty, empty, empty, None)


@pytest.mark.skipif(bool(native._CPU_FLAGS - native.cpu_flags()), reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize("precision", native.PRECISIONS)
@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_what_is_no_number_stays_none(precision, pooling, activation):
    """A damaged checkpoint must not give vectors that look whole."""
    kind, config = families()["bert"]
    config.hidden_act = activation
    model = kind(config).eval().requires_grad_(False)
    model.embeddings.word_embeddings.weight[7] = float("nan")
    tokens = tokens_of([20, 20])
    tokens.ids[:] = 9
    tokens.ids[0] = 7  # of the first text's first token
    damaged, whole = native.NativeBackend(model, precision, [Feature(pooling, 2)], 1).start(tokens)()
    assert np.isnan(damaged).all()
    assert np.isfinite(whole).all()
