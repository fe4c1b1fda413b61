"""Distances against the formula and scikit-learn, the threshold against fits without a row and on fresh rows, and real
texts of another kind."""

import time

import numpy as np
import pytest
from conftest import read_jsonl
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf, ledoit_wolf

from bertray import ood
from bertray.metrics import auroc


def drawn(rows, width, classes=3, seed=0, freedom=0):
    """Rows of classes with one covariance, whose directions vary more and less; `freedom` makes far ones common."""
    rng, scale = np.random.default_rng(seed), np.exp(-4 * np.arange(width) / width)
    means = np.random.default_rng(99).normal(size=(classes, width)) * scale
    noise = rng.normal(size=(rows, width))
    if freedom:
        noise /= np.sqrt(rng.chisquare(freedom, (rows, 1)) / freedom)
    y = np.arange(rows) % classes
    return (means[y] + noise * scale).astype(np.float32), y


def by_formula(x, y, fresh):
    means = np.stack([x[y == c].mean(0) for c in np.unique(y)]).astype(np.float64)
    covariance, _ = ledoit_wolf(x - means[np.searchsorted(np.unique(y), y)], assume_centered=True)
    return cdist(fresh, means, "mahalanobis", VI=np.linalg.inv(covariance)).min(1)


@pytest.mark.parametrize(("rows", "width", "classes"), [(90, 30, 3), (60, 100, 1), (4000, 20, 40), (300, 512, 3)])
def test_distances_are_those_of_the_formula(rows, width, classes):
    x, y = drawn(rows, width, classes)
    x, y = x + 5, y * 2 + 3  # numbers of classes need not count from 0
    fresh = drawn(50, width, classes, seed=1)[0] + 5
    found = ood.fit(x, y)
    np.testing.assert_allclose(found.distance(fresh), by_formula(x, y, fresh), rtol=1e-3)
    np.testing.assert_allclose(found.distance(fresh[:1]), found.distance(fresh)[:1], rtol=1e-5)
    assert found.map.shape == (width, width)
    assert found.rows == rows
    assert found.outliers(fresh).tolist() == (found.distance(fresh) > found.threshold).tolist()


def test_one_class_is_scikit_learns_shrunk_covariance():
    x, _ = drawn(200, 50, 1)
    fresh = drawn(50, 50, 1, seed=1)[0] * 2
    expected = LedoitWolf().fit(x).mahalanobis(fresh)
    found = ood.fit(x, np.zeros(len(x), np.int64)).distance(fresh)
    np.testing.assert_allclose(found**2, expected, rtol=1e-3)


def test_more_rows_at_once_than_fit_a_block():
    x, y = drawn(9_000, 8)
    found = ood.fit(x[:500], y[:500])
    np.testing.assert_allclose(found.distance(x)[-5:], found.distance(x[-5:]), rtol=1e-5)
    assert found.distance(x[:0]).shape == (0,)
    halves = x.astype(np.float16)
    np.testing.assert_allclose(found.distance(halves), found.distance(halves.astype(np.float32)), rtol=1e-5)


def without_each(x, y):
    """The distance of each row to what is learned without it, the shrinkage being that of all, one fit a row."""
    means = np.stack([x[y == c].mean(0) for c in range(y.max() + 1)]).astype(np.float64)
    around = x - means[y]
    share = ledoit_wolf(around, assume_centered=True)[1]
    floor = share * np.square(around).sum(1).mean() / x.shape[1] * np.eye(x.shape[1])
    found = []
    for row in range(len(x)):
        others, own = np.delete(x, row, 0).astype(np.float64), np.delete(y, row)
        left = {c: others[own == c].mean(0) for c in np.unique(own)}
        scatter = sum((others[own == c] - mean).T @ (others[own == c] - mean) for c, mean in left.items())
        inverse = np.linalg.inv((1 - share) * scatter / len(x) + floor)
        found.append(cdist(x[row : row + 1], np.stack(list(left.values())), "mahalanobis", VI=inverse).min())
    return np.sort(found)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_the_threshold_is_that_of_fits_without_each_row(monkeypatch, share):
    monkeypatch.setattr(ood, "SHARE", share)
    x, y = drawn(120, 25, 4)
    y[y == 3] = 2  # an uneven one, one of two rows, and one of a single row
    y[[0, 1]], y[2] = 3, 4
    expected = without_each(x, y)[min(120, int(np.ceil((1 - share) * 121))) - 1]
    assert ood.fit(x, y).threshold == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "width", "classes", "freedom"),
    [
        (720, 384, 3, 0),
        (720, 384, 77, 0),
        (720, 384, 1, 0),
        (720, 384, 3, 5),
        (300, 384, 3, 0),
        (10_000, 384, 3, 0),
        (720, 1536, 3, 0),
    ],
)
def test_of_fresh_rows_one_in_a_hundred_is_too_far(rows, width, classes, freedom):
    """In-sample distances would make it too many where rows are few; 720 rows tell a share of 1 % to +-0.4 %."""
    shares, inside = [], []
    for seed in (0, 10, 20):
        x, y = drawn(rows, width, classes, seed + 1, freedom)
        found = ood.fit(x, y, seed)
        fresh, _ = drawn(4_000, width, classes, seed + 2, freedom)
        shares.append(found.outliers(fresh).mean())
        inside.append(found.outliers(x).mean())
    assert 0.004 < np.mean(shares) < 0.017
    assert np.mean(inside) < np.mean(shares)


def test_wide_vectors_are_seen_from_512_directions():
    x, y = drawn(600, 900)
    found, again, other = ood.fit(x, y, 3), ood.fit(x, y, 3), ood.fit(x, y, 4)
    assert found.map.shape == (900, 512)
    assert found.means.shape == (3, 512)
    np.testing.assert_array_equal(found.map, again.map)
    assert found.threshold == again.threshold != other.threshold
    assert found.outliers(x + 1).all()


def test_numbers_that_never_change_do_no_harm():
    x, y = drawn(400, 20)
    x[:, 7], x[:, 8] = 3, x[:, 9]
    found = ood.fit(x, y)
    assert np.isfinite(found.distance(x)).all()
    assert found.outliers(x).mean() < 0.02


@pytest.mark.parametrize("classes", [[0], [0, 0], [0, 1, 2], [0, 0, 1]])
def test_too_few_rows_tell_nothing(classes):
    assert ood.fit(np.eye(len(classes), 4, dtype=np.float32), np.array(classes)) is None


def test_equal_rows_tell_nothing():
    assert ood.fit(np.ones((50, 4), np.float32), np.arange(50) % 2) is None


def test_samples_keep_some_rows_of_each_class():
    classes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [60_000, 30_000, 30, 5]))
    rows = ood.sample(classes, 384, seed=1)
    kept = np.bincount(classes[rows])
    assert 19_990 < len(rows) <= 20_000
    assert (np.diff(rows) > 0).all()
    assert kept[0] == pytest.approx(2 * kept[1], rel=0.01)
    assert 20 <= kept[2] <= 30
    assert kept[3] == 5
    np.testing.assert_array_equal(rows, ood.sample(classes, 384, seed=1))
    assert not np.array_equal(rows, ood.sample(classes, 384, seed=2))
    assert len(ood.sample(classes, 10_752)) * 10_752 <= 1 << 25
    assert len(ood.sample(np.arange(50_000), 384)) <= 20_000
    np.testing.assert_array_equal(ood.sample(classes[:100], 384), np.arange(100))


def test_one_vector_takes_microseconds():
    x, y = drawn(2_000, 384, 77)
    found, took = ood.fit(x, y), []
    for _ in range(300):
        started = time.perf_counter()
        found.distance(x[:1])
        took.append(time.perf_counter() - started)
    assert min(took) < 0.0005


@pytest.mark.parametrize("layers", ["last", "all"])
def test_real_texts_of_another_kind_lie_farther_away(shared, minilm, layers):
    """Tweets are familiar, questions to a bank are not; and the other way round, where all are of one kind."""
    from bertray.encoder import Encoder
    from bertray.spec import Encoder as EncoderSpec

    encoder = Encoder(minilm, EncoderSpec(pooling="mean", layers=layers))
    vectors, classes = {}, {}
    for name in ("tweets", "banking77"):
        rows = {split: read_jsonl(shared / name / f"{split}.jsonl") for split in ("train", "test")}
        chosen = np.random.default_rng(0).permutation(len(rows["train"]))[:2_000]
        vectors[name] = [
            encoder.encode([row["text"] for row in part]).vectors
            for part in ([rows["train"][i] for i in chosen], rows["test"][::4])
        ]
        classes[name] = np.array([int(rows["train"][i]["label"]) for i in chosen])
    for name, other, least in (("tweets", "banking77", 0.84), ("banking77", "tweets", 0.97)):
        found = ood.fit(vectors[name][0], classes[name])
        near, far = (found.distance(vectors[kind][1]) for kind in (name, other))
        assert auroc(np.concatenate([near, far]), np.repeat([False, True], [len(near), len(far)])) > least
        assert (near > found.threshold).mean() < 0.03
        assert (far > found.threshold).mean() > 3 * (near > found.threshold).mean()
