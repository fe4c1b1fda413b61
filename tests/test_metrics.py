import numpy as np
import pytest
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
    assert metrics.accuracy(nothing) == metrics.macro_f1(nothing) == 0
