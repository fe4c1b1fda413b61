import warnings
from math import isnan, nan

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from bertray import metrics


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 9))
    rows = int(rng.integers(1, 200))
    true, probabilities = rng.integers(0, classes, rows), rng.dirichlet(np.ones(classes), rows)
    true[true == classes - 1] = 0 if seed % 2 else classes - 1  # sometimes a class without rows
    given = probabilities.argmax(1)
    matrix = metrics.confusion(true, given, classes)
    names = list(range(classes))
    assert (matrix == reference.confusion_matrix(true, given, labels=names)).all()
    assert metrics.accuracy(matrix) == pytest.approx(reference.accuracy_score(true, given))
    assert metrics.macro_f1(matrix) == pytest.approx(reference.f1_score(true, given, average="macro"))
    assert metrics.micro_f1(matrix) == pytest.approx(reference.f1_score(true, given, average="micro"))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        true, given, labels=names, zero_division=0
    )
    ours = metrics.per_class(matrix)
    for name, values in {"precision": precision, "recall": recall, "f1": f1, "support": support}.items():
        np.testing.assert_allclose(ours[name], values)
    log_loss = reference.log_loss(true, probabilities, labels=names)
    assert metrics.losses(probabilities, true).mean() == pytest.approx(log_loss)


def test_a_sure_mistake_has_a_finite_loss():
    assert np.isfinite(metrics.losses(np.array([[1.0, 0.0]], np.float32), np.array([1]))).all()


def test_no_rows():
    nothing = np.zeros((3, 3), np.int64)
    assert metrics.accuracy(nothing) == metrics.macro_f1(nothing) == metrics.micro_f1(nothing) == 0


@pytest.mark.parametrize("seed", range(8))
def test_auroc_equals_scikit_learn_with_ties(seed):
    rng = np.random.default_rng(seed)
    positive = np.append(rng.random(98) < 0.3, [True, False])
    scores = rng.integers(0, 3 + 20 * seed, 100) / 7
    assert metrics.auroc(scores, positive) == pytest.approx(reference.roc_auc_score(positive, scores))
    assert metrics.auroc(scores.astype(np.float32), positive) == pytest.approx(metrics.auroc(scores, positive))


def test_auroc_by_hand():
    yes, no = True, False
    assert metrics.auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([no, no, yes, yes])) == 0.75
    assert metrics.auroc(np.array([1.0, 1.0, 1.0]), np.array([no, yes, yes])) == 0.5
    assert metrics.auroc(np.array([2.0, 1.0, 3.0]), np.array([0, 1, 1])) == 0.5  # flags as numbers


@pytest.mark.parametrize("positive", [[], [True, True], [False, False]])
def test_auroc_of_one_kind_of_rows_is_not_defined(positive):
    assert isnan(metrics.auroc(np.arange(len(positive)) / 2, np.array(positive, bool)))


def test_auroc_of_a_score_that_is_no_number_is_not_defined():
    assert isnan(metrics.auroc(np.array([nan, 1.0, 2.0]), np.array([False, True, True])))


@pytest.mark.parametrize("seed", range(5))
def test_macro_auroc_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    classes = 3 + seed
    true = np.append(np.arange(classes), rng.integers(0, classes, 60))
    probabilities = rng.dirichlet(np.ones(classes), len(true)).round(1 + seed)
    probabilities[:, 0] += 1 - probabilities.sum(1)
    expected = reference.roc_auc_score(true, probabilities, multi_class="ovr", average="macro")
    assert metrics.macro_auroc(probabilities, true) == pytest.approx(expected)


def test_macro_auroc_leaves_out_classes_without_rows():
    probabilities = np.array([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0]])
    assert metrics.macro_auroc(probabilities, np.array([0, 1, 1])) == 1
    assert isnan(metrics.macro_auroc(probabilities, np.array([1, 1, 1])))
    assert isnan(metrics.macro_auroc(probabilities[:0], np.array([], int)))


@pytest.mark.parametrize("seed", range(8))
def test_several_labels_a_row_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(1, 80)), int(rng.integers(2, 9))
    true, given = rng.random((rows, labels)) < 0.3, rng.random((rows, labels)) < 0.4
    true[:, 0] = given[:, 0] = False  # a label that does not occur
    true[:, 1], given[0, 1] = False, True  # one that is only given
    half = rows // 2
    counts = metrics.label_counts(true, given)
    parts = metrics.label_counts(true[:half], given[:half]) + metrics.label_counts(true[half:], given[half:])
    assert (counts == parts).all()
    precision, recall, f1, support = reference.precision_recall_fscore_support(true, given, zero_division=0)
    ours = metrics.per_label(counts)
    for name, values in {"precision": precision, "recall": recall, "f1": f1, "support": support}.items():
        np.testing.assert_allclose(ours[name], values)
    occurring = np.flatnonzero(counts.any(1))
    for average, mean in (("micro", metrics.micro), ("macro", metrics.macro)):
        expected = reference.precision_recall_fscore_support(
            true, given, average=average, labels=occurring, zero_division=0
        )
        assert list(mean(counts).values()) == pytest.approx(expected[:3])
    assert metrics.exact_share(true, given) == pytest.approx(reference.accuracy_score(true, given))


def test_no_labels():
    nothing = np.zeros((0, 4), bool)
    counts = metrics.label_counts(nothing, nothing)
    assert counts.shape == (4, 3) and not counts.any()
    assert metrics.micro(counts) == metrics.macro(counts) == {"precision": 0, "recall": 0, "f1": 0}
    assert metrics.exact_share(nothing, nothing) == 0


@pytest.mark.parametrize("seed", range(6))
def test_regression_equals_scipy_and_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=50).round(seed) + 1e3 * seed  # few digits make ties
    given = (true + rng.normal(size=50)).round(1)
    assert metrics.regression(true, given) == pytest.approx(
        {
            "pearson": stats.pearsonr(true, given).statistic,
            "spearman": stats.spearmanr(true, given).statistic,
            "rmse": reference.root_mean_squared_error(true, given),
            "mae": reference.mean_absolute_error(true, given),
            "r2": reference.r2_score(true, given),
        }
    )


def test_regression_to_a_constant():
    true, same = np.array([1.0, 2.0, 3.0]), np.full(3, 0.1)  # the mean of 0.1, 0.1 and 0.1 is not 0.1
    found = metrics.regression(true, same)
    assert found["pearson"] == found["spearman"] == 0
    assert found["r2"] == pytest.approx(reference.r2_score(true, same))
    assert metrics.regression(same, true) | {"rmse": 0, "mae": 0} == dict.fromkeys(found, 0)
    assert metrics.regression(same, same) == dict.fromkeys(found, 0)


def test_regression_of_whole_numbers_of_nothing_and_of_no_number():
    whole = metrics.regression(np.array([1, 2, 4]), np.array([1, 2, 4]))
    assert whole == pytest.approx({"pearson": 1, "spearman": 1, "rmse": 0, "mae": 0, "r2": 1})
    assert set(metrics.regression(np.array([]), np.array([])).values()) == {0.0}
    assert all(map(isnan, metrics.regression(np.array([1.0, nan, 2.0]), np.array([1.0, 2.0, 3.0])).values()))
    assert isnan(metrics.regression(np.array([1.0, 2.0]), np.array([1.0, nan]))["spearman"])


@pytest.mark.parametrize(
    ("tags", "expected"),  # what seqeval 1.2.2 finds, its ends moved by one
    [
        ("", []),
        ("O", []),
        ("B-A I-A O B-B", [(0, 2, "A"), (3, 4, "B")]),
        ("I-A I-A O", [(0, 2, "A")]),
        ("B-A I-B", [(0, 1, "A"), (1, 2, "B")]),
        ("I-A I-B I-B", [(0, 1, "A"), (1, 3, "B")]),
        ("B-A B-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A I-A B-A I-A", [(0, 2, "A"), (2, 4, "A")]),
        ("I-A B-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A O I-A", [(0, 1, "A"), (2, 3, "A")]),
        ("O I-A I-A B-B I-B I-A", [(1, 3, "A"), (3, 5, "B"), (5, 6, "A")]),
        ("B-A-c I-A-c I-A", [(0, 2, "A-c"), (2, 3, "A")]),
        ("B I O", [(0, 2, "_")]),
        ("S-A S-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A I-A E-A E-A", [(0, 3, "A"), (3, 4, "A")]),
        ("B-A E-A I-A", [(0, 2, "A"), (2, 3, "A")]),
    ],
)
def test_entities(tags, expected):
    assert metrics.entities(tags.split()) == set(expected)


@pytest.mark.parametrize("tag", ["", "A", "L-PER", "person"])
def test_a_tag_of_another_scheme(tag):
    with pytest.raises(ValueError, match="no tag"):
        metrics.entities(["O", tag])


def test_entity_scores():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O", "B-LOC"], []]
    given = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "O", "B-LOC"], []]
    counts = metrics.entity_counts(true, given)
    assert counts == {"LOC": (2, 2, 2), "ORG": (0, 0, 1), "PER": (0, 1, 1)}
    assert counts == metrics.sum_counts(metrics.entity_counts([a], [b]) for a, b in zip(true, given, strict=True))
    scores = metrics.entity_scores(counts)
    assert scores["micro"] == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})
    assert scores["macro"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert scores["types"]["LOC"] == {"precision": 1, "recall": 1, "f1": 1, "support": 2}
    assert scores["types"]["ORG"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_no_entities():
    assert metrics.entity_scores(metrics.entity_counts([["O"]], [["O"]])) == {
        "micro": {"precision": 0, "recall": 0, "f1": 0},
        "macro": {"precision": 0, "recall": 0, "f1": 0},
        "types": {},
    }


def test_texts_with_tags_of_other_lengths():
    with pytest.raises(ValueError, match="shorter"):
        metrics.entity_counts([["O"], ["O"]], [["O"]])


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),  # what evaluate-v2.0 gives
    [
        ("The  Cat!", ["cat"], 1, 1),
        ("the black cat", ["a cat", "dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("theatre", ["the atre"], 0, 0),
        ("U.S.", ["us"], 1, 1),
        ("x-y", ["x y"], 0, 0),
        ("É\u00a0é", ["é é"], 1, 1),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),
        ("", ["a", "cat"], 0, 0),
        ("black cat", ["cat", "black cat"], 1, 1),
    ],
)
def test_answers(answer, references, exact, f1):
    assert metrics.exact_match(answer, references) == exact
    assert metrics.span_f1(answer, references) == pytest.approx(f1)


def test_bootstrap_covers_a_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = metrics.bootstrap(lambda rows: {"mean": values[rows].mean()}, 400, 400)["mean"]
    error = 2 / 400**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_bootstrap_is_repeatable_and_leaves_out_what_is_not_defined():
    def statistic(rows):
        return {"share": rows.mean(), "sometimes": nan if 0 in rows else 1.0, "never": nan}

    found = metrics.bootstrap(statistic, 10, 50, seed=3)
    assert found["share"] == metrics.bootstrap(statistic, 10, 50, seed=3)["share"]
    assert found["share"] != metrics.bootstrap(statistic, 10, 50, seed=4)["share"]
    assert found["sometimes"] == (1, 1)
    assert all(map(isnan, found["never"]))


def test_bootstrap_of_no_rows():
    with warnings.catch_warnings(action="ignore"):  # the mean of nothing
        assert all(map(isnan, metrics.bootstrap(lambda rows: {"mean": rows.mean()}, 0)["mean"]))
