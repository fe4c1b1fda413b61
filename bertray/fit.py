"""Fitting: a store's vectors to a head, on Ray Train.

Batches are drawn over all workers together and each takes its slice of every batch, so that any number of
workers takes the same steps (up to the order of sums).
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bertray import labels
from bertray.errors import ClusterError
from bertray.heads import LinearHead, linear_objective
from bertray.progress import Progress, log
from bertray.spec import Head
from bertray.store import Store

if TYPE_CHECKING:
    import torch

RECIPE = 1  # raised when a change of code gives another head for the same settings
_POLL_SECONDS = 0.5
_LBFGS_ITERATIONS = 1_000
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Fitted:
    """head: the head; losses: the objective after each epoch (adam, sgd) or at each evaluation (lbfgs);
    seconds: time spent fitting, without the start of processes."""

    head: LinearHead
    losses: list[float]
    seconds: float


def fit(store: Store, classes: Mapping[str, int], names: int, spec: Head, workers: int = 0) -> Fitted:
    """Fit a linear head on a complete store.

    Args:
        classes: class index of each label in the store.
        names: number of classes.
        workers: Ray Train workers; 0 fits in this process (Ray Train's local mode, the same code).

    Raises:
        ClusterError: the cluster cannot hold that many workers.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config = {"store": store.url, "classes": dict(classes), "names": names, "head": spec.model_dump()}
    # How often L-BFGS evaluates the objective is not known beforehand.
    steps, unit = (0, "evaluations") if spec.optimizer == "lbfgs" else (spec.epochs, "epochs")
    with Progress("fitting", steps, unit) as progress:

        def tell(step: int, loss: float) -> None:
            progress.add(1, f"loss {loss:.4f}")

        return Fitted(**(_fit_here(config, tell) if workers == 0 else _fit_on(workers, config, tell)))


def _fit_here(config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        lambda: train(config, tell), scaling_config=ScalingConfig(num_workers=0), run_config=RunConfig(name="bertray")
    )
    return trainer.fit().return_value


def _fit_on(workers: int, config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cpus = ray.cluster_resources().get("CPU", 0)
    if workers > cpus:
        raise ClusterError(f"ray.fit_workers must be at most the cluster's CPUs ({cpus:g}). Got {workers} instead.")
    # Train polls its workers at this interval, and waits for a poll at the end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    board = ray.remote(num_cpus=0)(Board).remote()
    config = {**config, "board": board}
    log.info("fitting on %d workers", workers)
    with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(name="bertray", storage_path=folder),
        )
        # Not in the main thread: there Train takes over SIGINT and keeps it.
        pool = ThreadPoolExecutor(1)
        running = pool.submit(trainer.fit)
        pool.shutdown(wait=False)  # Ctrl-C must not wait for it
        ended = False
        while not ended:
            time.sleep(_POLL_SECONDS)
            ended = running.done()
            for step, loss in ray.get(board.take.remote()):
                tell(step, loss)
        return running.result().return_value


class Board:
    """An actor that carries progress from the first worker to the driver."""

    def __init__(self) -> None:
        self._news: list[tuple[int, float]] = []

    def put(self, step: int, loss: float) -> None:
        self._news.append((step, loss))

    def take(self) -> list[tuple[int, float]]:
        news, self._news = self._news, []
        return news


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    return train(config, (lambda step, loss: config["board"].put.remote(step, loss)) if first else lambda *_: None)


def train(config: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The training function: what each worker runs. Returns the fields of Fitted."""
    import ray.train
    import torch

    context = ray.train.get_context()
    share = _Share(context.get_world_rank(), context.get_world_size())
    spec = Head(**config["head"])
    vectors, found = Store(config["store"]).load()
    x, y = torch.from_numpy(vectors), torch.from_numpy(labels.to_classes(found, config["classes"]))
    started = time.perf_counter()
    torch.manual_seed(spec.seed)
    linear = torch.nn.Linear(x.shape[1], config["names"])
    losses: list[float] = []

    def record(loss: float) -> None:
        losses.append(loss)
        tell(len(losses), loss)

    (_to_optimum if spec.optimizer == "lbfgs" else _in_batches)(linear, x, y, spec, share, record)
    head = LinearHead(linear.weight.detach().float().numpy(), linear.bias.detach().float().numpy())
    return {"head": head, "losses": losses, "seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class _Share:
    """This worker's place among all, and sums over all."""

    rank: int
    world: int

    def of(self, rows: "torch.Tensor") -> "torch.Tensor":
        return rows[self.rank :: self.world]

    def sum(self, *tensors: "torch.Tensor") -> None:
        if self.world > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)


def _backward(
    linear: "torch.nn.Linear", x: "torch.Tensor", y: "torch.Tensor", l2: float, rows: int, share: _Share
) -> "torch.Tensor":
    """The gradient over the rows of all workers, left in the parameters, and this worker's part of the objective."""
    linear.zero_grad()
    loss = linear_objective(linear.weight, linear.bias, x, y, l2, rows, 1 / share.world)
    loss.backward()
    share.sum(*(parameter.grad for parameter in linear.parameters() if parameter.grad is not None))
    return loss.detach()


def _in_batches(
    linear: "torch.nn.Linear",
    x: "torch.Tensor",
    y: "torch.Tensor",
    spec: Head,
    share: _Share,
    record: Callable[[float], None],
) -> None:
    """Adam or SGD. The recorded loss is the mean over the epoch's batches, as they were met.

    At a constant learning rate the last weights are those of a walk around the optimum; the mean over the last
    tenth of the steps is nearer to it (Polyak and Juditsky 1992) and depends less on the seed.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel

    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[spec.optimizer](linear.parameters(), lr=spec.lr)
    generator = torch.Generator().manual_seed(spec.seed)
    mean = AveragedModel(linear)
    left = spec.epochs * math.ceil(len(x) / spec.batch_size)
    averaged = max(1, left // 10)
    for _ in range(spec.epochs):
        total = torch.zeros(())
        for batch in torch.randperm(len(x), generator=generator).split(spec.batch_size):
            mine = share.of(batch)
            loss = _backward(linear, x[mine].float(), y[mine], spec.l2, len(batch), share)
            optimizer.step()
            total += loss * len(batch)
            if left <= averaged:
                mean.update_parameters(linear)
            left -= 1
        share.sum(total)
        record(float(total) / len(x))
    linear.load_state_dict(mean.module.state_dict())


def _to_optimum(
    linear: "torch.nn.Linear",
    x: "torch.Tensor",
    y: "torch.Tensor",
    spec: Head,
    share: _Share,
    record: Callable[[float], None],
) -> None:
    """L-BFGS on all rows in float64, to the optimum of the convex objective.

    Nocedal and Wright, Numerical Optimization, chapter 7; torch.optim.LBFGS with its strong Wolfe line search.
    """
    import torch

    linear.double()
    mine_x, mine_y = share.of(x).double(), share.of(y)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        linear.parameters(),
        max_iter=_LBFGS_ITERATIONS,
        max_eval=_LBFGS_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> "torch.Tensor":
        total = _backward(linear, mine_x, mine_y, spec.l2, len(x), share)
        share.sum(total)
        record(float(total))
        return total

    optimizer.step(closure)
