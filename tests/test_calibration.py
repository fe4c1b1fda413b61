import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from sklearn.calibration import calibration_curve

from bertray import calibration
from bertray.calibration import COLDEST, HOTTEST


def drawn(rng, logits):
    """[n] a class of each row, drawn with the probabilities that its logits tell."""
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize("seed", range(5))
def test_reliability_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.random(300) ** (1 + seed)
    correct = rng.random(300) < confidence
    found = calibration.reliability(confidence, correct, 10)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10)  # without the empty bins
    filled = found.count > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], mean)
    assert found.ece == pytest.approx((found.count[filled] / 300) @ np.abs(accuracy - mean))


def test_reliability_by_hand():
    confidence = np.array([0.0, 0.5, 0.51, 1.0, 0.9, 0.8])
    correct = np.array([False, True, True, False, True, True])
    found = calibration.reliability(confidence, correct, 2)
    assert found.count.tolist() == [2, 4]  # a bin holds its upper edge
    assert found.confidence.tolist() == pytest.approx([0.25, 3.21 / 4])
    assert found.accuracy.tolist() == [0.5, 0.75]
    assert found.ece == pytest.approx((abs(1 - 0.5) + abs(3 - 3.21)) / 6)
    assert calibration.reliability(confidence, correct.astype(int), 2).ece == found.ece


def test_reliability_of_parts_adds_up():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(100).astype(np.float32), rng.random(100) < 0.5
    whole = calibration.reliability(confidence, correct)
    parts = calibration.reliability(confidence[:30], correct[:30]) + calibration.reliability(
        confidence[30:], correct[30:]
    )
    assert (whole.count == parts.count).all() and whole.count.sum() == 100
    np.testing.assert_allclose(whole.accuracy, parts.accuracy)
    np.testing.assert_allclose(whole.confidence, parts.confidence)
    assert whole.ece == pytest.approx(parts.ece)


def test_reliability_of_nothing():
    nothing = calibration.reliability(np.array([]), np.array([], bool), 3)
    assert nothing.ece == 0 and nothing.accuracy.tolist() == nothing.confidence.tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_temperature_has_the_least_loss(seed):
    rng = np.random.default_rng(seed)
    scale = [0.15, 0.5, 1, 3, 8, 12][seed]
    logits = rng.normal(size=(400, 2 + seed))
    true = drawn(rng, logits)

    def loss(log_t):
        return -log_softmax(logits * scale / np.exp(log_t), axis=1)[np.arange(400), true].mean()

    best = minimize_scalar(loss, bounds=np.log([COLDEST, HOTTEST]), options={"xatol": 1e-9})
    found = calibration.temperature((logits * scale).astype(np.float32), true)
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    assert found == pytest.approx(scale, rel=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_of_labels_has_the_least_loss(seed):
    rng = np.random.default_rng(seed)
    scale = [0.2, 0.7, 1, 4, 10][seed]
    logits = 2 * rng.normal(size=(300, 1 + seed))
    true = rng.random(logits.shape) < expit(logits)

    def loss(log_t):
        return np.logaddexp(0, np.where(true, -1, 1) * logits * scale / np.exp(log_t)).mean()

    best = minimize_scalar(loss, bounds=np.log([COLDEST, HOTTEST]), options={"xatol": 1e-9})
    found = calibration.temperature_of_labels(logits * scale, true)
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    assert found == pytest.approx(scale, rel=0.3)


@pytest.mark.parametrize("size", [0.1, 1, 30, 400, 1e4])
def test_temperature_keeps_its_limits(size):
    logits = size * np.eye(3)
    assert calibration.temperature(logits, np.array([0, 1, 2])) == pytest.approx(COLDEST)
    assert calibration.temperature(logits, np.array([1, 2, 0])) == pytest.approx(HOTTEST)
    flags = np.eye(3, dtype=bool)
    assert calibration.temperature_of_labels(logits - size / 2, flags) == pytest.approx(COLDEST)
    assert calibration.temperature_of_labels(logits - size / 2, ~flags) == pytest.approx(HOTTEST)


def test_temperature_of_one_sure_mistake():
    """One row of four is wrong: p = 3/4 is best, at size / T = log 3 for two classes."""
    for size in (0.5, 5.0, 20.0):
        logits = size * np.array([[1.0, 0.0]] * 4)
        assert calibration.temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(size / np.log(3))
        flags = np.array([[True], [True], [True], [False]])
        assert calibration.temperature_of_labels(logits[:, :1], flags) == pytest.approx(size / np.log(3))


def test_temperature_does_nothing_where_it_makes_no_difference():
    assert calibration.temperature(np.full((5, 3), 0.1), np.array([0, 1, 2, 0, 1])) == 1
    assert calibration.temperature(np.zeros((0, 3)), np.array([], int)) == 1
    assert calibration.temperature(np.ones((2, 1)), np.array([0, 0])) == 1
    assert calibration.temperature_of_labels(np.zeros((2, 2)), np.eye(2, dtype=bool)) == 1
    assert calibration.temperature_of_labels(np.zeros((0, 2)), np.zeros((0, 2), bool)) == 1


def test_abstention_by_hand():
    confidence = np.array([0.9, 0.5, 0.7, 0.7])
    curve = calibration.abstention(confidence, np.array([True, False, True, False]))
    assert curve.threshold.tolist() == [0.5, 0.7, 0.9]
    assert curve.coverage.tolist() == [1, 0.75, 0.25]
    assert curve.accuracy.tolist() == pytest.approx([0.5, 2 / 3, 1])


@pytest.mark.parametrize("seed", range(5))
def test_abstention_answers_what_is_above_the_threshold(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.random(50 * 4**seed).astype(np.float32).round(2 + seed)
    correct = rng.random(len(confidence)) < confidence
    curve = calibration.abstention(confidence, correct)
    assert len(curve.threshold) <= 100 and (np.diff(curve.threshold) > 0).all()
    assert curve.coverage[0] == 1 and curve.threshold[-1] == confidence.max()
    for threshold, coverage, accuracy in zip(curve.threshold, curve.coverage, curve.accuracy, strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert accuracy == pytest.approx(correct[answered].mean())


@pytest.mark.parametrize("seed", range(5))
def test_threshold_for_is_the_lowest(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.random(200).round(2)
    correct = rng.random(200) < confidence
    for wanted in (0.3, 0.6, 0.8, 0.95):
        found = calibration.threshold_for(confidence, correct, wanted)
        enough = [t for t in {0.0, *confidence} if correct[confidence >= t].mean() >= wanted]
        assert found == min(enough, default=np.inf)


def test_threshold_for_what_is_always_and_what_is_never_reached():
    confidence, correct = np.array([0.4, 0.6, 0.9]), np.array([True, True, False])
    assert calibration.threshold_for(confidence, correct, 2 / 3) == 0
    assert calibration.threshold_for(confidence, correct, 0.9) == np.inf
    assert calibration.threshold_for(np.array([]), np.array([], bool), 0.9) == np.inf


def test_a_confidence_that_is_no_number_is_never_answered():
    confidence, correct = np.array([np.nan, 0.5]), np.array([False, True])
    curve = calibration.abstention(confidence, correct)
    assert (curve.threshold.tolist(), curve.coverage.tolist(), curve.accuracy.tolist()) == ([0.5], [0.5], [1])
    nothing = calibration.abstention(confidence[:1], correct[:1])
    assert len(nothing.threshold) == len(nothing.coverage) == len(nothing.accuracy) == 0
