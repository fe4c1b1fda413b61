"""What BERT sees, held against plain transformers; what is shown of it; and what cannot be looked at."""

import json
import os
import re
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from conftest import MINILM, topics_of
from families import FAMILIES, build

import bertray
from bertray import BertrayError, display
from bertray.checkpoints import find
from bertray.explorer import OF_TEXTS, SECTIONS, explore, plain, vocabulary

PAIR = ("I was thirsty!", "I drank water :D")
AWKWARD = {
    "empty": "",
    "blank": " \t\n ",
    "long": "a word and another " * 2500,
    "emoji": "so happy 😀👩‍👩‍👧🏽!",
    "right to left": "שלום עולם, مرحبا بالعالم",
    "nul": "a\0b \x1b[31mred\x07",
    "wide": "東京は夜の七時 \uff46\uff55\uff4c\uff4c",
    "combining": "e\u0301a\u0300 " * 10,
    "one long word": "x" * 5000,
    "markup": "</script><img src=x onerror=alert(1)> &amp; <!--",
    "marks": "[MASK] [SEP] [CLS] <mask>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random checkpoint of each family."""
    return {family: build(family, tmp_path_factory.mktemp("families") / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def seen(minilm):
    """A pair as all-MiniLM sees it, with all numbers; and what plain transformers gives."""
    return explore(*PAIR, model=MINILM, dims=0), by_transformers(minilm.folder, *PAIR)


def by_transformers(folder, *texts, kind="AutoModel"):
    """What plain transformers gives: the model, its inputs and outputs."""
    import torch
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(*texts, return_tensors="pt", return_token_type_ids=False)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs = tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        return model, inputs, model(**inputs, output_hidden_states=True, output_attentions=True)


def cosine(u, v):
    return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))


# --- tokens ---


def test_the_notebooks_tokens(shared):
    """What the notebook printed of bert-base-uncased's tokenizer. Its folder holds no weights, and needs none."""
    folder = str(shared / "bert-base-uncased-tokenizer")
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "vacant", "organization", "concern"]
    ids = [0, 101, 102, 103, 10030, 3029, 5142]
    assert [token["token"] for token in vocabulary(ids, model=folder)["ids"]] == names
    found = explore(*PAIR, model=folder)
    assert set(found) & {*SECTIONS} == {"tokens"} and "holds no weights" in found["notes"][-1]
    tokens = found["tokens"]["tokens"]
    assert [token["id"] for token in tokens] == [101, 1045, 2001, 24907, 999, 102, 1045, 10749, 2300, 1024, 1040, 102]
    assert [token["type"] for token in tokens] == [0] * 6 + [1] * 6
    assert [token["mask"] for token in tokens] == [1] * 12
    assert [token["position"] for token in tokens] == list(range(12))


def test_tokens_words_and_what_became_of_them():
    text = "Unhappily, the CAFÉ 😀 \x00 was thirstless"
    found = explore(text, model=MINILM, show=["tokens"])["tokens"]
    for token in found["tokens"][1:-1]:
        piece = text[token["start"] : token["stop"]]
        stripped = "".join(c for c in unicodedata.normalize("NFD", piece.lower()) if not unicodedata.combining(c))
        assert token["unknown"] or token["token"].removeprefix("##") == stripped
    words = {word["text"]: word for word in found["words"]}
    assert words["thirstless"]["pieces"] == ["thirst", "##less"] and words["thirstless"]["read_as"] == "thirstless"
    assert {(word["text"], word["read_as"]) for word in found["changed"]} == {
        ("Unhappily", "unhappily"),
        ("CAFÉ", "cafe"),
    }
    assert [word["text"] for word in found["unknown"]] == ["😀"]
    assert [run["text"] for run in found["dropped"]] == ["\x00"]
    assert found["count"] == found["kept"] == len(found["tokens"])


def test_what_is_too_long_is_cut_as_in_the_encoder(minilm):
    from bertray.tokens import Tokenizer

    for texts in (("word " * 600,), ("question " * 300, "answer " * 400)):
        found = explore(*texts, model=MINILM, show=["tokens"])
        read = Tokenizer(minilm.folder, 512, "truncate", 0)(list(texts[:1]), [texts[1]] if len(texts) > 1 else None)
        assert [token["id"] for token in found["tokens"]["tokens"]] == read.ids.tolist()
        assert found["tokens"]["count"] > found["tokens"]["kept"] == 512
        assert found["tokens"]["dropped"] == []
        assert any("the first 512 are looked at" in note for note in found["notes"])


# --- numbers ---


def test_numbers_are_those_of_plain_transformers(seen, minilm):
    found, (model, _, output) = seen
    states = [state[0].numpy() for state in output.hidden_states]
    outputs, tables = found["outputs"], found["tables"]
    np.testing.assert_allclose(outputs["last_hidden_state"]["values"], states[-1], atol=1e-5)
    assert outputs["last_hidden_state"]["shape"] == list(output.last_hidden_state.shape)
    np.testing.assert_allclose(outputs["pooler_output"]["values"], output.pooler_output[0], atol=1e-5)
    np.testing.assert_allclose(outputs["attention"], np.stack([a[0] for a in output.attentions]), atol=1e-5)
    poolings = {pooling["name"]: pooling for pooling in outputs["poolings"]}
    for name, vector in (
        ("cls", states[-1][0]),
        ("mean", states[-1].mean(0)),
        ("max", states[-1].max(0)),
        ("pooler", output.pooler_output[0].numpy()),
    ):
        np.testing.assert_allclose(poolings[name]["values"], vector, atol=1e-5)
        assert poolings[name]["norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-4)
    for layer, place in ((0, 3), (2, 7), (6, 1)):
        assert outputs["cosine"][layer][place, 4] == pytest.approx(
            cosine(states[layer][place], states[layer][4]), abs=1e-5
        )
        moved = outputs["movement"]
        assert moved["from_first"][layer, place] == pytest.approx(
            cosine(states[layer][place], states[0][place]), abs=1e-5
        )
        assert moved["norm"][layer, place] == pytest.approx(np.linalg.norm(states[layer][place]), rel=1e-5)
    assert outputs["movement"]["from_previous"][2, 5] == pytest.approx(cosine(states[3][5], states[2][5]), abs=1e-5)

    embeddings = model.embeddings
    for kind, table in (
        ("token", embeddings.word_embeddings),
        ("position", embeddings.position_embeddings),
        ("type", embeddings.token_type_embeddings),
    ):
        assert tables[kind]["shape"] == list(table.weight.shape)
        np.testing.assert_array_equal(tables[kind]["values"], table.weight[: len(tables[kind]["values"])].detach())
    np.testing.assert_allclose(tables["input"]["normalized"], states[0], atol=1e-5)
    together = sum(tables["input"][kind] for kind in ("token", "position", "type"))
    np.testing.assert_allclose(tables["input"]["sum"], together, atol=1e-6)
    np.testing.assert_allclose(tables["input"]["norms"]["sum"], np.linalg.norm(together, axis=1), rtol=1e-5)


def test_neighbours_and_positions(seen):
    found, (model, _, _) = seen
    weight = model.embeddings.word_embeddings.weight.detach().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    for token in found["tables"]["neighbours"]:
        cosines = unit @ unit[token["id"]]
        best = [number for number in np.argsort(-cosines)[:6].tolist() if number != token["id"]][:5]
        assert [other["id"] for other in token["nearest"]] == best
        assert [other["cosine"] for other in token["nearest"]] == pytest.approx(cosines[best], abs=1e-5)
    positions = found["tables"]["positions"]
    table = model.embeddings.position_embeddings.weight.detach().numpy()
    i, j = positions["places"][5], positions["places"][40]
    assert positions["cosine"][5, 40] == pytest.approx(cosine(table[i], table[j]), abs=1e-5)


def test_the_architecture_counts_every_weight(seen):
    found, (model, _, _) = seen
    built = found["architecture"]
    assert built["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (built["layers"], built["heads"], built["width"], built["inner"]) == (6, 12, 384, 1536)
    tree = built["tree"]
    assert sum(line["parameters"] * line["times"] for line in tree if line["depth"] == 0) == built["parameters"]
    layers = next(line for line in tree if line["name"] == "0 to 5, each")
    assert layers["parameters"] == sum(weight.numel() for weight in model.encoder.layer[0].parameters())


def test_one_word_in_two_texts(minilm):
    texts = ("I sat on the bank of the river", "The bank gave me money")
    found = explore(*texts, model=MINILM)["outputs"]["same_words"]
    bank = next(word for word in found if word["word"] == "bank")
    assert [texts[0][slice(*bank["first"])], texts[1][slice(*bank["second"])]] == ["bank", "bank"]
    states = [by_transformers(minilm.folder, text)[2].hidden_states for text in texts]
    for layer in (0, 3, 6):
        u, v = states[0][layer][0, 5].numpy(), states[1][layer][0, 2].numpy()
        assert bank["cosine"][layer] == pytest.approx(cosine(u, v), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_seen_as_transformers_sees_it(folders, family):
    text = "I drank the water at the café"
    found = explore(text, model=str(folders[family]), dims=0)
    model, inputs, output = by_transformers(folders[family], text)
    assert [token["id"] for token in found["tokens"]["tokens"]] == inputs["input_ids"][0].tolist()
    np.testing.assert_allclose(found["outputs"]["last_hidden_state"]["values"], output.last_hidden_state[0], atol=2e-5)
    np.testing.assert_allclose(found["outputs"]["attention"], np.stack([a[0] for a in output.attentions]), atol=2e-5)
    embedded = model.embeddings(inputs["input_ids"])[0].detach()
    np.testing.assert_allclose(found["tables"]["input"]["normalized"], embedded, atol=1e-5)
    assert any("projected to 32" in note for note in found["notes"]) is (family == "electra")
    notes, outputs, tables = " ".join(found["notes"]), found["outputs"], found["tables"]
    has_pooler = family in ("bert", "minilm", "xlm-roberta")
    assert (outputs["pooler_output"] is not None) is has_pooler is ("no trained pooler" not in notes)
    assert (tables["type"] is None) is (family in ("distilbert", "modernbert"))
    assert (tables["position"] is None) is (family == "modernbert") is ("no table of positions" in notes)
    assert ("no token types" in notes) is (family not in ("bert", "minilm", "electra"))
    assert list(display.lines(found))


def test_bert_base_shows_what_the_notebook_printed():
    """bertray explore "I was thirsty!" "I drank water :D" --model google-bert/bert-base-uncased"""
    try:
        found = explore(*PAIR, model="google-bert/bert-base-uncased")
    except bertray.BertrayError as error:
        pytest.skip(f"bert-base-uncased is not on this disk: {error}")
    tables, outputs = found["tables"], found["outputs"]
    assert [tables[kind]["shape"] for kind in ("position", "token", "type")] == [[512, 768], [30522, 768], [2, 768]]
    first = [-0.23, 0.37, -0.34, -0.35, -0.91, 0.01, 0.67, 0.64, 0.10, -0.32]
    np.testing.assert_allclose(outputs["last_hidden_state"]["values"][0], first, atol=0.01)
    pooled = [-0.9803, -0.7672, -0.9958, 0.9636, 0.9004, -0.5488, 0.9910, 0.6867, -0.9878, -1.0000]
    np.testing.assert_allclose(outputs["pooler_output"]["values"], pooled, atol=1e-3)
    np.testing.assert_allclose(tables["position"]["values"][0][:3], [1.7505e-02, -2.5631e-02, -3.6642e-02], atol=1e-6)
    np.testing.assert_allclose(tables["token"]["values"][0][:3], [-0.0102, -0.0615, -0.0265], atol=1e-4)
    np.testing.assert_allclose(tables["type"]["values"][0][:3], [0.0004, 0.0110, 0.0037], atol=1e-4)


def test_checkpoints_of_old_are_read_too(folders, tmp_path):
    """Layer norms as TensorFlow named them, and files as torch pickled them."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["bert"] / "model.safetensors")
    new = {".weight": ".gamma", ".bias": ".beta"}
    old = {
        re.sub(r"\.(weight|bias)$", lambda end: new[end[0]], name) if "LayerNorm" in name else name: weight
        for name, weight in weights.items()
    }
    tied = weights | {"cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"]}
    expected = explore(*PAIR, model=str(folders["bert"]), dims=0)
    for name, write in (
        ("model.safetensors", lambda path: save_file(old, path, {"format": "pt"})),
        ("pytorch_model.bin", lambda path: torch.save(tied, path)),
        ("pytorch_model-of-old.bin", lambda path: torch.save(weights, path, _use_new_zipfile_serialization=False)),
    ):
        folder = tmp_path / name
        shutil.copytree(folders["bert"], folder)
        (folder / "model.safetensors").unlink()
        write(folder / name.replace("-of-old", ""))
        found = explore(*PAIR, model=str(folder), dims=0)
        assert found["architecture"] == expected["architecture"] and found["notes"] == expected["notes"]
        assert found["pretraining"]["follows"]["probability"] == pytest.approx(
            expected["pretraining"]["follows"]["probability"], abs=1e-5
        )
        for part, name in (("outputs", "last_hidden_state"), ("outputs", "pooler_output"), ("tables", "position")):
            np.testing.assert_allclose(found[part][name]["values"], expected[part][name]["values"], atol=1e-5)


# --- pretraining tasks ---


def test_masked_words_and_the_next_sentence(folders):
    import torch

    texts = ("I [MASK] your father", "she [MASK] the bank")
    found = explore(*texts, model=str(folders["bert"]), show=["pretraining"])["pretraining"]
    _, inputs, output = by_transformers(folders["bert"], *texts, kind="BertForPreTraining")
    masks = (inputs["input_ids"][0] == 4).nonzero().flatten().tolist()
    assert [fill["place"] for fill in found["masked"]["fills"]] == masks and len(masks) == 2
    for fill in found["masked"]["fills"]:
        best = output.prediction_logits[0, fill["place"]].softmax(-1).topk(5)
        assert [candidate["id"] for candidate in fill["candidates"]] == best.indices.tolist()
        assert [candidate["probability"] for candidate in fill["candidates"]] == pytest.approx(best.values, abs=1e-5)
    follows = torch.softmax(output.seq_relationship_logits, 1)[0, 0]
    assert found["follows"] == {"why_not": "", "probability": pytest.approx(float(follows), abs=1e-5)}


@pytest.mark.parametrize("family", ["roberta", "camembert", "distilbert", "electra", "modernbert"])
def test_other_families_fill_masked_words(folders, family):
    """However they write [MASK]."""
    from transformers import AutoTokenizer

    found = explore("I [MASK] your father", model=str(folders[family]), show=["pretraining"])["pretraining"]
    mask = AutoTokenizer.from_pretrained(folders[family])
    text = f"I {mask.mask_token} your father"
    _, inputs, output = by_transformers(folders[family], text, kind="AutoModelForMaskedLM")
    place = inputs["input_ids"][0].tolist().index(mask.mask_token_id)
    best = output.logits[0, place].softmax(-1).topk(5)
    (fill,) = found["masked"]["fills"]
    assert fill["place"] == place
    assert [candidate["id"] for candidate in fill["candidates"]] == best.indices.tolist()
    assert [candidate["probability"] for candidate in fill["candidates"]] == pytest.approx(best.values, abs=1e-5)
    assert found["follows"] == {"why_not": f"No {family} was pretrained on that.", "probability": None}


def test_what_a_checkpoint_cannot_do_is_said(folders, tmp_path):
    found = explore("I [MASK] you", model=MINILM, show=["pretraining"])["pretraining"]
    assert "without the head" in found["masked"]["why_not"] and found["masked"]["fills"] == []
    found = explore("no masks, and no second text", model=str(folders["bert"]), show=["pretraining"])["pretraining"]
    assert "[MASK]" in found["masked"]["why_not"] and "second text" in found["follows"]["why_not"]
    import shutil

    import transformers

    for family, kind, says in (
        ("electra", "ElectraForPreTraining", "ELECTRA's discriminator"),
        ("modernbert", "ModernBertForSequenceClassification", "without the head"),
        ("roberta", "RobertaForSequenceClassification", "without the head"),
    ):
        folder = tmp_path / family
        shutil.copytree(folders[family], folder)
        getattr(transformers, kind).from_pretrained(folder).save_pretrained(folder)
        found = explore("I [MASK] you", model=str(folder))["pretraining"]
        assert says in found["masked"]["why_not"] and found["masked"]["fills"] == []


# --- predictions ---


def test_a_prediction_is_explained(demo):
    text = "What a wonderful day, though my back hurts"
    predictor = bertray.load(demo["bundle"])
    found = bertray.explore(text, bundle=demo["bundle"])
    told = found["prediction"]
    probabilities = predictor.predict([text]).probabilities[0]
    best = int(probabilities.argmax())
    label = predictor.bundle.labels[best]
    assert told["explained"] == told["scores"][0]["label"] == label
    assert told["scores"][0]["score"] == pytest.approx(probabilities[best], abs=1e-4)
    assert found["architecture"]["trained"]["parameters"] == 3 * 384 + 3

    word = next(word for word in told["words"] if word["text"] == "wonderful")
    without = predictor.predict([text.replace("wonderful", "")]).probabilities[0, best]
    assert word["weight"] == pytest.approx(probabilities[best] - without, abs=1e-3)

    by_hand = nearest_by_hand(demo, predictor.vectors([text])[0])
    assert [row["text"] for row in told["nearest"]] == [text for _, text in by_hand]
    assert [row["cosine"] for row in told["nearest"]] == pytest.approx([value for value, _ in by_hand], abs=1e-3)
    assert all(row["label"] in predictor.bundle.labels for row in told["nearest"])


def nearest_by_hand(demo, vector):
    from pathlib import Path

    from bertray.store import Store

    (folder,) = (Path(demo["bundle"]).parent / "stores").glob("train-*")
    rows = []
    for table in Store(str(folder)).tables(["text", "mean_6"]):
        for text, own in zip(table["text"].to_pylist(), table["mean_6"].to_pylist(), strict=True):
            rows.append((cosine(np.array(own, np.float32), vector), text))
    return sorted(rows, reverse=True)[:5]


def test_gradient_times_input_is_how_the_logit_grows_with_the_embeddings(demo, minilm):
    """Summed over the tokens, it is the derivative by a common factor of all embeddings: here by differences, in plain
    transformers."""
    import torch

    text = "What a wonderful day, though my back hurts"
    told = bertray.explore(text, bundle=demo["bundle"], show=["prediction"])["prediction"]
    head = bertray.load(demo["bundle"]).bundle
    model, inputs, _ = by_transformers(minilm.folder, text)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().double()
    model = model.double()

    def logit(factor, only=None):
        given = embedded.clone()
        given[:, only if only is not None else slice(None)] *= factor
        with torch.no_grad():
            state = model(inputs_embeds=given, token_type_ids=inputs["token_type_ids"]).last_hidden_state
        logits = head.head.weight.astype(np.float64) @ state[0].mean(0).numpy()
        return logits[head.labels.index(told["explained"])] - logits.mean()

    assert [token["token"] for token in told["tokens"]][:4] == ["[CLS]", "what", "a", "wonderful"]
    for only in (None, 0, 3):
        slope = (logit(1 + 1e-4, only) - logit(1 - 1e-4, only)) / 2e-4
        weights = [token["weight"] for token in told["tokens"]]
        assert (sum(weights) if only is None else weights[only]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("kind", ["several labels", "a number", "two texts in one", "two texts apart", "more features"])
def test_bundles_of_every_kind_are_explained(kind, demo, tmp_path):
    """The gradients of a head that is random, by differences, through what the command says it answers."""
    from dataclasses import replace

    from bertray import bundle as bundles
    from bertray.heads import LinearHead

    bundle = replace(bertray.load(demo["bundle"]).bundle, ood=None)
    bundle = replace(bundle, encoder={**bundle.encoder, "precision": "fp32"})
    pair = ["though my back hurts"] if "two texts" in kind else []
    if pair:
        way = "siamese" if "apart" in kind else "cross"
        columns = {**bundle.columns, "text_pair": "text_pair"}
        bundle = replace(bundle, columns=columns, encoder={**bundle.encoder, "pair": way})
    if kind == "several labels":
        bundle = topics_of(bundle)
    if kind == "a number":
        bundle = replace(bundle, problem="regression", labels=("stars",))
    if kind == "more features":
        bundle = replace(bundle, features=("cls_3", "max_6", "pooler_6"))
    width = 384 * len(bundle.features) * (4 if bundle.siamese else 1)
    weight = np.random.default_rng(1).standard_normal((len(bundle.labels), width)).astype(np.float32)
    bundle = replace(bundle, head=LinearHead(weight, np.zeros(len(bundle.labels), np.float32)))
    bundles.save(bundle, str(tmp_path / "head"))

    text = "What a wonderful day"
    told = bertray.explore(text, *pair, bundle=str(tmp_path / "head"), show=["prediction"])["prediction"]
    predictor = bertray.load(str(tmp_path / "head"))
    answer = predictor.predict([text], pair or None)
    assert told["label"] == answer.labels[0]
    scores = {score["label"]: score["score"] for score in told["scores"]}
    vectors = [
        predictor.vectors([text.replace("wonderful", "")], pair or None),
        predictor.vectors([text], pair or None),
    ]
    logits = [bundle.head.logits(vector)[0] for vector in vectors]
    if kind == "a number":
        assert scores == {"stars": pytest.approx(float(answer.labels[0]), abs=1e-4)}
        word = next(word for word in told["words"] if word["text"] == "wonderful")
        assert word["weight"] == pytest.approx(float(logits[1][0] - logits[0][0]), abs=1e-3)
    else:
        assert [scores[label] for label in bundle.labels] == pytest.approx(answer.probabilities[0].tolist(), abs=1e-4)
    assert {token["of"] for token in told["tokens"] if not token["special"]} == ({0, 1} if pair else {0})
    assert {word["of"] for word in told["words"]} == ({0, 1} if pair else {0})
    assert sum(token["weight"] for token in told["tokens"]) == pytest.approx(slope(bundle, text, pair, told), rel=0.02)


def test_answers_that_are_not_of_a_whole_text_are_shown(demo, tmp_path):
    from dataclasses import replace

    from bertray import bundle as bundles
    from bertray.heads import LinearHead

    bundle = replace(bertray.load(demo["bundle"]).bundle, ood=None, task="token-classification", threshold=0.0)
    weight = np.random.default_rng(0).standard_normal((3, 384)).astype(np.float32)
    head = LinearHead(weight, np.array([0, 9, 9], np.float32))
    bundles.save(replace(bundle, labels=("O", "B-PER", "I-PER"), head=head), str(tmp_path / "head"))
    found = bertray.explore("Ada met Grace", bundle=str(tmp_path / "head"))
    told = found["prediction"]
    assert "(PER)" in told["told"] and "not explained" in told["why_not"]
    assert any("(PER)" in line for line in display.lines(found))


def test_a_long_text_of_a_head_that_reads_windows_says_so(demo, tmp_path):
    from dataclasses import replace

    from bertray import bundle as bundles

    bundle = bertray.load(demo["bundle"]).bundle
    encoder = {**bundle.encoder, "max_length": 16, "truncation": "window", "overlap": 4}
    bundles.save(replace(bundle, encoder=encoder), str(tmp_path / "head"))
    found = bertray.explore("a happy word " * 20, bundle=str(tmp_path / "head"))
    assert any("in windows" in note for note in found["notes"])
    assert len(found["prediction"]["words"]) == 60 and len(found["prediction"]["tokens"]) == 16


def slope(bundle, text, pair, told):
    """How fast the logit that is explained grows with a common factor of all embeddings, in plain transformers."""
    import torch

    from bertray.features import parse, related

    def seen(factor, *texts):
        model, inputs, _ = by_transformers(find(MINILM).folder, *texts)
        model = model.double()
        given = model.get_input_embeddings()(inputs["input_ids"]).detach() * factor
        with torch.no_grad():
            output = model(inputs_embeds=given, token_type_ids=inputs["token_type_ids"], output_hidden_states=True)
        parts = []
        for pooling, layer in map(parse, bundle.features):
            state = output.hidden_states[layer][0]
            pooled = {"cls": state[0], "mean": state.mean(0), "max": state.amax(0), "pooler": output.pooler_output[0]}
            parts.append(pooled[pooling].numpy())
        return np.concatenate(parts)[None]

    def logit(factor):
        vector = related(seen(factor, text), seen(factor, *pair)) if bundle.siamese else seen(factor, text, *pair)
        logits = (vector @ bundle.head.weight.astype(np.float64).T)[0]
        place = bundle.labels.index(told["explained"])
        return logits[place] - (logits.mean() if bundle.problem == "single_label" else 0)

    return (logit(1 + 1e-4) - logit(1 - 1e-4)) / 2e-4


def test_a_bundle_away_from_its_run_still_explains(demo, tmp_path):
    import shutil

    shutil.copytree(demo["bundle"], tmp_path / "alone")
    told = bertray.explore("so happy", bundle=str(tmp_path / "alone"), show=["prediction"])["prediction"]
    assert told["nearest"] == [] and "not beside the bundle" in told["why_no_nearest"] and told["words"]
    moved = tmp_path / "moved"
    shutil.copytree(find(MINILM).folder, moved)
    told = bertray.explore("so happy", bundle=str(tmp_path / "alone"), model=str(moved), show=["prediction"])
    assert told["model"] == str(moved) and told["prediction"]["words"]
    with pytest.raises(BertrayError, match="takes one text"):
        bertray.explore("a", "b", bundle=demo["bundle"])
    with pytest.raises(BertrayError, match="is not what the bundle was fitted on"):
        bertray.explore("a", bundle=demo["bundle"], model=str(build("minilm", tmp_path / "other")))


# --- what is shown ---


def columns(line):
    """Columns of a terminal that a line takes."""
    widths = (2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in line)
    return sum(widths)


@pytest.mark.parametrize("kind", AWKWARD)
def test_any_text_fits_the_terminal_and_the_page(kind, minilm):
    found = explore(AWKWARD[kind], model=MINILM)
    lines = list(display.lines(found))
    assert max(map(columns, lines)) <= 80
    assert all(char.isprintable() for line in lines for char in line)
    data = json.dumps(plain(found), allow_nan=False)
    page = display.page(json.loads(data)).decode()
    assert page.count("</script>") == 2 and "<img" not in page
    inside = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(inside) == json.loads(data)


def test_long_texts_have_no_maps_and_say_so():
    found = explore(AWKWARD["long"], model=MINILM)
    assert found["outputs"]["cosine"] is None and found["outputs"]["attention"] is None
    assert any("up to 64 tokens; here are 512" in note for note in found["notes"])
    lines = "\n".join(display.lines(found))
    assert "... and 480 more (--json has all)" in lines


def test_the_form_of_the_answer_is_stable(seen):
    """What programs that read --json rely on."""
    found = seen[0]
    assert list(found) == ["model", "texts", "notes", "about", *OF_TEXTS] and list(found["about"]) == [*OF_TEXTS]
    assert {name: sorted(found[name]) for name in OF_TEXTS} == {
        "tokens": ["changed", "count", "dropped", "kept", "limit", "tokens", "unknown", "words"],
        "tables": ["input", "neighbours", "position", "positions", "token", "type"],
        "architecture": [
            "frozen", "heads", "inner", "kind", "layers", "parameters", "trained", "tree", "type", "vocabulary",
            "width",
        ],
        "outputs": [
            "attention", "cosine", "last_hidden_state", "movement", "pooler_output", "poolings", "same_words",
        ],
        "pretraining": ["follows", "masked"],
    }  # fmt: skip
    assert list(found["tokens"]["tokens"][0]) == [
        "place", "token", "id", "type", "mask", "position", "of", "start", "stop", "special", "unknown",
    ]  # fmt: skip


def test_sections_and_dims():
    found = explore("one two", model=MINILM, show=["outputs", "tokens"], dims=3)
    assert list(found)[4:] == ["tokens", "outputs"]
    assert found["outputs"]["last_hidden_state"]["values"].shape == (4, 3)
    assert found["outputs"]["last_hidden_state"]["shape"] == [1, 4, 384]
    for show, dims, says in ((["tokns"], 10, "no section 'tokns'"), ([], -1, "dims must be 0")):
        with pytest.raises(BertrayError, match=says):
            explore("a", model=MINILM, show=show, dims=dims)


def test_control_characters_and_accents_of_any_tokenizer(folders):
    """SentencePiece tokenizers keep what BERT's drops, and call unknown pieces by their text."""
    found = explore("abc\x1b[31mred \u202e cafe\u0301 a\u20dd", model=str(folders["camembert"]))
    assert all(char.isprintable() for line in display.lines(found) for char in line)
    tokens = found["tokens"]["tokens"]
    assert {token["token"] for token in tokens if token["unknown"]} == {"<unk>"}
    assert [run["text"] for run in found["tokens"]["dropped"]] == []
    bert = explore("cafe\u0301", model=str(folders["bert"]))["tokens"]
    assert [run["text"] for run in bert["dropped"]] == ["\u0301"]


def test_padding_that_is_written_in_a_text(folders):
    text = "a <pad> water </s> b"
    found = explore(text, model=str(folders["roberta"]), dims=0)
    model, _, _ = by_transformers(folders["roberta"], "x")
    ids = [[token["id"] for token in found["tokens"]["tokens"]]]
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.tensor(ids))
    np.testing.assert_allclose(found["outputs"]["last_hidden_state"]["values"], output.last_hidden_state[0], atol=2e-5)
    assert 1 in [token["position"] for token in found["tokens"]["tokens"]]


def test_tables_with_more_rows_than_the_tokenizer_has_tokens(folders, tmp_path):
    """As those of checkpoints whose vocabulary was rounded up."""
    import shutil

    import transformers

    folder = tmp_path / "padded"
    shutil.copytree(folders["bert"], folder)
    model = transformers.BertForPreTraining.from_pretrained(folder)
    model.resize_token_embeddings(400)
    model.save_pretrained(folder)
    found = explore("I [MASK] you", model=str(folder))
    assert found["tables"]["token"]["shape"] == [400, 32]
    assert list(display.lines(found)) and "None" not in json.dumps(plain(found))


def test_positions_are_counted_as_each_family_counts_them(minilm):
    """Of every encoder that transformers has: the row of the table that the first token takes."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    from bertray.forward import Layers
    from bertray.native import first_position

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    checked = set()
    for family in ENCODERS:
        try:
            config = transformers.AutoConfig.for_model(family, vocab_size=30, max_position_embeddings=40, **size)
            with torch.device("meta"):  # some are large, whatever sizes they are given
                model = transformers.AutoModel.from_config(config)
        except Exception:  # other sizes, or packages that are not here
            continue
        if (
            getattr(getattr(model, "embeddings", None), "position_embeddings", None) is None
            or config.is_encoder_decoder
        ):
            continue
        layers = Layers(minilm)
        layers.config = config
        assert layers.first_position == first_position(model), family
        checked.add(family)
    assert {"bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "longformer"} <= checked


def test_families_that_nobody_has_held_against_transformers_say_so(tmp_path, folders):
    import shutil

    import transformers

    folder = tmp_path / "mpnet"
    shutil.copytree(folders["camembert"], folder)
    config = transformers.MPNetConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    transformers.MPNetModel(config).save_pretrained(folder)
    text = "the water " * 60
    found = explore(text, model=str(folder), dims=0)
    assert found["tokens"]["kept"] == 64 and any("Nobody has held" in note for note in found["notes"])
    _, _, output = by_transformers(folder, "the water")
    short = explore("the water", model=str(folder), dims=0)
    np.testing.assert_allclose(short["outputs"]["last_hidden_state"]["values"], output.last_hidden_state[0], atol=2e-5)


# --- what cannot be looked at ---


def test_models_that_are_no_encoders(tmp_path):
    import transformers as hf

    hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    hf.T5Model(hf.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8, vocab_size=50)).save_pretrained(
        tmp_path / "t5"
    )
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "config.json").write_text('{"model_type": "nonsense"}')
    for name, says in (
        ("gpt2", "is no encoder of BERT's family but a gpt2"),
        ("t5", "is no encoder of BERT's family but a t5"),
        ("nonsense", "cannot be looked into"),
        ("nothing", "was not found"),
    ):
        with pytest.raises(BertrayError, match=says) as caught:
            explore("a text", model=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_damaged_weights_are_said_where_they_are_needed(folders, tmp_path):
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(folders["bert"], folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    assert explore("a text", model=str(folder), show=["tokens"])["tokens"]["tokens"]  # needs none
    with pytest.raises(BertrayError, match="cannot be read"):
        explore("a text", model=str(folder))


def test_what_is_no_text():
    for text, says in ((b"bytes", "must be a string"), ("\ud800", "no UTF-8")):
        with pytest.raises(BertrayError, match=says):
            explore(text, model=MINILM)
    with pytest.raises(BertrayError, match="has no token 30522: its tokens are 0 to 30521"):
        vocabulary([101, 30522], model=MINILM)


# --- what it takes ---


def test_tables_are_read_no_further_than_asked(tmp_path):
    """Rows of a table of 4 GB, which takes no room on disk, nor in memory."""
    import resource

    from bertray.weights import Weights

    rows, width = 1 << 20, 1 << 10
    size = 4 * rows * width
    name = "embeddings.word_embeddings.weight"
    head = json.dumps({name: {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Weights(tmp_path).rows(name, [0, 5, rows - 1, 5])
    assert found.shape == (4, width) and not found.any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def run(*arguments, **settings):
    command = [sys.executable, "-m", "bertray.cli", *arguments]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)
    return done, time.perf_counter() - begun


def test_a_text_is_told_within_three_seconds_of_a_cold_start():
    taken = []
    for _ in range(3):
        done, seconds = run("explore", *PAIR, "--model", MINILM)
        assert done.returncode == 0 and "OUTPUTS" in done.stdout, done.stderr
        taken.append(seconds)
    assert min(taken) < 3, taken


def test_help_is_there_at_once():
    assert min(run("--help")[1] for _ in range(3)) < 0.5


def test_the_command(tmp_path, demo):
    done, _ = run("explore", *PAIR, "--model", MINILM, "--json", "--dims", "4")
    assert json.loads(done.stdout) == json.loads(json.dumps(plain(explore(*PAIR, model=MINILM, dims=4))))
    done, _ = run("explore", "--ids", "101, 2300", "--model", MINILM)
    assert done.stdout.split() == ["101", "[CLS]", "2300", "water"]
    page = tmp_path / "page.html"
    done, _ = run("explore", "so happy", "--bundle", demo["bundle"], "--html", str(page), "--show", "prediction")
    assert done.stdout.strip() == f"written: {page}" and b'"prediction"' in page.read_bytes()
    for arguments, says in (
        ([], "There is nothing to look at."),
        (["--ids", "1,x"], "--ids must be numbers"),
        (["a", "--model", str(tmp_path)], "has no config.json"),
        (["a", "--show", "all", "--model", MINILM], "There is no section 'all'"),
        (["a", "--show", "prediction", "--model", MINILM], "there is none (--bundle FOLDER)"),
        (["--ids", "1", "--html", "x.html", "--model", MINILM], "--ids goes with --model and --json alone"),
        (["--ids", ",", "--model", MINILM], "--ids must be numbers"),
        (["a", "--html", str(tmp_path / "page.html" / "x"), "--model", MINILM, "--show", "tokens"], "page.html"),
    ):
        done, _ = run("explore", *arguments)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_terminal_that_knows_no_unicode():
    done, _ = run("explore", "Café 😀", "--model", MINILM, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "TOKENS" in done.stdout
