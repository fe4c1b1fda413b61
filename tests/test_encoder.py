"""The encoder against plain transformers, one text at a time."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bertray.checkpoints import find
from bertray.encoder import Encoder
from bertray.errors import CheckpointError, SourceError
from bertray.features import Feature
from bertray.native import NativeBackend
from bertray.spec import Encoder as EncoderSpec

POOLINGS = ("pooler", "cls", "mean", "max")


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def ragged(lengths):
    """Texts of 1 to 510 words of one token, so 3 to 512 tokens, in no order; and empty and odd ones."""
    words = ["cat", "dog", "sun", "tree", "house", "water", "the", "green"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, n)) for n in rng.permutation(lengths)]
    return ["", " ", *texts, "naïve café 😀", "x" * 300, "twice", "twice"]


@pytest.fixture(scope="module")
def reference(minilm):
    """Every pooling of every text by plain transformers in fp32, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder)

    def encode(texts, pairs=None):
        vectors = {name: [] for name in POOLINGS}
        for i, text in enumerate(texts):
            inputs = tokenizer(text, pairs[i] if pairs else None, return_tensors="pt", truncation=True, max_length=512)
            with torch.no_grad():
                output = model(**inputs)
            hidden = output.last_hidden_state[0]
            vectors["pooler"].append(output.pooler_output[0])
            vectors["cls"].append(hidden[0])
            vectors["mean"].append(hidden.mean(0))
            vectors["max"].append(hidden.max(0).values)
        return {name: torch.stack(rows).numpy() for name, rows in vectors.items()}

    return encode


@pytest.fixture(scope="module")
def texts():
    return ragged([*range(1, 40), *range(40, 511, 30), 508, 509, 510])


@pytest.fixture(scope="module")
def expected(reference, texts):
    return reference(texts)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equal_to_transformers_at_every_length_in_fp32(minilm, texts, expected, pooling):
    encoded = Encoder(minilm, EncoderSpec(pooling=pooling, precision="fp32")).encode(texts)
    assert encoded.vectors.dtype == np.float32
    assert (encoded.tokens.min(), encoded.tokens.max()) == (2, 512)
    assert cosine(encoded.vectors, expected[pooling]).min() > 0.99999


# The least cosine to fp32, over all texts and poolings, that each precision has to keep.
BOUNDS = {"fp32": 0.99999, "int16": 0.9998, "fp16": 0.9999, "bf16": 0.999, "auto": 0.999, "int8": 0.98}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("precision", BOUNDS)
def test_each_precision_keeps_its_bound(minilm, texts, expected, precision, pooling):
    try:
        encoder = Encoder(minilm, EncoderSpec(pooling=pooling, precision=precision))
    except CheckpointError as error:
        assert precision.startswith("int")
        pytest.skip(str(error))
    vectors = encoder.encode(texts).vectors
    assert vectors.dtype == (np.float32 if precision == "fp32" else np.float16)
    assert cosine(vectors, expected[pooling]).min() > BOUNDS[precision]


def test_pairs_are_equal_to_transformers(minilm, reference):
    first, second = ["I was thirsty!", "", "a b c"], ["I drank water :D", "x", "long " * 600]
    encoded = Encoder(minilm, EncoderSpec(pooling="pooler", precision="fp32")).encode(first, second)
    assert cosine(encoded.vectors, reference(first, second)["pooler"]).min() > 0.99999
    assert encoded.truncated.tolist() == [False, False, True]


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_neither_neighbours_nor_order_matter(minilm, texts, precision):
    encoder = Encoder(minilm, EncoderSpec(pooling="mean", precision=precision))
    together = encoder.encode(texts).vectors
    np.testing.assert_array_equal(together, encoder.encode(texts).vectors)
    np.testing.assert_array_equal(together[-1], together[-2])  # the same text twice
    backwards = encoder.encode(texts[::-1]).vectors[::-1]
    alone = np.concatenate([encoder.encode([text]).vectors for text in texts])
    if isinstance(encoder.backend, NativeBackend):  # to the last bit
        np.testing.assert_array_equal(together, backwards)
        np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, backwards, atol=2e-5 if precision == "fp32" else 2e-2)
    np.testing.assert_allclose(together, alone, atol=2e-5 if precision == "fp32" else 2e-2)


def test_texts_of_one_length_do_not_depend_on_their_batch_in_fp32(minilm):
    encoder = Encoder(minilm, EncoderSpec(pooling="mean", precision="fp32"))
    texts = ["a cat sat here", "the dog ran off", "green trees and water", "sun over the house"] * 8
    np.testing.assert_array_equal(encoder.encode(texts).vectors[:4], encoder.encode(texts[:4]).vectors)


def test_many_blocks_come_back_in_order(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32"))
    texts = [f"{'cat ' * (i % 7)} {i}" for i in range(100)]
    whole = encoder.encode(texts)
    encoder.backend.block = 9
    blocks = encoder.encode(texts)
    np.testing.assert_allclose(blocks.vectors, whole.vectors, atol=1e-6)
    np.testing.assert_array_equal(blocks.tokens, whole.tokens)


def test_threads_share_an_encoder(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision="fp32"))
    parts = [[f"{'dog ' * (i % 5)} {part} {i}" for i in range(60)] for part in range(6)]
    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(lambda part: encoder.encode(part).vectors, parts))
    for part, vectors in zip(parts, shared, strict=True):
        np.testing.assert_allclose(vectors, encoder.encode(part).vectors, atol=1e-6)


def test_no_texts_are_no_vectors(tiny):
    assert Encoder(find(str(tiny)), EncoderSpec()).encode([]).vectors.shape == (0, 32)


@pytest.mark.parametrize("feature", [Feature("mean", 3), Feature("cls", -1), Feature("sum", 1)])
def test_features_that_a_checkpoint_has_not_are_refused(tiny, feature):
    """Native code, which does not look, would read what lies beside its layers."""
    with pytest.raises(CheckpointError, match=f"has no {feature}: its layers are 0 .embeddings. to 2"):
        Encoder(find(str(tiny)), EncoderSpec(), wanted=[feature])
    encoder = Encoder(find(str(tiny)), EncoderSpec())
    with pytest.raises(CheckpointError, match=f"has no {feature}"):
        encoder.reading(EncoderSpec(), wanted=[feature])


def test_a_checkpoint_without_a_pooler_says_so(tiny, tmp_path):
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    config = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=30522)
    DistilBertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no trained pooler. Set encoder.pooling to mean"):
        Encoder(find(str(tmp_path)), EncoderSpec(pooling="pooler"))
    assert Encoder(find(str(tmp_path)), EncoderSpec(pooling="mean")).encode(["hi"]).vectors.shape == (1, 32)


def test_a_pooler_whose_weights_are_missing_is_not_made_up(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    checkpoint = find(str(tmp_path / "copy"))
    with pytest.raises(CheckpointError, match="no trained pooler"):
        Encoder(checkpoint, EncoderSpec(pooling="pooler"))
    Encoder(checkpoint, EncoderSpec(pooling="mean"))
    save_file({name: kept[name] for name in list(kept)[:3]}, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights, such as"):
        Encoder(find(str(tmp_path / "copy")), EncoderSpec(pooling="mean"))


def test_limits_on_length(tiny):
    with pytest.raises(CheckpointError, match="max_length must be at most 512 .* Got 513"):
        Encoder(find(str(tiny)), EncoderSpec(max_length=513))
    encoder = Encoder(find(str(tiny)), EncoderSpec(max_length=8, truncation="error"))
    with pytest.raises(SourceError, match="longer than encoder.max_length"):
        encoder.encode(["word " * 20])


def test_a_folder_that_is_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Encoder(find(str(tmp_path)), EncoderSpec())


def test_the_notebooks_outputs_of_bert_base():
    """Values that the notebook printed for bert-base-uncased."""
    try:
        checkpoint = find("google-bert/bert-base-uncased")
    except CheckpointError as error:
        pytest.skip(f"bert-base-uncased is not on this disk: {error}")
    pair = (["I was thirsty!"], ["I drank water :D"])
    pooled = Encoder(checkpoint, EncoderSpec(precision="fp32")).encode(*pair).vectors[0]
    printed = [-0.9803, -0.7672, -0.9958, 0.9636, 0.9004, -0.5488, 0.9910, 0.6867, -0.9878, -1.0000]
    np.testing.assert_allclose(pooled[:10], printed, atol=1e-3)
    first = Encoder(checkpoint, EncoderSpec(pooling="cls", precision="fp32")).encode(*pair).vectors[0]
    np.testing.assert_allclose(first[:10], [-0.23, 0.37, -0.34, -0.35, -0.91, 0.01, 0.67, 0.64, 0.10, -0.32], atol=0.01)


def by_hand(minilm, text, pair, max_length, overlap):
    """A long text, or a pair whose second is long, by every pooling: transformers, one window at a time."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm.folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(minilm.folder)
    head, long = ([], text) if pair is None else (words.encode(text, add_special_tokens=False), pair)
    content = words.encode(long, add_special_tokens=False, verbose=False)
    room = max_length - 2 - (len(head) + 1 if pair else 0)
    found, weights = {name: [] for name in POOLINGS}, []
    for start in range(0, len(content) - overlap, room - overlap):
        part = content[start : start + room]
        ids = [101, *head, *([102] if pair else []), *part, 102]
        types = [0] * (len(head) + 2 if pair else len(ids)) + ([1] * (len(part) + 1) if pair else [])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        hidden = output.last_hidden_state[0]
        for name, vector in zip(
            ("pooler", "cls", "mean", "max"),
            (output.pooler_output[0], hidden[0], hidden.mean(0), hidden.amax(0)),
            strict=True,
        ):
            found[name].append(vector.numpy())
        weights.append(len(head) + len(part))
    means = {name: np.average(rows, 0, weights) for name, rows in found.items()}
    return means | {"max": np.max(found["max"], 0)}, len(weights)


@pytest.fixture(scope="module", params=["texts", "pairs"])
def windowed(minilm, request):
    """Texts or pairs of which the second is long, and what transformers makes of that."""
    words = ["cat", "naïve", "sun", "xylophonists", "house", "water", "the", "green"]
    long = " ".join(np.random.default_rng(1).choice(words, 400))
    if request.param == "texts":
        return ["a short one", long, ""], None, *by_hand(minilm, long, None, 128, 16)
    return ["a short one", "what is it", "x"], ["y", long, "z"], *by_hand(minilm, "what is it", long, 128, 16)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_windows_are_those_of_transformers_one_at_a_time(minilm, windowed, pooling):
    texts, pairs, expected, windows = windowed
    spec = EncoderSpec(pooling=pooling, precision="fp32", max_length=128, truncation="window", overlap=16)
    encoded = Encoder(minilm, spec).encode(texts, pairs)
    assert encoded.windows.tolist() == [1, windows, 1]
    assert windows > 4
    assert not encoded.truncated.any()
    assert cosine(encoded.vectors[1:2], expected[pooling][None]).min() > 0.99999
    np.testing.assert_allclose(encoded.vectors[1], expected[pooling], atol=2e-4)
    # A text that fits is as it was.
    cut = Encoder(minilm, spec.model_copy(update={"truncation": "truncate"})).encode(texts, pairs)
    np.testing.assert_array_equal(encoded.vectors[[0, 2]], cut.vectors[[0, 2]])
    assert (cut.windows.tolist(), cut.truncated.tolist()) == ([1, 1, 1], [False, True, False])
    assert cosine(encoded.vectors[1:2], cut.vectors[1:2]).max() < 0.9999


def test_a_text_of_megabytes_has_one_vector(tiny):
    import resource

    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", truncation="window"))
    text = " ".join(np.random.default_rng(0).choice(["cat", "dog", "sun", "tree"], 500_000))  # 2 MB
    encoder.encode(["a"])
    before, steps = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, encoder.steps
    encoded = encoder.encode([text, "a cat"])
    assert encoded.windows.tolist() == [1121, 1]
    assert encoded.tokens.tolist() == [500_000 + 1120 * 64 + 1121 * 2, 4]
    np.testing.assert_array_equal(encoded.vectors[1], encoder.encode(["a cat"]).vectors[0])
    assert encoder.steps > steps + 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kB


def test_blocks_of_long_texts_hold_fewer():
    from bertray.encoder import _Inputs, _spans

    texts = ["x" * 10_000, "y", "z" * 3000, *["short"] * 20]
    for pairs in (None, [""] * len(texts)):
        spans = [(span.start, span.stop) for span in _spans(_Inputs(texts, pairs), 4)]
        assert spans == [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17), (17, 21), (21, 23)]
    assert _spans(_Inputs([], None), 4) == []


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(find(str(tiny)), EncoderSpec(pooling="mean", max_length=40))


def short_texts(count):
    return [f"{'cat ' * (i % 7)} {i}" for i in range(count)]


def assert_rest_is_the_same(encoder, texts, encoded, failed, plain):
    good = np.setdiff1d(np.arange(len(texts)), list(failed))
    for name in ("vectors", "tokens", "truncated", "windows"):
        assert np.array_equal(getattr(encoded, name)[good], getattr(plain, name)[good]) or (
            name == "vectors"
            and not isinstance(encoder.backend, NativeBackend)
            and np.allclose(encoded.vectors[good], plain.vectors[good], atol=2e-2)
        )
        assert not getattr(encoded, name)[list(failed)].any()


@pytest.mark.parametrize("bad", [[], [0], [99], [3, 4, 50], list(range(100))])
def test_rows_that_cannot_be_tokenized_are_set_aside(encoder, bad):
    texts = short_texts(100)
    plain = encoder.encode(texts)
    spoilt = [text + "\ud800" if i in bad else text for i, text in enumerate(texts)]
    for block in (8192, 16):
        encoder.backend.block, before = block, encoder.backend.block
        encoded, failed = encoder.encode_rows(spoilt)
        encoder.backend.block = before
        assert list(failed) == bad
        assert all(reason.startswith("UnicodeEncodeError: 'utf-8' codec") for reason in failed.values())
        assert all("\n" not in reason and reason.isascii() for reason in failed.values())
        assert_rest_is_the_same(encoder, texts, encoded, failed, plain)
    _, failed = encoder.encode_rows(texts, spoilt)
    assert list(failed) == bad
    if bad:
        with pytest.raises(UnicodeEncodeError):
            encoder.encode(spoilt)


def test_rows_that_are_too_long_are_set_aside_without_a_search(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", max_length=8, truncation="error"))
    texts = short_texts(100)
    encoded, failed = encoder.encode_rows(texts)
    assert failed == {i: "longer than 8 tokens" for i in range(100) if i % 7 == 6}
    assert encoder._blocks_begun == 1
    plain = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", max_length=8)).encode(texts)
    assert_rest_is_the_same(encoder, texts, encoded, failed, plain)
    assert len(encoder.encode_rows(["word " * 20])[1]) == 1
    with pytest.raises(SourceError, match="longer than encoder.max_length"):
        encoder.encode(texts)


def enlarged(tiny, folder, change):
    """The tiny checkpoint with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return find(str(folder))


def test_rows_whose_vectors_cannot_be_stored_are_set_aside(tiny, tmp_path):
    zebra = 29145

    def change(weights):
        weights["embeddings.word_embeddings.weight"][:, 0] = 0
        weights["embeddings.word_embeddings.weight"][zebra, 0] = 1e3
        for norm in ("embeddings.LayerNorm", *(f"encoder.layer.{i}.attention.output.LayerNorm" for i in range(2))):
            weights[f"{norm}.weight"][:] = 1
        weights["encoder.layer.1.output.LayerNorm.weight"][0] = 1.4e4  # of at most 5.6, and 65,504 are the limit

    def failing(weights):
        weights["encoder.layer.1.output.LayerNorm.bias"][:] = 1e6

    encoder = Encoder(enlarged(tiny, tmp_path / "one", change), EncoderSpec(pooling="max", precision="auto"))
    texts = short_texts(60)
    spoilt = [f"zebra {text}" if i in (7, 30) else text for i, text in enumerate(texts)]
    encoded, failed = encoder.encode_rows(spoilt)
    assert failed == dict.fromkeys((7, 30), "its vector exceeds what float16 can hold")
    assert_rest_is_the_same(encoder, texts, encoded, failed, encoder.encode(texts))
    with pytest.raises(CheckpointError, match="exceed what can be stored. Set encoder.precision to fp32"):
        encoder.encode(spoilt)
    hopeless = Encoder(enlarged(tiny, tmp_path / "all", failing), EncoderSpec(pooling="max", precision="auto"))
    with pytest.raises(CheckpointError, match="exceed what can be stored"):
        hopeless.encode_rows(texts)


def test_a_vocabulary_that_is_too_small_for_one_row(tiny):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean"))
    texts = [*short_texts(20), "zebra"]  # token 29145
    encoder._facts = replace(encoder._facts, vocabulary=29000)
    encoded, failed = encoder.encode_rows(texts)
    assert list(failed) == [20]
    assert "gives token 29145, but its model knows 29000" in failed[20]
    assert np.isfinite(encoded.vectors).all()
    encoder._facts = replace(encoder._facts, vocabulary=1000)
    with pytest.raises(CheckpointError, match="gives token"):
        encoder.encode_rows(texts)


@pytest.mark.parametrize(
    ("error", "set_aside"),
    [
        (RuntimeError("no such\nkernel"), True),
        (CheckpointError("A text of 9 tokens does not fit the memory of the cuda device."), True),
        (MemoryError("out"), False),
        (OSError("gone"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_only_errors_of_rows_set_rows_aside(tiny, monkeypatch, error, set_aside, late):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean"))
    texts = [*short_texts(50), "zebra", *short_texts(30)]
    plain = encoder.encode(texts)
    start, calls = encoder.backend.start, []

    def failing(tokens):
        calls.append(1)
        finish = start(tokens)
        if not (tokens.ids == 29145).any():
            return finish

        def fail():
            raise error

        return fail if late else fail()

    monkeypatch.setattr(encoder.backend, "start", failing)
    if not set_aside:
        with pytest.raises(type(error), match=str(error)[:10]):
            encoder.encode_rows(texts)
        assert len(calls) == 1
        return
    encoded, failed = encoder.encode_rows(texts)
    assert list(failed) == [50]
    assert failed[50] in (str(error), "RuntimeError: no such kernel")
    assert_rest_is_the_same(encoder, texts, encoded, failed, plain)
    assert len(calls) < 30


def test_what_no_text_survives_is_raised(tiny, monkeypatch):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean"))

    def failing(tokens):
        raise RuntimeError(f"broken at {len(tokens.lengths)}")

    monkeypatch.setattr(encoder.backend, "start", failing)
    with pytest.raises(RuntimeError, match="broken at 1"):
        encoder.encode_rows(short_texts(50))


def test_one_block_needs_no_thread(encoder, monkeypatch):
    monkeypatch.setattr("bertray.encoder.ThreadPoolExecutor", None)
    assert encoder.encode(short_texts(50)).vectors.shape == (50, 32)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_steps_grow_with_every_pack(tiny, precision):
    encoder = Encoder(find(str(tiny)), EncoderSpec(pooling="mean", precision=precision))
    seen = [encoder.steps]
    for _ in range(3):
        encoder.encode(short_texts(3000))
        seen.append(encoder.steps)
    assert all(b - a > 6 for a, b in pairwise(seen))


def test_every_layer_is_that_of_transformers(minilm, texts):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder)
    encoder = Encoder(minilm, EncoderSpec(pooling=("mean", "cls"), layers="all", precision="fp32"))
    assert [str(feature) for feature in encoder.features[:3]] == ["mean_0", "cls_0", "mean_1"]
    vectors = encoder.encode(texts[:12]).vectors.reshape(12, 7, 2, 384)
    for text, row in zip(texts, vectors, strict=False):
        with torch.no_grad():
            states = model(
                **tokenizer(text, return_tensors="pt", truncation=True, max_length=512), output_hidden_states=True
            ).hidden_states
        expected = torch.stack([torch.stack([layer[0].mean(0), layer[0, 0]]) for layer in states]).numpy()
        np.testing.assert_allclose(row, expected, atol=2e-4)
    fourth = Encoder(minilm, EncoderSpec(pooling="mean", layers=-3, precision="fp32")).encode(texts[:12]).vectors
    np.testing.assert_array_equal(fourth, vectors[:, 4, 0])


SENTENCE = "Marie-Anne flew to  Nairobi, naïvely."


def by_transformers(minilm, text, pair=None, layer=6):
    """Of plain transformers, states [tokens, width] and offsets of a text."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm.folder, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(minilm.folder)(text, pair, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[layer][0].numpy(), offsets, inputs


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_words_that_are_given(minilm, pooling):
    spec = EncoderSpec(pooling=pooling, layers=4, precision="fp32")
    encoder = Encoder(minilm, spec, part="word")
    spans = np.array([[0, 10], [11, 15], [16, 18], [20, 28], [29, 36]])
    encoded = encoder.encode(["", SENTENCE], words=[np.zeros((0, 2), int), spans])
    assert [words.shape for words in encoded.vectors] == [(0, 384), (5, 384)]
    np.testing.assert_array_equal(encoded.spans[1], spans)
    states, offsets, _ = by_transformers(minilm, SENTENCE, layer=4)
    for (start, stop), vector in zip(spans, encoded.vectors[1], strict=True):
        own = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= stop]
        expected = states[own[0]] if pooling == "first" else states[own].mean(0)
        np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_words_of_the_tokenizers_own(minilm):
    encoder = Encoder(minilm, EncoderSpec(pooling="mean"), part="word")
    encoded = encoder.encode([SENTENCE], ["a context that has words too"])
    words = [SENTENCE[start:stop] for start, stop in encoded.spans[0]]
    assert words == ["Marie", "-", "Anne", "flew", "to", "Nairobi", ",", "naïvely", "."]
    alone = encoder.encode([SENTENCE])
    assert cosine(encoded.vectors[0], alone.vectors[0]).max() < 0.9999  # the context is seen


def test_tokens_of_a_context(minilm):
    encoder = Encoder(minilm, EncoderSpec(pooling="mean", precision="fp32"), part="token")
    encoded = encoder.encode(["Who flew?"], [SENTENCE])
    states, offsets, inputs = by_transformers(minilm, "Who flew?", SENTENCE)
    np.testing.assert_allclose(encoded.vectors[0][0], states[1:4].mean(0), atol=1e-4)  # the question
    own = [0, *(i for i, kind in enumerate(inputs["token_type_ids"][0].tolist()) if kind)][:-1]
    np.testing.assert_allclose(encoded.vectors[0][1:], states[own], atol=1e-4)
    np.testing.assert_array_equal(encoded.spans[0][2:], [offsets[i] for i in own[1:]])


def test_words_of_long_texts_are_taken_where_most_is_around_them(minilm):
    text = " ".join(np.random.default_rng(0).choice(["cat", "naïvely", "xylophonists", "the"], 300))
    spec = EncoderSpec(pooling="mean", precision="fp32", max_length=64, truncation="window", overlap=20)
    encoded = Encoder(minilm, spec, part="word").encode(["the cat", text, ""])
    assert [len(words) for words in encoded.vectors] == [2, 300, 0]
    assert encoded.windows[1] > 5
    assert all(words.any(1).all() for words in encoded.vectors)
    assert [text[a:b] for a, b in encoded.spans[1]] == text.split()
    whole = Encoder(minilm, EncoderSpec(pooling="mean", precision="fp32", max_length=512), part="word").encode([text])
    held = whole.vectors[0].any(1)  # the others are beyond 512 tokens
    assert held.sum() > 150
    assert cosine(encoded.vectors[1][held], whole.vectors[0][held]).mean() > 0.7
    cut = Encoder(minilm, spec.model_copy(update={"truncation": "truncate"}), part="word").encode(["the cat", text])
    there = cut.vectors[1].any(1)
    assert 10 < there.sum() < 64
    assert there[: there.sum()].all()  # what was cut off has zeros
    assert cut.truncated.tolist() == [False, True]
    refused, failed = Encoder(minilm, spec.model_copy(update={"truncation": "error"}), part="word").encode_rows(
        ["the cat", text, "the"]
    )
    assert failed == {1: "longer than 64 tokens"}
    assert [len(words) for words in refused.vectors] == [2, 0, 1]


def test_words_do_not_depend_on_what_is_encoded_beside(minilm):
    texts = ["the cat sat", "a  dog", "", "Nairobi is far away from here", "x"] * 130
    encoder = Encoder(minilm, EncoderSpec(pooling=("first", "mean"), layers="last4", precision="int16"), part="word")
    together = encoder.encode(texts)
    for row in (0, 1, 2, 3, 517):
        np.testing.assert_array_equal(together.vectors[row], encoder.encode([texts[row]]).vectors[0])


def test_operations_are_those_that_torch_counts(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    from bertray.encoder import load

    checkpoint, lengths = find(str(tiny)), (7, 100)
    encoder = Encoder(checkpoint, EncoderSpec(model=str(tiny), pooling="mean", precision="fp32"))
    model = load(checkpoint, "eager")[0]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for length in lengths:
            model(torch.zeros(1, length, dtype=torch.int64))
    of_poolers = len(lengths) * 2 * model.config.hidden_size**2
    tokens = np.array(lengths)
    assert encoder.flops(tokens, np.ones(2, np.int64)) == counter.get_total_flops() - of_poolers
    windowed = encoder.flops(np.array([200]), np.array([2]))  # twice a hundred
    assert windowed == 2 * encoder.flops(np.array([100]), np.array([1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_busy_while_it_encodes_and_only_then(tiny, precision):
    encoder = Encoder(find(str(tiny)), EncoderSpec(model=str(tiny), pooling="mean", precision=precision))
    before, started = (encoder.backend.busy.seconds, encoder.tokenizing.seconds), time.perf_counter()
    encoder.encode(["the cat sat on the mat " * 20] * 300)
    passed, after = time.perf_counter() - started, (encoder.backend.busy.seconds, encoder.tokenizing.seconds)
    assert all(0 < now - then < passed for now, then in zip(after, before, strict=True))
    time.sleep(0.05)
    assert (encoder.backend.busy.seconds, encoder.tokenizing.seconds) == after
