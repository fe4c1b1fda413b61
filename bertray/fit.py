"""Fitting: a store's vectors to a head, on Ray Train.

Every row belongs to one worker. Batches are drawn over the rows of all, and each worker takes its own rows of every
batch: any number of workers takes the same steps (up to the order of sums).
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bertray.errors import ClusterError
from bertray.heads import LinearHead
from bertray.progress import Progress, log
from bertray.samples import Share, samples
from bertray.solvers import solve
from bertray.spec import Head, RaySizes
from bertray.store import Store

RECIPE = 1  # raised when a change of code gives another head for the same settings
_POLL_SECONDS = 0.5
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Fitted:
    """head: the head; losses: the objective after each epoch (adam, sgd) or at each evaluation (lbfgs);
    seconds: time spent fitting, without the start of processes."""

    head: LinearHead
    losses: list[float]
    seconds: float


def fit(store: Store, classes: Mapping[str, int], names: int, spec: Head, sizes: RaySizes | None = None) -> Fitted:
    """Fit a linear head on a complete store.

    Args:
        classes: class index of each label in the store.
        names: number of classes.
        sizes: how many Ray Train workers (0 fits in this process: Ray Train's local mode, the same code), how much
            they may hold in memory, and on which device.

    Raises:
        ClusterError: the cluster cannot hold that many workers.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    sizes = sizes or RaySizes()
    config = {
        "store": store.url,
        "classes": dict(classes),
        "names": names,
        "head": spec.model_dump(),
        "memory": sizes.fit_memory,
        "device": sizes.device,
    }
    # How often L-BFGS evaluates the objective is not known beforehand.
    steps, unit = (0, "evaluations") if spec.optimizer == "lbfgs" else (spec.epochs, "epochs")
    with Progress("fitting", steps, unit) as progress:

        def tell(step: int, loss: float) -> None:
            progress.add(1, f"loss {loss:.4f}")

        return Fitted(**(_fit_on(sizes.fit_workers, config, tell) if sizes.fit_workers else _fit_here(config, tell)))


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

    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
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
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=config["device"] != "cpu" and gpus >= workers),
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

    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    spec = Head(**config["head"])
    losses: list[float] = []

    def record(loss: float) -> None:
        losses.append(loss)
        tell(len(losses), loss)

    with samples(Store(config["store"]), config["classes"], share, config["memory"], config["device"]) as mine:
        started = time.perf_counter()
        head = solve(mine, config["names"], spec, share, record)
        return {"head": head, "losses": losses, "seconds": time.perf_counter() - started}
