"""The encoder against plain transformers, one text at a time."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bertray.backends import POOLINGS
from bertray.checkpoints import find
from bertray.encoder import Encoder
from bertray.errors import CheckpointError, SourceError
from bertray.native import NativeBackend
from bertray.spec import Encoder as EncoderSpec


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
