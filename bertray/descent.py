"""Descent: many trials at once by Adam or SGD, in batches drawn over the rows of all workers. Knows nothing of files or
of Ray; what several workers compute is summed by their Share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bertray.design import ROWS, Rows, threads, worker_mean
from bertray.heads import objective
from bertray.parameters import Form
from bertray.samples import Share
from bertray.spec import Head
from bertray.trials import Counting, MeanLoss, Record, Save, State, Trial

if TYPE_CHECKING:
    import torch

_FEW = 1 << 23  # operations of a step, below which handing a part to another thread takes longer than doing it


def in_batches(
    rows: Rows,
    form: Form,
    trials: Sequence[Trial],
    spec: Head,
    share: Share,
    record: Record,
    start: Mapping[str, "torch.Tensor"],
    save: Save | None,
) -> "torch.Tensor":
    """[M, size] by Adam or SGD. The recorded loss is the mean over the epoch's batches, as they were met.

    At a constant learning rate the last weights are those of a walk around the optimum; the mean over the last
    tenth of the steps is nearer to it (Polyak and Juditsky 1992) and depends less on the seed.

    Args:
        start: a state that `save` was given: the very steps that were left are taken.
        save: is given the state of `_Walk` after each epoch.
    """
    import torch

    place = rows.samples.device
    walk = _Walk(rows, form, trials, spec, share)
    state = walk.begin() | {name: tensor.to(place, copy=True) for name, tensor in start.items()}
    folds = [trial.fold for trial in trials]
    judge = MeanLoss(rows, form, folds, spec, share, left_out=True) if spec.early_stopping and max(folds) >= 0 else None
    small = 4 * spec.batch_size * state["flat"].numel() < _FEW
    with threads(1 if small else torch.get_num_threads()):
        while int(state["epoch"]) < spec.epochs and not _in_vain(state, folds, spec):
            record(walk.epoch(state))
            if judge:
                _keep_best(state, judge(state["flat"], torch.arange(len(trials), device=place))[0])
            if save:
                save(state)
    left_out = torch.tensor(folds, device=place)[:, None] >= 0
    return torch.where(left_out, state["best"], state["mean"]) if judge else state["mean"]


def _keep_best(state: State, losses: "torch.Tensor") -> None:
    """The weights of the epoch with the least loss on rows left out; `idle`: how many epochs ago that was."""
    import torch

    better = losses < state["least"]
    state["least"] = torch.where(better, losses, state["least"])
    state["best"] = torch.where(better[:, None], state["flat"], state["best"])
    state["idle"] = torch.where(better, 0, state["idle"] + 1)


def _in_vain(state: State, folds: Sequence[int], spec: Head) -> bool:
    """Whether no trial has become better for long enough."""
    return 0 < spec.early_stopping <= int(state["idle"].min()) and min(folds) >= 0


class _Walk:
    """Epochs of Adam or SGD over all trials. All that changes is in a state, so that another process can go on from it:
    the weights `flat`, their `mean` over the last steps, Adam's moments, the `epoch`, the `generator` of the order."""

    def __init__(self, rows: Rows, form: Form, trials: Sequence[Trial], spec: Head, share: Share) -> None:
        import torch

        self._rows, self._form, self._trials, self._spec, self._share = rows, form, trials, spec, share
        self._counting = Counting(rows.samples, [trial.fold for trial in trials], rows.dtype)
        l2 = torch.tensor([trial.l2 for trial in trials], dtype=rows.dtype, device=rows.samples.device)
        self._l2 = l2[:, None] if l2.any() else None
        self._steps = math.ceil(rows.samples.count / spec.batch_size)
        self._averaged = max(1, self._steps * spec.epochs // 10)
        usual = worker_mean(len(rows.samples.folds), rows, share) * share.world // rows.samples.count  # rows of a group
        self._batches = max(1, ROWS // (spec.batch_size * max(1, usual)))  # that are gathered at once

    def begin(self) -> State:
        import torch

        flat = torch.stack([self._first(trial.seed) for trial in self._trials]).to(self._rows.samples.device)
        state = {name: torch.zeros_like(flat) for name in ("mean", "first", "second", "best")}
        losses = torch.full((len(flat),), torch.inf, dtype=torch.float64, device=flat.device)
        generator = torch.Generator().manual_seed(self._spec.seed).get_state()
        idle, epoch = torch.zeros_like(losses, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        return state | {"flat": flat, "least": losses, "idle": idle, "epoch": epoch, "generator": generator}

    def _first(self, seed: int) -> "torch.Tensor":
        """[size] as torch.nn.Linear begins, with equal shares."""
        import torch

        form, generator = self._form, torch.Generator().manual_seed(seed)
        flat = torch.zeros(1, form.size)
        torch.nn.init.kaiming_uniform_(form.weight(flat)[0], math.sqrt(5), generator=generator)
        form.bias(flat).uniform_(-1 / math.sqrt(form.inner), 1 / math.sqrt(form.inner), generator=generator)
        return flat[0].to(self._rows.dtype)

    def epoch(self, state: State) -> float:
        """Every row once; the mean objective."""
        import torch

        generator = torch.Generator()
        generator.set_state(state["generator"].cpu())
        flat, done = state["flat"], int(state["epoch"]) * self._steps
        total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        late = self._steps * self._spec.epochs - self._averaged
        size, together = self._spec.batch_size, self._batches
        for batch in _batches(self._rows, self._counting, size, together, generator, self._share):
            loss, gradient = self._descend(flat, batch)
            total += loss * batch.size
            done += 1
            self._move(state, gradient, done)
            if done > late:
                state["mean"] += (flat - state["mean"]) / (done - late)
        self._share.sum(total)
        state["epoch"] += 1
        state["generator"] = generator.get_state()
        return float(total.mean()) / self._rows.samples.count

    def _descend(self, flat: "torch.Tensor", batch: "_Batch") -> "tuple[torch.Tensor, torch.Tensor]":
        """This worker's part of the objective [M] over a batch, and the gradient [M, size] of all workers."""
        form, share = self._form, self._share
        kind, smoothing = self._rows.samples.kind, self._spec.label_smoothing
        weight, bias = form.spread(flat)
        loss, *gradients = objective(
            kind, weight, bias, batch.x, batch.targets, batch.weights.T, batch.edges, smoothing
        )
        gradient = form.gather(flat, *gradients)
        share.sum(gradient)
        if self._l2 is not None:
            penalized = flat[:, : form.penalized]
            gradient[:, : form.penalized] += self._l2 * penalized
            loss += self._l2[:, 0] / 2 * penalized.square().sum(1) / share.world
        return loss, gradient

    def _move(
        self, state: State, gradient: "torch.Tensor", step: int, first: float = 0.9, second: float = 0.999
    ) -> None:
        """SGD, or Adam (Kingma and Ba 2015) with the constants of torch.optim.Adam, which takes longer to call than to
        compute."""
        if self._spec.optimizer == "sgd":
            state["flat"].add_(gradient, alpha=-self._spec.lr)
            return
        state["first"].lerp_(gradient, 1 - first)
        state["second"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (state["second"].sqrt() / math.sqrt(1 - second**step)).add_(1e-8)
        state["flat"].addcdiv_(state["first"], scale, value=-self._spec.lr / (1 - first**step))


@dataclass(frozen=True)
class _Batch:
    """This worker's part: x [n, width], targets of n rows, weights [trials, n] that make sums means over all workers,
    edges where rows are in groups; size: how many rows or groups all workers have of it."""

    x: "torch.Tensor"
    targets: "torch.Tensor"
    weights: "torch.Tensor"
    edges: "torch.Tensor | None"
    size: int


def _batches(
    rows: Rows, counting: Counting, size: int, together: int, generator: "torch.Generator", share: Share
) -> Iterator[_Batch]:
    """All rows of all workers once, in random order, so many batches at a time; where there are groups, all groups."""
    import torch

    samples = rows.samples
    edges = None if samples.edges is None else samples.edges.cpu()
    for order in torch.randperm(samples.count, generator=generator).split(size * together):
        sizes = [len(batch) for batch in order.split(size)]
        mine = order % share.world == share.rank
        found = order[mine] // share.world
        counts = [int(batch.sum()) for batch in mine.split(size)] if share.world > 1 else sizes
        inner: Sequence[torch.Tensor | None] = [None] * len(sizes)
        if edges is not None:
            found, inner = _rows_of(edges, found, counts)
            counts = [int(part[-1]) for part in inner]
        place = found.to(samples.device)
        weights = counting.in_batches(place, counts, samples, share).split(counts, 1)
        x, targets = rows.take(found).split(counts), samples.targets[place].split(counts)
        yield from map(_Batch, x, targets, weights, inner, sizes)


def _rows_of(
    edges: "torch.Tensor", groups: "torch.Tensor", counts: Sequence[int]
) -> "tuple[torch.Tensor, list[torch.Tensor]]":
    """The rows of some groups one after another, and for so many of the groups each the edges in their rows."""
    import torch

    lengths = edges.diff()[groups]
    ends = lengths.cumsum(0)
    rows = torch.arange(int(lengths.sum())) + torch.repeat_interleave(edges[groups] - ends + lengths, lengths)
    return rows, [torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in lengths.split(list(counts))]
