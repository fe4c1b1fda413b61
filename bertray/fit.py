"""Fitting: a store's vectors to a head, on Ray Train.

Every row belongs to one worker. Batches are drawn over the rows of all, and each worker takes its own rows of every
batch: any number of workers takes the same steps (up to the order of sums).
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertray import ood
from bertray.errors import BertrayError, ClusterError
from bertray.heads import LinearHead
from bertray.ood import Familiar
from bertray.progress import Progress, log
from bertray.samples import Samples, Share, Wanted, samples
from bertray.search import Choice, choose, fit_one, lengths_of, settings
from bertray.spec import Head, RaySizes
from bertray.storage import Location

RECIPE = 3  # raised when a change of code gives another bundle for the same settings
_POLL_SECONDS = 0.5
_CHECKPOINT_SECONDS = 10.0
_PATIENCE = 600  # seconds without a node to fit on
_FAILURES = 3  # of Ray Train's workers that are made good
_TAKEN = 4_096  # rows at once
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Fitted:
    """head: the head, over the features of choice.setting side by side; choice: what it was fitted with, and why;
    losses: the objective after each epoch (adam, sgd) or at each evaluation (lbfgs); seconds: time spent fitting,
    without the start of processes; lengths: see `search.lengths_of`; ood: what the training rows look like, where texts
    have vectors."""

    head: LinearHead
    choice: Choice
    losses: list[float]
    seconds: float
    lengths: tuple[float, ...] = ()
    ood: Familiar | None = None


def fit(
    wanted: Wanted, spec: Head, layers: int, sizes: RaySizes | None = None, folder: Location | None = None
) -> Fitted:
    """Fit a linear head on complete stores.

    Args:
        layers: of the encoder.
        sizes: how many Ray Train workers at most (0 fits in this process: Ray Train's local mode, the same code), how
            much they may hold in memory, and on which device.
        folder: that all nodes see, for checkpoints while it lasts; None takes a temporary one of this machine.

    Raises:
        ClusterError: the cluster cannot hold that many workers.
        SpecError: what is to be searched is not stored.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    sizes = sizes or RaySizes()
    config = {
        "wanted": wanted,
        "candidates": settings(spec, wanted.features, layers),
        "head": spec,
        "memory": sizes.fit_memory,
        "device": sizes.device,
        "pause": _CHECKPOINT_SECONDS,
    }
    # How often L-BFGS evaluates the objective is not known beforehand.
    steps, unit = (0, "evaluations") if spec.optimizer == "lbfgs" else (spec.epochs, "epochs")
    with Progress("fitting", steps, unit) as progress:

        def tell(step: int, loss: float) -> None:
            progress.add(1, f"loss {loss:.4f}")

        return _fit_on(sizes.fit_workers, config, tell, folder) if sizes.fit_workers else _fit_here(config, tell)


def _fit_here(config: dict[str, Any], tell: Tell) -> Fitted:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        lambda: train(config, tell), scaling_config=ScalingConfig(num_workers=0), run_config=RunConfig(name="bertray")
    )
    return trainer.fit().return_value


def _fit_on(workers: int, config: dict[str, Any], tell: Tell, folder: Location | None) -> Fitted:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    if workers > cpus:
        raise ClusterError(f"ray.fit_workers must be at most the cluster's CPUs ({cpus:g}). Got {workers} instead.")
    # Train polls its workers at this interval, and waits for a poll at the end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Here: where it costs nothing Ray puts it on any node, which may go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    config = {**config, "board": board}
    log.info("fitting on %d workers", workers)
    with _checkpoint_folder(folder) as kept:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config=config,
            # As many as there is room for when they are begun: after a node has died it goes on with fewer.
            scaling_config=ScalingConfig(
                num_workers=(1, workers), use_gpu=config["device"] != "cpu" and gpus >= workers
            ),
            run_config=RunConfig(
                name="bertray",
                storage_path=kept.path,
                storage_filesystem=kept.fs,
                failure_config=FailureConfig(max_failures=_FAILURES),
            ),
        )
        # Not in the main thread: there Train takes over SIGINT and keeps it.
        pool = ThreadPoolExecutor(1)
        running = pool.submit(trainer.fit)
        pool.shutdown(wait=False)  # Ctrl-C must not wait for it
        ended, seen = False, time.monotonic()
        while not ended:
            time.sleep(_POLL_SECONDS)
            ended = running.done()
            for step, loss in ray.get(board.take.remote()):
                tell(step, loss)
            if ray.cluster_resources().get("CPU"):
                seen = time.monotonic()
            elif time.monotonic() - seen > _PATIENCE:  # Ray Train waits for ever
                raise ClusterError(f"No node to fit on is left, for {_PATIENCE} s. The same command goes on from here.")
        try:
            return running.result().return_value
        except TrainingFailedError as error:
            raise _cause(error) from None


def _cause(error: Exception) -> BertrayError:
    """In a line, what ended a fit: what a user can mend if there is such a thing among what the workers raised."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]  # Ray Train wraps it, with a traceback
    if told := next((cause for cause in causes if isinstance(cause, BertrayError)), None):
        return told
    cause = next(iter(causes), error)
    line = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    return ClusterError(f"Fitting has failed {_FAILURES + 1} times: {line}. The same command goes on from here.")


@contextmanager
def _checkpoint_folder(folder: Location | None) -> Iterator[Location]:
    """An empty folder that is gone afterwards: what lies there is what Ray Train would go on from."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="bertray-") as path:
            yield Location(path)
        return
    folder.delete()
    try:
        yield folder
    finally:
        folder.delete()


class Board:
    """An actor that carries progress from the first worker to the driver."""

    def __init__(self) -> None:
        self._news: list[tuple[int, float]] = []

    def put(self, step: int, loss: float) -> None:
        self._news.append((step, loss))

    def take(self) -> list[tuple[int, float]]:
        news, self._news = self._news, []
        return news


def _train_worker(config: dict[str, Any]) -> Fitted:
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    tell = (lambda step, loss: config["board"].put.remote(step, loss)) if first else lambda *_: None
    return train(config, tell, _Checkpoints(config["pause"]))


def train(config: dict[str, Any], tell: Tell, checkpoints: "_Checkpoints | None" = None) -> Fitted:
    """The training function: what each worker runs."""
    import ray.train

    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    wanted, spec = config["wanted"], config["head"]
    losses: list[float] = []

    def record(loss: float) -> None:
        losses.append(loss)
        tell(len(losses), loss)

    with samples(wanted, share, config["memory"], config["device"]) as mine:
        started = time.perf_counter()
        before = checkpoints.load() if checkpoints else {}
        choice = before.get("choice") or choose(mine, wanted, config["candidates"], spec, share)
        losses += before.get("losses", [])
        resume: dict[str, Any] = {"start": before.get("state")}
        if checkpoints:
            resume["save"] = lambda state: checkpoints.save({"choice": choice, "losses": losses, "state": state}, share)
        head = fit_one(mine, wanted, choice, spec, share, record, **resume)
        lengths = lengths_of(mine, share) if wanted.form == "answers" else ()
        seconds = time.perf_counter() - started
        return Fitted(head, choice, losses, seconds, lengths, _familiar(mine, wanted, choice, spec.seed, share))


def _familiar(samples: Samples, wanted: Wanted, choice: Choice, seed: int, share: Share) -> Familiar | None:
    """What some of the training rows of all workers look like in the features of a choice, side by side; the first
    worker learns it."""
    import torch

    if wanted.form in ("tokens", "answers"):
        return None
    started = time.perf_counter()
    samples = samples.of([wanted.features.index(name) for name in choice.setting.features], False)
    known = samples.targets if wanted.form == "name" else torch.zeros_like(samples.folds)
    mine = torch.where(samples.weights > 0, known, -1).int().cpu().numpy()  # not those to choose by
    classes = np.empty(samples.count, np.int64)
    for rank, part in enumerate(share.gather(mine)):
        classes[rank :: share.world] = part
    training = np.flatnonzero(classes >= 0)
    rows = training[ood.sample(classes[training], samples.width, seed)]
    own = torch.from_numpy(rows[rows % share.world == share.rank] // share.world).to(samples.device)
    taken = [samples.take(part, torch.float32).cpu().numpy() for part in own.split(_TAKEN)]
    vectors = np.empty((len(rows), samples.width), np.float32)
    for rank, parts in enumerate(share.gather(taken)):
        vectors[rows % share.world == rank] = np.concatenate(parts)
    if share.rank:
        return None
    found = ood.fit(vectors, classes[rows], seed)
    if found:
        log.info("fitting: what %d rows look like, learned in %.1f s", len(rows), time.perf_counter() - started)
    else:
        log.info("fitting: %d rows are too few or too much the same to tell what is unlike them", len(rows))
    return found


class _Checkpoints:
    """What a worker that is begun again goes on from: kept now and then, since each report to Ray Train takes time."""

    def __init__(self, pause: float) -> None:
        """Seconds between two."""
        self._last, self._pause = time.monotonic(), pause

    def load(self) -> dict[str, Any]:
        import ray.train
        import torch

        found = ray.train.get_checkpoint()
        if found is None:
            return {}
        log.warning("fitting: a worker ended; it goes on from the last checkpoint")
        with found.as_directory() as folder:
            state: dict[str, Any] = torch.load(Path(folder) / "state.pt", weights_only=False)  # our own, of this run
        return state

    def save(self, state: dict[str, Any], share: Share) -> None:
        """Keep a state, if it is time for that: the first worker's clock tells."""
        import ray.train
        import torch

        if not share.gather(time.monotonic() - self._last > self._pause)[0]:
            return
        self._last = time.monotonic()
        if share.rank:
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
            torch.save(state, Path(folder) / "state.pt")
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
