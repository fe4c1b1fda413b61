"""What is exported is loaded by the libraries it is for, and held against plain transformers, one text at a time."""

import json
import os
from functools import cache

import numpy as np
import pytest
import torch

from bertray import bundle as bundles
from bertray.bundle import Bundle
from bertray.checkpoints import find
from bertray.cli import main
from bertray.errors import BertrayError, BundleError, CheckpointError
from bertray.export import export
from bertray.heads import LinearHead
from bertray.predict import Predictor
from bertray.spec import Encoder as EncoderSpec

TEXTS = [
    "im very sad at the whole situation",
    "yes",
    "Unbelievably, the 12 trains were full again; nobody could say why, and nobody asked. " * 3,
    "",
    "this is great news!",
]
PAIRS = ["why?", "a text that is the longer one of the two by far, and says nothing", "they were.", "no", "it is."]
OF_TEXTS = [("pooler_2",), ("cls_1",), ("mean_2",), ("max_2",), ("mean_0", "max_1", "cls_2", "pooler_2")]


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """The code of folders that are loaded is copied into here, not into the user's cache."""
    for place in ("transformers.dynamic_module_utils", "transformers.utils"):
        monkeypatch.setattr(f"{place}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)


@pytest.fixture
def make(tiny):
    """A function that makes a bundle with a random head."""

    def make(*features, task="text-classification", problem="single_label", pair="", folder=tiny, **encoder):
        checkpoint = find(str(folder))
        width = json.loads((checkpoint.folder / "config.json").read_text()).get("hidden_size") or 32
        outputs = 1 if problem == "regression" else 2 if task == "question-answering" else 3
        random = np.random.default_rng(0)
        times = 4 if pair == "siamese" else 3 if task == "question-answering" else 1
        shape = outputs, width * len(features) * times
        head = LinearHead(random.normal(size=shape).astype(np.float32), random.normal(size=outputs).astype(np.float32))
        pooling = features[-1].split("_")[0]
        spec = EncoderSpec(
            model=str(folder),
            pooling=pooling if pooling != "first" else "mean",
            max_length=encoder.pop("max_length", 64),
            precision="fp32",
            **encoder,
        )
        settings = {**spec.model_dump(), "model": checkpoint.name, "identity": checkpoint.identity}
        columns = {"text": "text", "text_pair": "other" if pair else "", "label": "label", "id": ""}
        labels = ("B-PER", "O", "I-LOC")[:outputs] if task == "token-classification" else ("bad", "good", "odd")
        return Bundle(
            task,
            problem,
            labels[:outputs],
            features,
            settings | ({"pair": pair} if pair else {}),
            columns,
            {},
            (),
            0.0,
            "made",
            {},
            head,
            {},
        )

    return make


@cache
def plain(folder):
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def vectors(bundle, *texts):
    """Features of one text (or pair), or of each of its tokens, by plain transformers: [width], or [tokens, width]."""
    model, tokenizer = plain(bundle.encoder["model"])
    lists = ([text] for text in texts)  # of an empty second text alone, transformers makes no pair
    inputs = tokenizer(*lists, truncation=True, max_length=bundle.encoder["max_length"], return_tensors="pt")
    if getattr(model.config, "type_vocab_size", 0) < 2:
        inputs.pop("token_type_ids", None)
    output = model(**inputs, output_hidden_states=True)
    pooled = []
    for pooling, layer in (name.split("_") for name in bundle.features):
        states = output.hidden_states[int(layer)][0]
        of_tokens = bundle.task != "text-classification"
        ways = {"cls": lambda s: s[0], "max": lambda s: s.max(0).values, "pooler": lambda s: output.pooler_output[0]}
        ways |= {"mean": lambda s: s if of_tokens else s.mean(0), "first": lambda s: s}  # noqa: B023
        pooled.append(ways[pooling](states))
    return torch.cat(pooled, -1).numpy()


def answers(bundle, *texts):
    """[labels] of one text (or pair), by NumPy."""
    x = vectors(bundle, *texts)
    if bundle.problem == "single_label":
        return bundle.head.probabilities(x[None])[0]
    logits = bundle.head.weight @ x + bundle.head.bias
    return logits if bundle.problem == "regression" else 1 / (1 + np.exp(-logits))


def predicted(bundle, known={}):  # noqa: B006
    """What bertray answers to the texts; an encoder is loaded once."""
    if bundle.features not in known:
        known[bundle.features] = Predictor(bundle).predict(TEXTS)
    return known[bundle.features]


def logits(bundle, *texts):
    """[tokens, outputs]"""
    return vectors(bundle, *texts) @ bundle.head.weight.T + bundle.head.bias


def by_pipeline(folder, bundle, texts, **more):
    """[texts, labels] by transformers.pipeline, in one padded batch."""
    from transformers import pipeline

    classify = pipeline(bundle.task, model=str(folder), device="cpu", **more)
    found = classify(texts, truncation=True, top_k=None, batch_size=len(texts))
    return np.array([[{s["label"]: s["score"] for s in row}[label] for label in bundle.labels] for row in found])


def by_onnx(folder, texts, pairs=None):
    """[texts, ...] by ONNX Runtime, in one padded batch, and the mask of what is no padding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, pairs, truncation=True, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    mark = json.loads((folder / "export.json").read_text())
    assert sorted(mark["inputs"]) == sorted(inputs) == sorted(place.name for place in session.get_inputs())
    (found,) = session.run([mark["output"]], dict(inputs))
    return found, inputs["attention_mask"].astype(bool)


@pytest.fixture
def onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'bertray[export]')")


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "problem"),
    [(features, "single_label") for features in OF_TEXTS]
    + [(features, problem) for problem in ("multi_label", "regression") for features in OF_TEXTS[::4]],
)
def test_pipelines_answer_as_the_bundle(make, tmp_path, features, problem, caplog):
    bundle = make(*features, problem=problem)
    made = export(bundle, "transformers", str(tmp_path / "out"))
    assert made["wrapper"] == (features != ("pooler_2",))
    assert made["classes"] == ("Bertray" if made["wrapper"] else "Bert") + "ForSequenceClassification"
    assert made["difference"] < 1e-5
    more = {"trust_remote_code": True} if made["wrapper"] else {}
    found = by_pipeline(tmp_path / "out", bundle, TEXTS, **more)
    np.testing.assert_allclose(found, [answers(bundle, text) for text in TEXTS], atol=1e-5, rtol=1e-5)
    assert "not supported" not in caplog.text
    assert made["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert ("modeling_bertray.py" in made["files"]) == made["wrapper"]


@pytest.mark.parametrize("features", [("pooler_2",), ("mean_1", "cls_2")], ids="+".join)
def test_pairs_keep_their_token_types(make, tmp_path, features):
    bundle = make(*features, pair="cross", max_length=24)
    made = export(bundle, "transformers", str(tmp_path / "out"))
    rows = [{"text": text, "text_pair": pair} for text, pair in zip(TEXTS, PAIRS, strict=True)]
    found = by_pipeline(tmp_path / "out", bundle, rows, **{"trust_remote_code": True} if made["wrapper"] else {})
    expected = [answers(bundle, *both) for both in zip(TEXTS, PAIRS, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_wrapper_is_never_loaded_without_leave(make, tmp_path):
    from transformers import AutoModelForSequenceClassification

    export(make("mean_1"), "transformers", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_layers_above_are_dropped(make, tmp_path):
    sizes = {}
    for layer in (1, 2):
        export(make(f"mean_{layer}"), "transformers", str(tmp_path / str(layer)))
        config = json.loads((tmp_path / str(layer) / "config.json").read_text())
        assert config["encoder"]["num_hidden_layers"] == layer
        sizes[layer] = (tmp_path / str(layer) / "model.safetensors").stat().st_size
    assert sizes[1] < sizes[2]


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_they_answer_as_bertray_predicts(make, minilm, tmp_path, pooling):
    bundle = make(f"{pooling}_6", folder=minilm.folder)
    made = export(bundle, "transformers", str(tmp_path / "out"))
    found = by_pipeline(tmp_path / "out", bundle, TEXTS, **{"trust_remote_code": True} if made["wrapper"] else {})
    expected = predicted(bundle)
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-4)
    assert [bundle.labels[i] for i in found.argmax(1)] == expected.labels


def test_a_checkpoint_that_has_a_head_for_other_labels(make, tiny, tmp_path):
    """Such as one that was fine-tuned: the bundle's head takes the place of its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)
    own.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tuned")
    bundle = make("pooler_2", folder=tmp_path / "tuned")
    assert not export(bundle, "transformers", str(tmp_path / "out"))["wrapper"]
    expected = [answers(bundle, text) for text in TEXTS]
    np.testing.assert_allclose(by_pipeline(tmp_path / "out", bundle, TEXTS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "stock"),
    [(("first_2",), True), (("first_1",), True), (("first_0",), False), (("first_1", "first_2"), False)],
)
def test_words_by_their_first_token(make, tmp_path, features, stock):
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    bundle = make(*features, task="token-classification")
    made = export(bundle, "transformers", str(tmp_path / "out"))
    assert made["wrapper"] != stock
    more = {} if stock else {"trust_remote_code": True}
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", **more).eval()
    assert model.config.id2label == {0: "B-PER", 1: "O", 2: "I-LOC"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **more)
    batch = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**batch).logits
    for text, row, mask in zip(TEXTS, found.numpy(), batch["attention_mask"].numpy().astype(bool), strict=True):
        np.testing.assert_allclose(row[mask], logits(bundle, text), atol=1e-4)
    tag = pipeline(bundle.task, str(tmp_path / "out"), aggregation_strategy="first", ignore_labels=[], **more)
    text = "unbelievably great trains"
    first = tokenizer(text).word_ids()
    places = [first.index(word) for word in range(3)]
    expected = [bundle.labels[i][-3:] for i in logits(bundle, text)[places].argmax(1)]
    found = tag.aggregate_words(list(_tokens_of(tag, text)), _strategy("FIRST"))
    assert [entity["entity"][-3:] for entity in found] == expected


def _strategy(name):
    from transformers.pipelines.token_classification import AggregationStrategy

    return AggregationStrategy[name]


def _tokens_of(tag, text, **more):
    """What a pipeline's words are made of."""
    parameters = tag._sanitize_parameters(**more)[0]
    (outputs,) = [tag.forward(inputs) for inputs in tag.preprocess(text, **parameters)]
    scores = torch.from_numpy(np.asarray(outputs["logits"][0])).softmax(-1).numpy()
    return tag.gather_pre_entities(
        outputs["sentence"],
        outputs["input_ids"][0],
        scores,
        outputs["offset_mapping"][0],
        outputs["special_tokens_mask"][0].numpy(),
        None,
        word_ids=outputs["word_ids"],
        word_to_chars_map=outputs["word_to_chars_map"],
    )


@pytest.mark.parametrize("features", [("mean_2",), ("mean_1", "mean_2")], ids="+".join)
def test_words_by_the_mean_of_their_tokens(make, tmp_path, features):
    from transformers import AutoTokenizer, pipeline

    bundle = make(*features, task="token-classification")
    made = export(bundle, "transformers", str(tmp_path / "out"))
    assert made["wrapper"]
    words = ["it's", "unbelievably-great", "trains", "zzyzx"]
    text = " ".join(words)
    inside = AutoTokenizer.from_pretrained(bundle.encoder["model"])(words, is_split_into_words=True).word_ids()
    states = vectors(bundle, text)
    means = np.stack([states[[place == word for place in inside]].mean(0) for word in range(len(words))])
    expected = bundle.head.probabilities(means)
    tag = pipeline(bundle.task, str(tmp_path / "out"), trust_remote_code=True)
    tokens = _tokens_of(tag, words, is_split_into_words=True)
    found = tag.aggregate_words(tokens, _strategy("AVERAGE"))
    assert [entity["entity"] for entity in found] == [bundle.labels[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([entity["score"] for entity in found], expected.max(1), atol=1e-5)
    tag(words, is_split_into_words=True, aggregation_strategy="average")  # the whole way


def asked(bundle, question, text):
    """[text's tokens and [CLS], 2] and which of all tokens those are, by NumPy and by hand."""
    _, tokenizer = plain(bundle.encoder["model"])
    inputs = tokenizer([question], [text], truncation=True, max_length=bundle.encoder["max_length"])
    sequences = inputs.sequence_ids(0)
    states = vectors(bundle, question, text)
    own = [0, *(i for i, sequence in enumerate(sequences) if sequence == 1)]
    q = states[[i for i, sequence in enumerate(sequences) if sequence == 0]].mean(0)
    around = np.stack([states[own[max(0, i - 12) : i + 13]].mean(0) for i in range(len(own))])
    seen = np.hstack([states[own], states[own] * q, around * q])
    return seen @ bundle.head.weight.T + bundle.head.bias, own


@pytest.mark.parametrize("features", [("mean_2",), ("mean_1",), ("mean_1", "mean_2")], ids="+".join)
def test_questions(make, tmp_path, features):
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    bundle = make(*features, task="question-answering")
    made = export(bundle, "transformers", str(tmp_path / "out"))
    assert made["classes"] == "BertrayForQuestionAnswering"
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch = tokenizer(PAIRS, TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch)
    found = np.stack([output.start_logits, output.end_logits], -1)
    for row, question, text in zip(found, PAIRS, TEXTS, strict=True):
        expected, own = asked(bundle, question, text)
        np.testing.assert_allclose(row[own], expected, atol=1e-4)
        assert (np.delete(row, own, 0) == -10000).all()


@pytest.fixture(scope="module")
def family(tiny, tmp_path_factory):
    """A function that makes tiny random checkpoints of other families, with MiniLM's tokenizer."""
    import transformers

    def family(name):
        folder = tmp_path_factory.mktemp(name)
        sizes = {"vocab_size": 30522, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        more = {
            "Bert": {},  # its weights in half
            "Roberta": {"type_vocab_size": 1, "max_position_embeddings": 514},
            "DistilBert": {"dim": 32, "n_heads": 2, "hidden_dim": 64, "n_layers": 2},
            "Electra": {"embedding_size": 16},
            "Albert": {"embedding_size": 16},
            "ModernBert": {name: None for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")},
        }[name]
        if name == "DistilBert":
            sizes = {"vocab_size": 30522}
        else:
            more = {"num_hidden_layers": 2, **more}
        torch.manual_seed(1)
        config = getattr(transformers, f"{name}Config")(**sizes, **more, pad_token_id=0)
        model = getattr(transformers, f"{name}Model")(config)
        (model.half() if name == "Bert" else model).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        return folder

    return family


@pytest.mark.parametrize(
    ("name", "features", "wrapper"),
    [
        ("Bert", ("mean_1", "pooler_2"), True),
        ("Roberta", ("pooler_2",), True),  # the head of its class is two layers
        ("DistilBert", ("cls_2",), True),
        ("Electra", ("mean_1", "max_2"), True),
        ("Albert", ("pooler_2",), False),
    ],
)
def test_other_families(make, family, tmp_path, name, features, wrapper):
    folder = family(name)
    bundle = make(*features, folder=folder)
    made = export(bundle, "transformers", str(tmp_path / "texts"))
    assert made["wrapper"] == wrapper
    found = by_pipeline(tmp_path / "texts", bundle, TEXTS, **{"trust_remote_code": True} if wrapper else {})
    np.testing.assert_allclose(found, [answers(bundle, text) for text in TEXTS], atol=1e-5)
    made = export(make("first_1", folder=folder, task="token-classification"), "transformers", str(tmp_path / "tokens"))
    assert made["classes"] == f"{name}ForTokenClassification"
    made = export(make("mean_1", folder=folder, task="question-answering"), "transformers", str(tmp_path / "spans"))
    assert made["classes"] == "BertrayForQuestionAnswering"


def test_layers_stay_where_a_family_ties_more_to_their_number(make, family, tmp_path):
    folder = family("ModernBert")
    bundle = make("mean_1", folder=folder)
    assert export(bundle, "transformers", str(tmp_path / "out"))["wrapper"]
    found = by_pipeline(tmp_path / "out", bundle, TEXTS, trust_remote_code=True)
    np.testing.assert_allclose(found, [answers(bundle, text) for text in TEXTS], atol=1e-5)
    assert export(make("first_1", folder=folder, task="token-classification"), "transformers", str(tmp_path / "1"))[
        "wrapper"
    ]
    with pytest.raises(BundleError, match="pools the last layer"):
        export(bundle, "sentence-transformers", str(tmp_path / "2"))


def test_padding_that_changes_answers_is_found(make, family, tmp_path, monkeypatch):
    from bertray.models import _wrapper_module

    def careless():
        module = _wrapper_module()
        pooled = module._pooled
        module._pooled = lambda name, states, mask, pooler: pooled(name, states, torch.ones_like(mask), pooler)
        return module

    monkeypatch.setattr("bertray.models._wrapper_module", careless)
    with pytest.raises(BundleError, match="with padding, answers otherwise than alone, by 0"):
        export(make("mean_2"), "transformers", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# --- ONNX ---------------------------------------------------------------------------------------------------------


def test_onnx_gives_the_answers_of_texts(make, tmp_path, onnx):
    bundle = make("mean_0", "max_1", "cls_2", "pooler_2")
    made = export(bundle, "onnx", str(tmp_path / "out"))
    expected = [answers(bundle, text) for text in TEXTS]
    found, _ = by_onnx(tmp_path / "out", TEXTS)
    assert found.shape == (len(TEXTS), 3)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(by_onnx(tmp_path / "out", TEXTS[:1])[0], expected[:1], atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["labels"] == list(bundle.labels)
    assert not made["wrapper"] and {"model.onnx", "tokenizer.json"} < set(made["files"])


def test_onnx_of_a_real_encoder(make, minilm, tmp_path, onnx):
    from tokenizers import Tokenizer

    bundle = make("mean_6", folder=minilm.folder)
    export(bundle, "onnx", str(tmp_path / "out"))
    found, mask = by_onnx(tmp_path / "out", TEXTS)
    np.testing.assert_allclose(found, predicted(bundle).probabilities, atol=1e-4)
    alone = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode_batch(TEXTS)
    assert [row.attention_mask for row in alone] == mask.astype(int).tolist()


def test_onnx_takes_pairs(make, tmp_path, onnx, monkeypatch):
    monkeypatch.setattr("bertray.writers._ONE_FILE", 0)  # as if it were large
    bundle = make("max_1", pair="cross", max_length=24, problem="multi_label")
    assert "model.onnx.data" in export(bundle, "onnx", str(tmp_path / "out"))["files"]
    expected = [answers(bundle, *both) for both in zip(TEXTS, PAIRS, strict=True)]
    np.testing.assert_allclose(by_onnx(tmp_path / "out", TEXTS, PAIRS)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "features"),
    [("token-classification", ("mean_1", "mean_2")), ("question-answering", ("mean_2",))],
)
def test_onnx_gives_the_logits_of_tokens(make, tmp_path, onnx, task, features):
    bundle = make(*features, task=task)
    export(bundle, "onnx", str(tmp_path / "out"))
    rows = list(zip(PAIRS, TEXTS, strict=True)) if task == "question-answering" else [(text,) for text in TEXTS]
    found, masks = by_onnx(tmp_path / "out", *map(list, zip(*rows, strict=True)))
    assert found.shape[2] == len(bundle.head.bias)
    assert json.loads((tmp_path / "out" / "export.json").read_text()).get("words") == (
        "mean" if task == "token-classification" else None
    )
    for row, texts, mask in zip(found, rows, masks, strict=True):
        if task == "question-answering":
            expected, own = asked(bundle, *texts)
            np.testing.assert_allclose(row[own], expected, atol=1e-4)
        else:
            np.testing.assert_allclose(row[mask], logits(bundle, *texts), atol=1e-4)


def test_onnx_of_a_family_without_token_types(make, family, tmp_path, onnx):
    bundle = make("mean_2", folder=family("DistilBert"), problem="regression")
    export(bundle, "onnx", str(tmp_path / "out"))
    np.testing.assert_allclose(by_onnx(tmp_path / "out", TEXTS)[0], [answers(bundle, t) for t in TEXTS], atol=1e-5)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["inputs"] == ["input_ids", "attention_mask"]


def test_onnx_names_what_to_install(make, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BertrayError, match=r"needs onnx, which is not installed: pip install 'bertray\[export\]'"):
        export(make("mean_2"), "onnx", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# --- sentence-transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences():
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@pytest.mark.parametrize(
    "features",
    [("mean_2",), ("cls_1",), ("max_2",), ("cls_2", "mean_2"), ("mean_1", "max_1"), ("pooler_2",)],
    ids="+".join,
)
def test_sentence_transformers_gives_the_vectors(make, tmp_path, sentences, features):
    bundle = make(*features)
    export(bundle, "sentence-transformers", str(tmp_path / "out"))
    model = sentences.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.max_seq_length == 64
    found = model.encode(TEXTS, batch_size=len(TEXTS))
    np.testing.assert_allclose(found, [vectors(bundle, text) for text in TEXTS], atol=1e-5)


def test_sentence_transformers_takes_pairs(make, tmp_path, sentences):
    bundle = make("mean_2", pair="cross")
    export(bundle, "sentence-transformers", str(tmp_path / "cross"))
    both = list(zip(TEXTS, PAIRS, strict=True))
    found = sentences.SentenceTransformer(str(tmp_path / "cross"), device="cpu").encode(both)
    np.testing.assert_allclose(found, [vectors(bundle, *pair) for pair in both], atol=1e-5)
    bundle = make("mean_2", pair="siamese")
    export(bundle, "sentence-transformers", str(tmp_path / "siamese"))
    found = sentences.SentenceTransformer(str(tmp_path / "siamese"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, [vectors(bundle, text) for text in TEXTS], atol=1e-5)


@pytest.mark.parametrize(
    ("features", "task"),
    [
        (("mean_1", "mean_2"), "text-classification"),
        (("cls_2", "pooler_2"), "text-classification"),
        (("mean_0",), "text-classification"),
        (("first_2",), "token-classification"),
        (("mean_2",), "question-answering"),
    ],
)
def test_sentence_transformers_is_refused_what_it_cannot_pool(make, tmp_path, features, task):
    with pytest.raises(BundleError, match="pools the last layer .* Export with --format transformers or onnx"):
        export(make(*features, task=task), "sentence-transformers", str(tmp_path / "out"))


# --- what it refuses, and folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["transformers", "onnx"])
def test_siamese_heads_are_refused(make, tmp_path, format):
    with pytest.raises(BundleError, match="siamese"):
        export(make("mean_2", pair="siamese"), format, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("features", "task", "message"),
    [
        (("mean_3",), "text-classification", "uses mean_3, but .* has 2 layers"),
        (("pooler_1",), "text-classification", "uses pooler_1"),
        (("first_1",), "text-classification", "features are first_1"),
        (("cls_2",), "token-classification", "features are cls_2"),
        (("first_1", "mean_1"), "token-classification", "first and mean tokens of words at once"),
        (("mean_1",), "speech", "Bundles for speech cannot be exported"),
    ],
)
def test_bundles_that_no_export_can_hold(make, tmp_path, features, task, message):
    with pytest.raises(BundleError, match=message) as caught:
        export(make(*features, task=task), "transformers", str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_pooler_has_to_be_trained(make, family, tmp_path):
    with pytest.raises(CheckpointError, match="has no trained pooler"):
        export(make("pooler_2", folder=family("DistilBert")), "transformers", str(tmp_path / "out"))


def test_formats_have_names(make, tmp_path):
    with pytest.raises(BertrayError, match=r"--format must be one of transformers, onnx, sentence-transformers\. Got"):
        export(make("mean_2"), "keras", str(tmp_path / "out"))


def test_urls_are_refused(make):
    with pytest.raises(BertrayError, match="must be a local folder"):
        export(make("mean_2"), "transformers", "s3://box/out")


def test_a_mark_may_be_damaged(make, tmp_path):
    (tmp_path / "export.json").write_text('{"files": [1]}')
    with pytest.raises(BertrayError, match="export.json is damaged. Delete"):
        export(make("mean_2"), "transformers", str(tmp_path))


def test_an_earlier_export_is_replaced_and_nothing_else(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(make("mean_2"), "sentence-transformers", str(out))
    (out / "mine.txt").write_text("mine")
    made = export(make("first_2", task="token-classification"), "transformers", str(out))
    assert sorted(os.listdir(out)) == sorted([*made["files"], "mine.txt"])
    assert not (out / "1_Pooling").exists()
    assert len({(out / name).stat().st_mode for name in made["files"]}) == 1
    (out / "export.json").unlink()
    with pytest.raises(BertrayError, match="is no earlier export"):
        export(make("mean_2"), "transformers", str(out))
    with pytest.raises(BertrayError, match="is no earlier export"):
        export(make("mean_2"), "transformers", str(out / "mine.txt"))


def test_cards_say_what_it_is(make, tmp_path):
    export(make("mean_1", truncation="window", overlap=8), "transformers", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert not export(make("pooler_2"), "transformers", str(tmp_path / "stock"))["wrapper"]
    assert "no code of its own" in (tmp_path / "stock" / "README.md").read_text()
    for part in ("BertrayForSequenceClassification", "trust_remote_code=True", "bad, good, odd", "windows", "mean_1"):
        assert part in card
    usage = "\n".join(line.strip() for line in card.split("Use it:")[1].split("[bertray]")[0].strip().splitlines())
    names = {}
    exec(usage.replace("PATH OF THIS FOLDER", str(tmp_path / "out")), names)


def test_the_command(make, tmp_path, capfd):
    bundles.save(make("pooler_2"), str(tmp_path / "head"))
    arguments = ["export", str(tmp_path / "head"), "--format", "transformers", "--output"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert f"exported for transformers: {tmp_path / 'out'}, loaded by BertForSequenceClassification (no code" in (
        capfd.readouterr().out
    )
    assert main([*arguments, str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["wrapper"] is False
    assert main([*arguments, str(tmp_path / "head")]) == 2
    assert "is no earlier export" in capfd.readouterr().err
