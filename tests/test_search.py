"""Settings, and the choice among them by rows that were left out, against heads fitted by scikit-learn."""

import json
from itertools import pairwise

import numpy as np
import pytest
from handmade import store_of, words_of
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

from bertray import metrics
from bertray.errors import SpecError
from bertray.heads import LinearHead, probabilities
from bertray.samples import Share, Wanted, samples
from bertray.search import (
    ALWAYS,
    Choice,
    Setting,
    choose,
    fit_one,
    from_bytes,
    lengths_of,
    settings,
    threshold,
    to_bytes,
)
from bertray.spans import null_margin
from bertray.spec import Head, Search

ALONE = Share(0, 1)
NAMES = {"a": 0, "b": 1, "c": 2}
STORED = ["mean_4", "cls_4", "mean_5", "cls_5", "mean_6", "cls_6"]


def test_without_a_search_there_is_one_setting():
    assert settings(Head(l2=0.1, seed=3), STORED, 6) == [Setting(tuple(STORED), "concat", 0.1, 3)]


def test_settings_are_every_combination_once():
    search = Search(l2=(0.1, 1.0), layers=("last", (4, -1)), pooling=("mean", ("cls", "mean")), seeds=(0, 1))
    found = settings(Head(search=search), STORED, 6)
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2
    assert {each.features for each in found} == {
        ("mean_6",),
        ("cls_6", "mean_6"),
        ("mean_4", "mean_6"),
        ("cls_4", "mean_4", "cls_6", "mean_6"),
    }
    assert settings(Head(search=Search(layers=(6, "last", -1))), STORED, 6) == [
        Setting(("mean_6", "cls_6"), "concat", 0.0, 0)
    ]


def test_a_single_feature_is_not_combined_in_several_ways():
    found = settings(
        Head(search=Search(layers=(6, (5, 6)), combine=("mean", "mix", "concat"))), ["mean_5", "mean_6"], 6
    )
    assert [(each.features, each.combine) for each in found] == [
        (("mean_6",), "concat"),
        (("mean_5", "mean_6"), "mean"),
        (("mean_5", "mean_6"), "mix"),
        (("mean_5", "mean_6"), "concat"),
    ]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (Search(layers=(3,)), "asks for mean_3, which is not stored. .* there are mean_4, cls_4"),
        (Search(pooling=("max",)), "asks for max_4, which is not stored"),
        (Search(layers=("all",)), "asks for mean_0"),
        (Search(layers=(7,)), "must be from 0"),
    ],
)
def test_features_that_are_not_there(search, message):
    with pytest.raises(SpecError, match=message):
        settings(Head(search=search), STORED, 6)


def rows(folder, count=150, seed=0, form="name"):
    """Noisy classes, or numbers, in the second of two features; the first is noise."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, count)
    signal = np.eye(3)[true] + rng.normal(0, 0.7, (count, 3))
    vectors = np.hstack([rng.normal(size=(count, 4)), signal, rng.normal(size=(count, 1))]).astype(np.float32)
    if form == "name":
        labels = [list(NAMES)[i] for i in true]
    elif form == "names":
        labels = [json.dumps([name for i, name in enumerate(NAMES) if i >= t]) for t in true]
    else:
        labels = [repr(float(number)) for number in signal @ [1, 2, 3] + rng.normal(0, 0.3, count)]
    texts = [f"text {rng.integers(90)}" for _ in range(count)]
    return store_of(folder, {"text": texts, "label": labels}, vectors, ("mean_5", "mean_6")), vectors, labels


SPEC = Head(optimizer="lbfgs", l2=0.01, search=Search(l2=(0.001, 0.01, 0.1), layers=(5, 6, (5, 6))))


def chosen(wanted, spec=SPEC):
    with samples(wanted, ALONE, device="cpu") as mine:
        choice = choose(mine, wanted, settings(spec, wanted.features, 6), spec, ALONE)
        return choice, fit_one(mine, wanted, choice, spec, ALONE, lambda loss: None), mine.folds.numpy().copy()


def test_what_is_left_out_is_judged_by_heads_that_never_saw_it(tmp_path):
    store, vectors, labels = rows(tmp_path)
    choice, _, folds = chosen(Wanted((store,), "name", NAMES, 3, folds=4))
    assert len(choice.curve) == 9
    assert choice.setting.features != ("mean_5",)
    y = np.array([NAMES[label] for label in labels])
    np.testing.assert_array_equal(choice.targets, y)
    for point in choice.curve:
        x = vectors[:, [i for i in range(8) if f"mean_{5 + i // 4}" in point["features"]]]
        given = np.zeros((len(x), 3))
        for fold in range(4):
            seen = folds != fold
            model = LogisticRegression(C=1 / (point["l2"] * seen.sum()), tol=1e-8, max_iter=5_000).fit(x[seen], y[seen])
            given[~seen] = model.decision_function(x[~seen])
        assert point["score"] == pytest.approx((given.argmax(1) == y).mean(), abs=1.5 / len(y))
        assert point["low"] < point["score"] < point["high"]
        if point["chosen"]:
            assert Setting(point["features"], point["combine"], point["l2"], point["seed"]) == choice.setting
            centred = choice.logits - choice.logits.mean(1, keepdims=True)
            np.testing.assert_allclose(centred, given - given.mean(1, keepdims=True), atol=0.02)
    assert [point["score"] for point in choice.curve if point["chosen"]] == [max(p["score"] for p in choice.curve)]


def test_the_head_is_that_of_all_rows_divided_by_the_temperature(tmp_path):
    store, vectors, labels = rows(tmp_path)
    choice, head, _ = chosen(Wanted((store,), "name", NAMES, 3, folds=4))
    x = vectors[:, [i for i in range(8) if f"mean_{5 + i // 4}" in choice.setting.features]]
    y = np.array([NAMES[label] for label in labels])
    model = LogisticRegression(C=1 / (choice.setting.l2 * len(x)), tol=1e-10, max_iter=5_000).fit(x, y)
    expected = probabilities("softmax", (model.decision_function(x) / choice.temperature).astype(np.float32))
    np.testing.assert_allclose(head.probabilities(x), expected, atol=1e-3)
    loss = [
        metrics.losses(probabilities("softmax", choice.logits / np.float32(heat)), choice.targets).mean()
        for heat in (choice.temperature, 0.9 * choice.temperature, 1.1 * choice.temperature)
    ]
    assert min(loss) == loss[0]


def test_numbers_are_chosen_by_how_much_of_their_variance_is_explained(tmp_path):
    store, vectors, labels = rows(tmp_path, form="number")
    choice, _, folds = chosen(Wanted((store,), "number", {}, 1, folds=3))
    y = np.array(labels, float)
    assert choice.temperature == 1
    for point in choice.curve:
        x = vectors[:, [i for i in range(8) if f"mean_{5 + i // 4}" in point["features"]]].astype(float)
        given = np.zeros(len(y))
        for fold in range(3):
            seen = folds != fold
            given[~seen] = Ridge(alpha=point["l2"] * seen.sum()).fit(x[seen], y[seen]).predict(x[~seen])
        assert point["score"] == pytest.approx(r2_score(y, given), abs=1e-3)


def test_several_labels_are_chosen_by_micro_f1(tmp_path):
    store, *_ = rows(tmp_path, form="names")
    choice, *_ = chosen(Wanted((store,), "names", NAMES, 3, folds=3))
    best = metrics.micro(metrics.label_counts(choice.targets > 0, choice.logits > 0))["f1"]
    assert best == pytest.approx(max(point["score"] for point in choice.curve))


def test_rows_to_choose_by_take_the_place_of_folds(tmp_path):
    train, *_ = rows(tmp_path / "train")
    dev, u, others = rows(tmp_path / "dev", 60, 1)
    choice, head, _ = chosen(Wanted((train, dev), "name", NAMES, 3, folds=4))
    assert len(choice.targets) == 60
    assert choice.targets.tolist() == [NAMES[label] for label in others]
    given = LinearHead(head.weight * choice.temperature, head.bias * choice.temperature)
    columns = [i for i in range(8) if f"mean_{5 + i // 4}" in choice.setting.features]
    np.testing.assert_allclose(given.logits(u[:, columns]), choice.logits, atol=0.02)  # dev rows are never fitted on
    alone, same, _ = chosen(Wanted((train,), "name", NAMES, 3), Head(optimizer="lbfgs", l2=choice.setting.l2))
    assert alone.logits is None
    assert alone.setting.features == ("mean_5", "mean_6")
    assert same.weight.shape == (3, 8)


def test_early_stopping_keeps_the_epoch_that_does_best_on_rows_to_choose_by(tmp_path):
    """Training labels are half noise: the loss on other rows falls, and then rises."""
    rng = np.random.default_rng(0)
    x, u = (rng.normal(size=(count, 60)).astype(np.float32) for count in (120, 200))
    direction = rng.normal(size=60)
    stores = []
    for name, vectors, noise in (("train", x, 8.0), ("dev", u, 4.0)):
        labels = np.where(vectors @ direction + rng.normal(0, noise, len(vectors)) > 0, "a", "b").tolist()
        stores.append(
            store_of(tmp_path / name, {"text": [f"{i}" for i in range(len(vectors))], "label": labels}, vectors)
        )
    wanted = Wanted(tuple(stores), "name", {"a": 0, "b": 1}, 2)
    y = np.array([wanted.classes[label] for label in stores[1].load()[1]])

    def loss(epochs, stop):
        spec = Head(optimizer="sgd", lr=0.02, epochs=epochs, batch_size=20, early_stopping=stop, folds=0)
        choice, head, _ = chosen(wanted, spec)
        heat = np.float32(choice.temperature)
        return metrics.losses(probabilities("softmax", head.logits(u) * heat), y).mean()

    first, late, stopped = loss(1, 0), loss(300, 0), loss(300, 40)
    assert stopped < min(first, late) - 0.003, (first, late, stopped)


def test_words_are_chosen_by_entities_also_where_texts_have_none(tmp_path):
    counts = [3, 0, 4, 2, 0, 5, 1, 6, 2, 0] * 6
    vectors, spans = words_of(counts, 4)
    tags = [["B-x" if word[0] > 0.3 else "O" for word in own] for own in vectors]
    table = {"text": [f"t{i}" for i in range(60)], "label": [json.dumps(own) for own in tags]}
    store = store_of(tmp_path, table, vectors, ("first_6",), spans)
    wanted = Wanted((store,), "tokens", {"B-x": 0, "O": 1}, 2, folds=3, names=("B-x", "O"))
    choice, *_ = chosen(wanted, Head(optimizer="lbfgs", search=Search(l2=(1e-4, 10.0))))
    assert choice.sizes == tuple(counts)
    assert choice.setting.l2 == 1e-4
    given = [
        ["B-x" if row.argmax() == 0 else "O" for row in part]
        for part in np.split(choice.logits, np.cumsum(counts)[:-1])
    ]
    scores = metrics.entity_scores(metrics.entity_counts(tags, given))
    assert choice.curve[0]["score"] == pytest.approx(scores["micro"]["f1"])
    assert choice.curve[0]["score"] > 0.8 > choice.curve[1]["score"]


def questions(folder, count=60):
    """Contexts of up to 9 tokens: the answer is where the first number is high; every third has none."""
    rng = np.random.default_rng(0)
    counts = [2 + int(n) for n in rng.integers(3, 10, count)]
    vectors, spans = words_of(counts, 5)
    labels = []
    for number, own in enumerate(vectors):
        tokens = np.arange(len(own) - 2) * 2
        spans[number] = np.vstack([np.zeros((2, 2), np.int64), np.stack([tokens, tokens + 1], 1)])
        own[0] = 1
        own[2:, 0] -= 3
        if number % 3:
            first = int(rng.integers(0, len(tokens)))
            last = min(len(tokens) - 1, first + int(rng.integers(0, 2)))
            own[2 + first : 3 + last, 0] += 6
            own[1, 1] = -4
            labels.append([[2 * first, "x" + " x" * (last - first)]])
        else:
            own[1, 1] = 4
            labels.append([])
    rows = {"text": ["q"] * count, "text_pair": [f"c{i}" for i in range(count)], "label": list(map(json.dumps, labels))}
    return store_of(folder, rows, vectors, ("mean_6",), spans), labels, counts


def test_questions_are_chosen_by_likelihood_and_get_lengths_and_a_threshold(tmp_path):
    store, labels, counts = questions(tmp_path)
    wanted = Wanted((store,), "answers", {}, 2, folds=3)
    spec = Head(optimizer="lbfgs", search=Search(l2=(1e-3, 100.0)))
    with samples(wanted, ALONE, device="cpu") as mine:
        choice = choose(mine, wanted, settings(spec, wanted.features, 6), spec, ALONE)
        lengths = lengths_of(mine, ALONE)
    assert choice.setting.l2 == 1e-3
    assert choice.sizes == tuple(count - 1 for count in counts)
    edges = np.cumsum([0, *choice.sizes])
    each = []
    for start, stop in pairwise(edges.tolist()):
        z = choice.logits[start:stop].astype(float)
        log_p = z - np.log(np.exp(z).sum(0))
        each.append((choice.targets[start:stop] * log_p).sum() / 2)
    assert choice.curve[0]["score"] == pytest.approx(np.mean(each), abs=1e-5)
    long = [1 + text.count(" ") for label in labels for _, text in label]
    expected = np.bincount(long, minlength=31)[1:] + 1
    np.testing.assert_allclose(np.exp(lengths), expected / expected.sum(), rtol=1e-6)
    margins = np.array([null_margin(choice.logits[i:j], lengths) for i, j in pairwise(edges.tolist())])
    none = np.array([not label for label in labels])
    found = threshold(choice, 0.0, "answers", lengths)
    right = [((margins > at) == none).mean() for at in [*(margins - 1e-6), margins.max() + 1]]
    assert ((margins > found) == none).mean() == max(right) > 0.8
    assert threshold(Choice(choice.setting), 0.0, "answers", lengths) == ALWAYS


def test_questions_that_all_have_answers_always_get_one(tmp_path):
    choice = Choice(
        Setting(("mean_6",), "concat", 0.0, 0),
        logits=np.zeros((4, 2), np.float32),
        targets=np.array([[0, 0], [1, 1], [0, 0], [1, 1]], np.float32),
        sizes=(2, 2),
    )
    assert threshold(choice, 0.0, "answers", (0.0,)) == ALWAYS


def test_where_few_questions_have_no_answer_all_may_get_one():
    """The likeliest to have none has one: to give it none would be wrong twice over."""
    logits = [[[9, 9], [0, 0]], [[8, 8], [0, 0]], [[0, 0], [9, 9]], [[1, 1], [0, 0]]]
    targets = [[[0, 0], [1, 1]]] * 3 + [[[1, 1], [0, 0]]]
    choice = Choice(
        Setting(("mean_6",), "concat", 0.0, 0),
        logits=np.array(logits, np.float32).reshape(8, 2),
        targets=np.array(targets, np.float32).reshape(8, 2),
        sizes=(2, 2, 2, 2),
    )
    margins = np.array([null_margin(choice.logits[i : i + 2], (0.0,)) for i in (0, 2, 4, 6)])
    found = threshold(choice, 0.0, "answers", (0.0,))
    none = np.array([False, False, False, True])
    best = max(((margins > at) == none).sum() for at in [*(margins - 1e-6), margins.max() + 1])
    assert ((margins > found) == none).sum() == best == 3 and found > margins.max()


def test_the_threshold_is_the_lowest_that_is_accurate_enough():
    p = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    logits = np.stack([np.log(p), np.log(1 - p)], 1).astype(np.float32)
    choice = Choice(Setting(("mean_6",), "concat", 0.0, 0), logits=logits, targets=np.array([0, 0, 1, 0, 1]))
    assert threshold(choice, 0.0, "name", ()) == 0
    at = threshold(choice, 0.9, "name", ())
    assert 0.8 < at <= 0.9 + 1e-6
    none = Choice(choice.setting, logits=logits, targets=np.array([1] * 5))
    assert threshold(none, 0.9, "name", ()) > 1


@pytest.mark.parametrize("full", [True, False])
def test_a_choice_comes_back_from_a_file(full):
    setting = Setting(("mean_5", "cls_6"), "mix", 0.1, 7)
    choice = Choice(setting)
    if full:
        logits, targets = np.ones((3, 2), np.float32), np.array([0, 1, 1])
        choice = Choice(setting, "accuracy", ({"score": 0.5, "features": ["mean_5"]},), logits, targets, 1.5, (1, 2))
    found = from_bytes(to_bytes(choice))
    for name in ("setting", "metric", "curve", "temperature", "sizes"):
        assert getattr(found, name) == getattr(choice, name)
    for name in ("logits", "targets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(choice, name))
    with pytest.raises((ValueError, KeyError, OSError)):
        from_bytes(b"junk")


@pytest.mark.parametrize("texts", [1, 2, 9])
def test_folds_that_few_texts_leave_empty(tmp_path, texts):
    rng = np.random.default_rng(0)
    rows = {"text": [f"t{i % texts}" for i in range(30)], "label": [list(NAMES)[i % 3] for i in range(30)]}
    store = store_of(tmp_path, rows, rng.normal(size=(30, 4)).astype(np.float32))
    choice, head, folds = chosen(Wanted((store,), "name", NAMES, 3, folds=8), Head(optimizer="lbfgs", l2=0.1))
    assert len(set(folds.tolist())) <= texts
    assert choice.logits.shape == (30, 3)
    assert np.isfinite(choice.logits).all() and np.isfinite(head.weight).all()
