"""Solvers against scikit-learn, trials together against trials alone, shares against the whole."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from bertray import descent, lbfgs, solvers
from bertray.design import Rows
from bertray.samples import Share
from bertray.solvers import held_out, solve
from bertray.trials import Counting, Trial

ALONE = Share(0, 1)
SPEC = dict(
    optimizer="lbfgs",
    lr=0.05,
    batch_size=16,
    epochs=3,
    seed=0,
    standardize=False,
    label_smoothing=0.0,
    combine="concat",
    early_stopping=0,
)


@dataclass
class Vectors:
    """Samples in memory."""

    vectors: torch.Tensor
    targets: torch.Tensor
    kind: str
    outputs: int
    folds: torch.Tensor
    weights: torch.Tensor
    edges: torch.Tensor | None = None
    blocks: int = 1
    spare: int = 1 << 30
    count: int = field(default=0)
    device = torch.device("cpu")

    @property
    def width(self):
        return self.vectors.shape[1]

    def take(self, rows, dtype):
        return self.vectors[rows].to(dtype)


@dataclass(frozen=True)
class Together(Share):
    """A worker that is a thread: sums are exchanged at a barrier."""

    barrier: threading.Barrier
    board: list

    def sum(self, *tensors):
        for tensor in tensors:
            self.board[self.rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.board).sum(0)
            self.barrier.wait()
            tensor.copy_(total)


def spec(**settings):
    return SimpleNamespace(**(SPEC | settings))


def made(kind="softmax", rows=200, width=8, seed=0, grouped=False, **settings):
    """Rows that a linear head can only partly explain."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * rng.uniform(0.3, 3, width) + rng.normal(size=width)
    outputs = 2 if kind == "span" else 3
    scores = x @ rng.normal(size=(width, outputs)) + 2 * rng.normal(size=(rows, outputs))
    groups = np.unique(np.concatenate([[0, rows], rng.integers(1, rows, rows // 5)]))
    grouped = grouped or kind == "span"
    of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))
    if kind == "span":
        targets = np.exp(scores) / np.stack([np.bincount(of, np.exp(s)) for s in scores.T], 1)[of]
    else:
        targets = {"softmax": scores.argmax(1), "sigmoid": scores > 0, "squared": scores}[kind]
    folds = (of if grouped else np.arange(rows)) % 3
    return Vectors(
        torch.from_numpy(x),
        torch.from_numpy(targets if kind == "softmax" else targets.astype(np.float32)),
        kind,
        outputs,
        torch.from_numpy(folds),
        torch.ones(rows),
        torch.from_numpy(groups) if grouped else None,
        count=len(groups) - 1 if grouped else rows,
        **settings,
    )


def part(samples, rank, world):
    """What one worker has of samples: of every `world` rows or groups one."""
    edges = torch.arange(len(samples.folds) + 1) if samples.edges is None else samples.edges
    of = torch.repeat_interleave(torch.arange(len(edges) - 1), edges.diff())
    mine = of % world == rank
    inner = None if samples.edges is None else torch.cat([torch.zeros(1).long(), edges.diff()[rank::world].cumsum(0)])
    names = ("vectors", "targets", "folds", "weights")
    fields = {name: getattr(samples, name)[mine] for name in names}
    return Vectors(
        **fields, kind=samples.kind, outputs=samples.outputs, edges=inner, blocks=samples.blocks, count=samples.count
    )


def by_workers(samples, trials, settings, world, **more):
    barrier, board = threading.Barrier(world), [None] * world

    def work(rank):
        share = Together(rank, world, barrier, board)
        return solve(part(samples, rank, world), trials, settings, share, lambda loss: None, **more)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


def fitted(samples, trials, settings, **more):
    losses = []
    return solve(samples, trials, settings, ALONE, losses.append, **more), losses


def close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.weight, other.weight, atol=tolerance)
        np.testing.assert_allclose(one.bias, other.bias, atol=tolerance)


def reference(samples, l2, settings):
    """Weight and bias by scikit-learn, for vectors as they are."""
    x, y, weights = samples.vectors.numpy(), samples.targets.numpy(), samples.weights.numpy().astype(np.float64)
    scaler = StandardScaler(with_std=settings.standardize).fit(x)
    x = scaler.transform(x)
    if samples.kind == "squared":
        model = Ridge(alpha=l2 * weights.sum(), tol=1e-12).fit(x, y, weights)
        weight, bias = model.coef_, model.intercept_
    else:
        settings = dict(C=1 / (l2 * weights.sum()), tol=1e-10, max_iter=10_000)
        columns = [y] if samples.kind == "softmax" else list(y.T)
        models = [LogisticRegression(**settings).fit(x, column, weights) for column in columns]
        weight, bias = (np.concatenate([getattr(model, name) for model in models]) for name in ("coef_", "intercept_"))
    weight = weight / (scaler.scale_ if scaler.scale_ is not None else 1)
    return weight, bias - weight @ scaler.mean_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_numbers_are_fitted_as_well_as_large_ones(dtype):
    samples = made("squared")
    (expected,), _ = fitted(samples, [Trial(1e-3)], spec(), dtype=dtype)
    samples.targets.mul_(2.0**-30)
    (found,), _ = fitted(samples, [Trial(1e-3)], spec(), dtype=dtype)
    np.testing.assert_allclose(found.weight * 2.0**30, expected.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_lbfgs_ends_where_scikit_learn_does(kind, standardize, l2):
    samples, settings = made(kind), spec(standardize=standardize)
    if kind == "softmax":
        samples.weights = torch.tensor([0.5, 1.0, 3.0])[samples.targets]
    [head], _ = fitted(samples, [Trial(l2)], settings)
    weight, bias = reference(samples, l2, settings)
    # The same number added to the bias of all classes changes nothing.
    free = (head.bias - bias).mean() if kind == "softmax" else 0
    np.testing.assert_allclose(head.weight, weight, atol=1e-5)
    np.testing.assert_allclose(head.bias - free, bias, atol=1e-5)


def test_ridge_needs_a_step():
    _, losses = fitted(made("squared"), [Trial(l2) for l2 in (0, 1e-3, 1)], spec())
    assert len(losses) <= 4


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared", "span"])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "sgd"])
def test_trials_together_are_trials_alone(kind, optimizer):
    samples, settings = made(kind), spec(optimizer=optimizer, label_smoothing=0.1, lr=0.01)
    trials = [Trial(l2, fold, seed) for l2, fold, seed in ((0.001, -1, 0), (0.1, 0, 1), (0.01, 2, 2), (1, 1, 0))]
    together, _ = fitted(samples, trials, settings)
    alone = [fitted(samples, [trial], settings)[0][0] for trial in trials]
    close(together, alone, 1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared", "span"])
def test_a_fold_is_fitted_without_its_rows(kind):
    samples = made(kind)
    heads, _ = fitted(samples, [Trial(0.01, fold) for fold in range(3)], spec())
    for fold, head in enumerate(heads):
        kept = samples.folds != fold
        names = ("vectors", "targets", "folds", "weights")
        rest = Vectors(**{name: getattr(samples, name)[kept] for name in names}, kind=kind, outputs=samples.outputs)
        if samples.edges is not None:
            lengths = samples.edges.diff()[torch.arange(len(samples.edges) - 1) % 3 != fold]
            rest.edges = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
        close([head], fitted(rest, [Trial(0.01)], spec())[0], 1e-5)


def test_rows_of_no_weight_do_not_count():
    samples = made()
    samples.weights[150:] = 0
    few = Vectors(samples.vectors[:150], samples.targets[:150], "softmax", 3, samples.folds[:150], torch.ones(150))
    samples.vectors[150:] *= 100
    settings = spec(standardize=True)
    close(fitted(samples, [Trial(0.01)], settings)[0], fitted(few, [Trial(0.01)], settings)[0], 1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared", "span"])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("combine", ["concat", "mix"])
def test_workers_end_where_one_does(kind, optimizer, combine):
    samples = made(kind, rows=97, grouped=kind == "squared", blocks=2)
    settings = spec(optimizer=optimizer, combine=combine, standardize=True, early_stopping=1)
    trials = [Trial(0.05, fold) for fold in (-1, 0)]
    alone, _ = fitted(samples, trials, settings)
    first, *others = by_workers(samples, trials, settings, 3)
    close(first, alone, 2e-4 if optimizer == "adam" or combine == "mix" else 1e-5)
    for other in others:
        close(other, first, 0)


@pytest.mark.parametrize("kind", ["span", "sigmoid"])
def test_workers_with_groups_of_other_sizes_gather_batches_alike(kind, monkeypatch):
    monkeypatch.setattr(descent, "ROWS", 32)
    samples, settings = made(kind, rows=97, grouped=True), spec(optimizer="adam", batch_size=2)
    alone, _ = fitted(samples, [Trial(0.05)], settings)
    for heads in by_workers(samples, [Trial(0.05)], settings, 3):
        close(heads, alone, 2e-4)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_without_room_vectors_are_taken_again_each_time(optimizer, monkeypatch):
    monkeypatch.setattr(lbfgs, "_ROOM", 1)  # and trials are solved one after another
    settings = spec(optimizer=optimizer, standardize=True)
    trials = [Trial(0.01), Trial(0.1)]
    held, streamed = (fitted(made(spare=spare), trials, settings)[0] for spare in (1 << 30, 0))
    close(streamed, held, 1e-6)


def test_a_mix_is_no_worse_than_equal_shares():
    samples, equal = made(width=12, blocks=3), made(width=12)
    samples.vectors[:, 4:8] *= 0.1
    samples.vectors -= samples.vectors.mean(0)
    equal.vectors = samples.vectors.view(-1, 3, 4).mean(1)
    trials = [Trial(l2) for l2 in (1e-4, 1e-2)]
    heads, mixed = fitted(samples, trials, spec(combine="mix"))
    assert mixed[-1] <= fitted(equal, trials, spec())[1][-1]
    blocks = heads[0].weight.reshape(3, 3, 4)
    shares = blocks[:, :, 0] / blocks[:, :, 0].sum(1, keepdims=True)
    np.testing.assert_allclose(blocks, shares[:, :, None] * blocks.sum(1, keepdims=True), atol=1e-5)
    assert (shares > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "squared"])
def test_hard_vectors(kind, standardize, dtype):
    """Scales of a million to one, columns that repeat, are constant, or are sums of others."""
    samples = made(kind, width=8)
    x = samples.vectors
    x[:, 0] *= 1e3
    x[:, 1] *= 1e-3
    x[:, 2], x[:, 3] = 7.1, x[:, 4]
    samples.vectors = torch.cat([x, x[:, 4:] @ torch.rand(4, 3, dtype=x.dtype)], 1)
    heads, losses = fitted(samples, [Trial(0), Trial(1e-6), Trial(1e-2)], spec(standardize=standardize), dtype=dtype)
    assert all(np.isfinite(head.weight).all() for head in heads)
    assert len(losses) < 300
    if dtype == torch.float64:
        weight, bias = reference(samples, 1e-2, spec(standardize=standardize))
        logits = samples.vectors.numpy() @ (weight - heads[2].weight).T + bias - heads[2].bias
        assert np.abs(logits - (logits.mean(1, keepdims=True) if kind == "softmax" else 0)).max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separable_rows_without_a_penalty_end(dtype):
    samples = made(rows=30, width=40)
    heads, losses = fitted(samples, [Trial(0), Trial(0, 1)], spec(), dtype=dtype)
    assert losses[-1] < 1e-3
    assert len(losses) < 1000
    assert (heads[0].logits(samples.vectors.numpy()).argmax(1) == samples.targets.numpy()).all()


def test_vectors_too_wide_to_decompose(monkeypatch):
    samples = made()
    expected, _ = fitted(samples, [Trial(0.01)], spec())
    monkeypatch.setattr(lbfgs, "_WIDE", 4)
    close(fitted(samples, [Trial(0.01)], spec())[0], expected, 1e-5)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"early_stopping": 3}, {"combine": "mix"}])
def test_going_on_from_a_state_takes_the_same_steps(settings):
    samples, trials = made(blocks=2), [Trial(0.01, 0), Trial(0.1, 1)]
    settings = spec(**{"optimizer": "adam", "epochs": 5, "standardize": True} | settings)
    states = []

    def save(state):
        states.append({name: tensor.clone() for name, tensor in state.items()})

    whole, losses = fitted(samples, trials, settings, save=save)
    assert len(states) == 5
    for state in (states[1], states[-1]):
        rest, more = fitted(samples, trials, settings, start=state)
        close(rest, whole, 0)
        assert more == losses[int(state["epoch"]) :]


def test_lbfgs_goes_on_from_where_it_was():
    samples, states = made(rows=30, width=40), []
    trials = [Trial(1e-7), Trial(1e-6)]
    _, losses = fitted(samples, trials, spec(), save=lambda state: states.append(state["flat"].clone()))
    assert len(states) == len(losses) // 20 > 0
    _, more = fitted(samples, trials, spec(), start={"flat": states[-1]})
    assert more[0] <= losses[0] - 0.5
    assert more[-1] == pytest.approx(losses[-1], abs=1e-6)


def test_early_stopping_keeps_the_best_epoch():
    samples = made(rows=60, width=40)
    trials = [Trial(0, 0), Trial(0, 1)]
    _, losses = fitted(samples, trials, spec(optimizer="adam", epochs=40, early_stopping=2))
    assert 2 < len(losses) < 40
    settings = spec(optimizer="adam", epochs=len(losses), early_stopping=2)
    states = []
    best, _ = fitted(samples, trials, settings, save=lambda state: states.append(state["least"].clone()))
    for number, head in enumerate(best):
        out = samples.folds == trials[number].fold
        logits = torch.from_numpy(head.logits(samples.vectors.numpy()[out]))
        loss = float(torch.nn.functional.cross_entropy(logits, samples.targets[out]))
        assert loss == pytest.approx(float(torch.stack(states)[:, number].min()), rel=1e-4)
    _, all_epochs = fitted(samples, [*trials, Trial(0)], spec(optimizer="adam", epochs=20, early_stopping=1))
    assert len(all_epochs) == 20


def test_every_row_is_judged_by_the_head_that_has_not_seen_it(monkeypatch):
    monkeypatch.setattr(solvers, "ROWS", 7)
    samples = made()
    samples.folds[5] = 9
    trials = [Trial(l2, fold) for l2 in (0.01, 1) for fold in (2, 0, 1)]
    heads, _ = fitted(samples, trials, spec())
    found = held_out(samples, heads, trials)
    assert found.shape == (2, 200, 3)
    assert np.isnan(found[:, 5]).all()
    for number, (trial, head) in enumerate(zip(trials, heads, strict=True)):
        rows = (samples.folds == trial.fold).numpy()
        expected = head.logits(samples.vectors.numpy()[rows])
        np.testing.assert_allclose(found[number // 3][rows], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_steps_are_those_of_torch(optimizer):
    """Written-out gradients and moments against autograd and torch.optim; the mean of the last tenth of the steps."""
    samples = made(rows=150)
    settings = spec(optimizer=optimizer, epochs=2, seed=3)
    torch.manual_seed(0)
    linear = torch.nn.Linear(samples.width, 3)
    walk = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)(linear.parameters(), lr=settings.lr)
    mean, generator = torch.optim.swa_utils.AveragedModel(linear), torch.Generator().manual_seed(3)
    orders = [torch.randperm(150, generator=generator).split(16) for _ in range(2)]
    steps = [batch for order in orders for batch in order]
    for number, batch in enumerate(steps):
        walk.zero_grad()
        loss = torch.nn.functional.cross_entropy(linear(samples.vectors[batch].float()), samples.targets[batch])
        (loss + 0.1 / 2 * linear.weight.square().sum()).backward()
        walk.step()
        if number >= len(steps) - len(steps) // 10:
            mean.update_parameters(linear)
    [head], _ = fitted(samples, [Trial(0.1)], settings)
    np.testing.assert_allclose(head.weight, mean.module.weight.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(head.bias, mean.module.bias.detach().numpy(), atol=2e-6)


def test_batches_are_drawn_over_groups():
    samples = made("squared", grouped=True)
    rows = Rows.of(samples, ALONE, False, False, torch.float32)
    counting = Counting(samples, [-1, 0], torch.float32)
    found = list(descent._batches(rows, counting, 7, 3, torch.Generator().manual_seed(0), ALONE))
    assert sum(batch.size for batch in found) == samples.count
    assert {len(batch.edges) - 1 for batch in found[:-1]} == {7}
    seen = torch.cat([batch.x for batch in found])
    assert torch.equal(seen.sort(0)[0], samples.vectors.float().sort(0)[0])
    texts = {tuple(text[:, 0].tolist()) for text in samples.vectors.float().split(samples.edges.diff().tolist())}
    assert any(batch.weights[1].eq(0).any() for batch in found)
    for batch in found:
        assert {tuple(text[:, 0].tolist()) for text in batch.x.split(batch.edges.diff().tolist())} <= texts
        assert float(batch.weights[0].sum()) == pytest.approx(1)
        assert float(batch.weights[1].sum()) == pytest.approx(1)
