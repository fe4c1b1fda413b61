"""Fitting against scikit-learn, and on one worker against several."""

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import with_vectors
from handmade import store_of
from sklearn.linear_model import LogisticRegression

from benchmarks.processes import titled
from bertray import fit as fitting
from bertray import ood
from bertray.encoder import Encoder
from bertray.errors import ClusterError, StoreError
from bertray.features import related
from bertray.progress import Progress
from bertray.samples import Wanted
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Head, RaySizes, Search
from bertray.store import Manifest, Receipt, Store

CLASSES = {"negative": 0, "neutral": 1, "positive": 2}


def fit(store, spec, sizes=None):
    """A head on a store, without folds where these are not what is tested."""
    return fitting.fit(Wanted((store,), "name", CLASSES, 3, spec.folds), spec, 6, sizes)


def head(**settings):
    return Head(**({"folds": 0} | settings))


@pytest.fixture(scope="module")
def store(tmp_path_factory, minilm):
    """The demo's training rows as real vectors."""
    from conftest import demo_rows

    rows = demo_rows("train")
    vectors = Encoder(minilm, EncoderSpec(pooling="mean")).encode([row["text"] for row in rows]).vectors
    store = Store(str(tmp_path_factory.mktemp("store")))
    table = pa.table({name: [row[name] for row in rows] for name in ("text", "label")})
    receipt = Receipt("u", len(rows), 0, 0, 0, 0, 0.0)
    store.write_shard(receipt, with_vectors(table, vectors), pa.table({"id": []}))
    store.finish(Manifest("print", {"features": ["mean_6"]}, (receipt,)))
    return store


def data(store):
    vectors, labels = store.load()
    return vectors.astype(np.float64), np.array([CLASSES[label] for label in labels])


def objective(head, x, y, l2):
    logits = x @ head.weight.T.astype(np.float64) + head.bias
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(y)), y].mean() + l2 / 2 * (head.weight.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("l2", [0.1, 0.001, 0.0001])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_equal_to_scikit_learn_at_the_optimum(store, optimizer, l2):
    x, y = data(store)
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
    spec = head(optimizer=optimizer, l2=l2, epochs=250, batch_size=len(x), lr=0.1)
    fitted = fit(store, spec)
    expected = type(fitted.head)(reference.coef_, reference.intercept_)
    assert abs(objective(fitted.head, x, y, l2) - objective(expected, x, y, l2)) < 1e-3
    ours = fitted.head.probabilities(x).argmax(1)
    assert abs((ours == y).mean() - reference.score(x, y)) <= 2 / len(x)
    if optimizer == "lbfgs":
        assert fitted.losses[-1] == pytest.approx(objective(expected, x, y, l2), abs=1e-7)
        assert (ours == reference.predict(x)).mean() > 0.998


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_seed_gives_the_same_head_and_the_loss_falls(store, optimizer):
    spec = head(optimizer=optimizer, lr=0.05, epochs=3)
    one, again, other = (fit(store, s) for s in (spec, spec, spec.model_copy(update={"seed": 1})))
    np.testing.assert_array_equal(one.head.weight, again.head.weight)
    assert not np.array_equal(one.head.weight, other.head.weight)
    assert len(one.losses) == 3
    assert one.losses[0] > one.losses[-1]


def test_the_notebooks_settings_judge_real_rows_well(store):
    x, y = data(store)
    fitted = fit(store, head()).head
    assert (fitted.probabilities(x).argmax(1) == y).mean() > 0.95


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_two_workers_take_the_same_steps_as_none(store, ray_cluster, optimizer):
    spec = head(optimizer=optimizer, l2=0.01, epochs=2)
    alone, together = fit(store, spec), fit(store, spec, RaySizes(fit_workers=2))
    np.testing.assert_allclose(together.head.weight, alone.head.weight, atol=1e-4)
    assert together.losses[-1] == pytest.approx(alone.losses[-1], abs=1e-5)


def test_more_workers_than_cpus(store, ray_cluster):
    with pytest.raises(ClusterError, match="fit_workers must be at most the cluster's CPUs"):
        fit(store, head(), RaySizes(fit_workers=64))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """3,000 rows of 400 random numbers in uneven shards: more than the one megabyte that a test allows."""
    rng = np.random.default_rng(0)
    store = Store(str(tmp_path_factory.mktemp("large")))
    receipts = []
    for number, rows in enumerate((1100, 1, 0, 1899)):
        labels = rng.choice(list(CLASSES), rows).tolist()
        table = pa.table({"text": labels, "label": labels}, pa.schema([("text", pa.string()), ("label", pa.string())]))
        receipts.append(Receipt(f"u{number}", rows, 0, 0, 0, 0, 0.0))
        vectors = rng.normal(size=(rows, 400)).astype(np.float16)
        store.write_shard(receipts[-1], with_vectors(table, vectors), pa.table({"id": []}))
    store.finish(Manifest("print", {"features": ["mean_6"]}, tuple(receipts)))
    return store


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_vectors_in_a_file_give_the_same_head_as_in_memory(large, caplog, optimizer):
    caplog.set_level("INFO", "bertray")
    spec = head(optimizer=optimizer, l2=0.01, epochs=2)
    held = fit(large, spec)
    assert "read from a file" not in caplog.text
    streamed = fit(large, spec, RaySizes(fit_memory=1))
    assert "2 MB of vectors are more than memory has room for: read from a file" in caplog.text
    np.testing.assert_array_equal(held.head.weight, streamed.head.weight)
    np.testing.assert_array_equal(held.head.bias, streamed.head.bias)
    assert held.losses == streamed.losses


def test_two_workers_with_uneven_shards_in_files(large, ray_cluster):
    spec = head(l2=0.01, epochs=2, batch_size=33)
    alone = fit(large, spec)
    together = fit(large, spec, RaySizes(fit_workers=2, fit_memory=1))
    np.testing.assert_allclose(together.head.weight, alone.head.weight, atol=1e-4)


def test_the_steps_are_those_of_torch(store):
    """Written-out gradients and Adam against autograd and torch.optim, whose steps they are to be."""
    x, y = data(store)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    spec = head(epochs=1, batch_size=50, l2=0.1)
    torch.manual_seed(spec.seed)
    linear = torch.nn.Linear(x.shape[1], 3)
    optimizer = torch.optim.Adam(linear.parameters(), lr=spec.lr)
    mean = torch.optim.swa_utils.AveragedModel(linear)
    steps = torch.randperm(len(x), generator=torch.Generator().manual_seed(spec.seed)).split(spec.batch_size)
    for number, batch in enumerate(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(linear(x[batch]), y[batch])
        (loss + spec.l2 / 2 * linear.weight.square().sum()).backward()
        optimizer.step()
        if number >= len(steps) - len(steps) // 10:
            mean.update_parameters(linear)
    fitted = fit(store, spec).head
    np.testing.assert_allclose(fitted.weight, mean.module.weight.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(fitted.bias, mean.module.bias.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_two_workers_choose_what_one_chooses(store, ray_cluster, optimizer):
    spec = Head(optimizer=optimizer, epochs=2, folds=3, search=Search(l2=(0.1, 0.001)))
    alone, together = fit(store, spec), fit(store, spec, RaySizes(fit_workers=2))
    assert together.choice.setting == alone.choice.setting
    assert [point["score"] for point in together.choice.curve] == pytest.approx(
        [point["score"] for point in alone.choice.curve], abs=2 / 720
    )
    np.testing.assert_array_equal(together.choice.targets, alone.choice.targets)
    np.testing.assert_allclose(together.choice.logits, alone.choice.logits, atol=0.01)
    assert together.choice.temperature == pytest.approx(alone.choice.temperature, rel=1e-2)
    np.testing.assert_allclose(together.head.weight, alone.head.weight, atol=0.02 * np.abs(alone.head.weight).max())


def test_what_is_familiar_is_of_all_training_rows_of_all_workers(store, ray_cluster):
    x, y = data(store)
    alone, together = fit(store, head(epochs=1)).ood, fit(store, head(epochs=1), RaySizes(fit_workers=2)).ood
    expected = ood.fit(x, y)
    for found in (alone, together):
        assert (found.rows, found.threshold) == (720, pytest.approx(expected.threshold, rel=1e-4))
        np.testing.assert_allclose(found.distance(x), expected.distance(x), rtol=1e-3)


@pytest.mark.parametrize("combine", ["concat", "mean"])
def test_what_is_familiar_is_of_the_chosen_features_side_by_side(tmp_path, monkeypatch, combine):
    """Rows to choose by are not learned from, and of many rows a few."""
    rng, names = np.random.default_rng(0), ("mean_4", "cls_5", "mean_6")
    vectors, y = rng.normal(size=(500, 12)).astype(np.float32), rng.integers(0, 3, 500)
    rows = {"text": list(map(str, range(500))), "label": [list(CLASSES)[i] for i in y]}
    stores = (
        store_of(tmp_path / "train", rows, vectors, names, shards=(100, 450)),
        store_of(tmp_path / "dev", {name: values[:50] for name, values in rows.items()}, vectors[:50] + 100, names),
    )
    spec = head(epochs=1, seed=5, combine=combine, search=Search(layers=((4, 6),), pooling=("mean",)))
    found = fitting.fit(Wanted(stores, "name", CLASSES, 3), spec, 6).ood
    expected = ood.fit(vectors[:, [0, 1, 2, 3, 8, 9, 10, 11]], y)
    assert found.rows == 500
    np.testing.assert_allclose(found.map, expected.map, rtol=1e-5)
    assert found.threshold == expected.threshold
    monkeypatch.setattr(ood, "_MOST", 300)
    few = fitting.fit(Wanted(stores, "name", CLASSES, 3), spec, 6).ood
    kept = ood.sample(y, 8, 5)
    assert few.rows == len(kept) == pytest.approx(300, abs=3)
    assert few.threshold == ood.fit(vectors[kept][:, [0, 1, 2, 3, 8, 9, 10, 11]], y[kept]).threshold


@pytest.mark.parametrize("form", ["name", "names", "number"])
def test_what_is_familiar_of_pairs_is_what_a_head_sees_of_them(tmp_path, form):
    """Without classes all rows are one."""
    rng = np.random.default_rng(0)
    vectors, first, second = rng.normal(size=(60, 4)).astype(np.float32), *rng.integers(0, 60, (2, 300))
    texts = store_of(tmp_path / "texts", {"text": list(map(str, range(60)))}, vectors)
    y = np.arange(300) % 2
    labels = {"name": ["ab"[i] for i in y], "names": [f'["{"ab"[i]}"]' for i in y], "number": list(map(str, y))}[form]
    rows = {"text": list(map(str, first)), "text_pair": list(map(str, second)), "label": labels}
    store = store_of(tmp_path / "store", rows | {"first": first, "second": second}, None, ())
    wanted = Wanted((store,), form, {"a": 0, "b": 1}, 1 if form == "number" else 2, pairs=texts)
    found = fitting.fit(wanted, head(epochs=1), 6).ood
    seen = related(vectors[first], vectors[second])
    expected = ood.fit(seen, y if form == "name" else np.zeros(300, np.int64))
    assert len(found.means) == (2 if form == "name" else 1)
    np.testing.assert_allclose(found.distance(seen), expected.distance(seen), rtol=1e-4)


def train_worker():
    """The id of one of Ray Train's processes that this one has begun."""
    return titled(os.getpid(), "RayTrainWorker")[0]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (StoreError("The disk is full. Make room."), r"^The disk is full\. Make room\.$"),
        (
            ValueError("no such thing"),
            r"^Fitting has failed 4 times: ValueError: no such thing\. The same command goes on",
        ),
    ],
)
def test_what_ends_a_fit_on_workers_is_told_in_a_line(store, ray_cluster, monkeypatch, raised, told):
    def broken(config):
        raise raised

    monkeypatch.setattr(fitting, "_train_worker", broken)
    with pytest.raises((StoreError, ClusterError), match=told):
        fitting.fit(Wanted((store,), "name", CLASSES, 3, 0), head(epochs=2), 6, RaySizes(fit_workers=2))


def test_a_fit_whose_worker_is_killed_goes_on_from_the_last_checkpoint(store, ray_cluster, monkeypatch):
    """A real process ends at a random moment: the head is the one that it would have been."""
    spec = Head(epochs=250, batch_size=64, folds=2, search=Search(l2=(0.01, 0.1)))
    wanted = Wanted((store,), "name", CLASSES, 3, spec.folds)
    monkeypatch.setattr(fitting, "_CHECKPOINT_SECONDS", 0.3)
    steps, killed = [], []

    class Watching(Progress):
        def add(self, *given):
            steps.append(given[1])
            if len(steps) > 80 and not killed:
                os.kill(train_worker(), signal.SIGKILL)
                killed.append(len(steps))

    monkeypatch.setattr(fitting, "Progress", Watching)
    fitted = fitting.fit(wanted, spec, 6, RaySizes(fit_workers=2))
    monkeypatch.undo()
    assert killed
    again = len(steps) - spec.epochs  # epochs that were done twice, since they were behind the last checkpoint
    assert again < killed[0] - 10
    undisturbed = fitting.fit(wanted, spec, 6)
    assert len(fitted.losses) == spec.epochs
    np.testing.assert_allclose(fitted.losses, undisturbed.losses, atol=1e-4)
    np.testing.assert_allclose(fitted.head.weight, undisturbed.head.weight, atol=2e-3)
    assert fitted.choice.setting == undisturbed.choice.setting
