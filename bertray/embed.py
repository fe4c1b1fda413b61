"""Embedding: units to vector stores, in parallel on Ray Data, each unit exactly once.

Units whose shards are there already are not touched. What can go wrong: a process that ends is started again by Ray,
and its units are begun again, a few times each; one that shows no sign of life is ended; a pipeline that fails is begun
again with what is missing.
"""

import json
import logging
import math
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa

from bertray import __version__, solo
from bertray.checkpoints import Checkpoint
from bertray.cluster import Workers, alive_nodes, check_reach, end_process, is_full, plan_workers
from bertray.errors import ERRORS, ClusterError
from bertray.progress import Progress, log
from bertray.sources import Unit
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import RaySizes, fingerprint
from bertray.splits import Rejects, Split, check_any, plan_of
from bertray.store import Attempt, Manifest, Receipt, Store
from bertray.vectors import with_vectors, with_words
from bertray.worker import UNITS_AT_ONCE, Job, UnitEncoder

_FAILURES = 3  # of the whole pipeline, one after another without a unit done in between
_BLOCKS = 10_000  # up to which a unit is one by itself: each costs Ray Data's driver some milliseconds
_SHARES = 4  # of what is left, that a worker is handed one of at most
_NOTED = 1_000  # receipts in one file
_LOOKED_FOR = 3  # files of the source that each node is asked for before it encodes
_LOOK_SECONDS = 15.0  # most between looks at the encoder processes


def embed(
    splits: Sequence[Split],
    spec: EncoderSpec,
    checkpoint: Checkpoint,
    sizes: RaySizes,
    label_names: tuple[str, ...] = (),
    finish: Callable[[pa.Table, Any, Sequence[str]], pa.Table] | None = None,
    ready: Callable[[float], None] = lambda seconds: None,
    max_rejects: float = 1.0,
    run: str = "",
    features: tuple[str, ...] = (),
    siamese: bool = False,
) -> dict[str, Manifest]:
    """Complete the stores of all splits, encoding what is missing, in one pipeline.

    Args:
        label_names: what labels have to be; empty takes any.
        finish: from a unit's rows, what the encoder gave them and its features to the table that its shard holds; left
            out, rows with vectors, or where the spec has states encoded again with words alone.
        ready: is told after how many seconds the first encoder process was ready, if one was started.
        max_rejects: rows of a split that may be set aside: a count, or a share if it is a float.
        run: tells this run's attempts from those of others.
        features: what vectors consist of; empty where the spec tells.
        siamese: whether the texts of pairs are encoded apart, as far as they lie in one unit.

    Raises:
        BertrayError: whatever stopped a worker, or too many rows were set aside.
    """
    for split in splits:
        split.store.write_plan(plan_of(split, spec, checkpoint, label_names))
    done = {split.name: split.store.done([unit.key for unit in split.units]) for split in splits}
    todo = [(split.name, unit) for split in splits for unit in split.units if unit.key not in done[split.name]]
    rejects = {split.name: Rejects(split, max_rejects) for split in splits}
    for name, receipts in done.items():
        for receipt in receipts.values():
            rejects[name].add(receipt)
    if todo:
        check_reach(
            list(dict.fromkeys(unit.url for _, unit in todo))[:_LOOKED_FOR]
            + [(split.store.location / "plan.json").url for split in splits],
            [split.store.url for split in splits],
        )
        job = Job(
            checkpoint.name,
            checkpoint.revision,
            checkpoint.identity,
            spec,
            label_names,
            {split.name: split.columns for split in splits},
            {split.name: split.store for split in splits},
            finish or (with_words if spec.states == "encode" else with_vectors),
            run,
            sizes.patience,
            features,
            siamese,
            not solo.alone(),
        )
        total = sum(unit.rows for split in splits for unit in split.units)
        missing = sum(unit.rows for _, unit in todo)
        if missing < total:
            log.info("embedding: %d of %d rows are done already", total - missing, total)
        with Progress("embedding", total, "rows", total - missing) as progress:
            started, tokens = time.monotonic(), 0
            unnoted: dict[str, list[Receipt]] = {split.name: [] for split in splits}
            for name, receipt in _until_done(todo, job, sizes, ready):
                done[name][receipt.unit] = receipt
                tokens += receipt.tokens
                speed = tokens / (time.monotonic() - started)
                progress.add(receipt.rows + receipt.rejected, f"{speed:.0f} tokens/s")
                rejects[name].add(receipt)
                unnoted[name].append(receipt)
                if len(unnoted[name]) == _NOTED:
                    job.stores[name].note(unnoted[name])
                    unnoted[name] = []
    return {split.name: _finish(split, done[split.name], checkpoint.name) for split in splits}


def _finish(split: Split, receipts: dict[str, Receipt], encoder: str) -> Manifest:
    # Name and versions are told, but are not part of the fingerprint: the hashes say what the encoder is.
    made_by = {**split.made_by, "encoder": encoder, "versions": versions()}
    manifest = Manifest(fingerprint(split.made_by), made_by, tuple(receipts[unit.key] for unit in split.units))
    check_any(split, manifest)
    split.store.finish(manifest)
    return manifest


def versions() -> dict[str, str]:
    """The versions of what computes."""
    packages = ("ray", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    ours = {"python": platform.python_version(), "bertray": __version__}  # which a job brings along, not installed
    return ours | {package: version(package) for package in packages}


def _until_done(
    todo: list[tuple[str, Unit]], job: Job, sizes: RaySizes, ready: Callable[[float], None]
) -> Iterator[tuple[str, Receipt]]:
    """Receipts of all units, in as many pipelines as it takes."""
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError

    missing, failures, fewer = {(name, unit.key): (name, unit) for name, unit in todo}, 0, False
    while missing:
        before, line = len(missing), "units are missing."
        try:
            for name, receipt in _receipts(list(missing.values()), job, sizes, ready, fewer):
                if missing.pop((name, receipt.unit), None):
                    yield name, receipt
        except (RayError, SystemException) as error:
            line = " ".join(str(error).split())[:300]
        for name, store in job.stores.items() if missing else ():  # some were done while their receipts were on the way
            for receipt in store.done([key for split, key in missing if split == name]).values():
                del missing[name, receipt.unit]
                yield name, receipt
        failures = 0 if len(missing) < before else failures + 1
        if failures == _FAILURES:
            raise ClusterError(
                f"Embedding has failed {failures} times in a row: {line} The same command goes on from here."
            )
        if missing:
            log.warning("embedding: begun again with %d units that are missing: %s", len(missing), line)
            fewer = True  # than asked for, where there is no more room for those


def _receipts(
    todo: list[tuple[str, Unit]], job: Job, sizes: RaySizes, ready: Callable[[float], None], fewer: bool
) -> Iterator[tuple[str, Receipt]]:
    """Receipts of units, in the order they are done, from one pipeline."""
    started, first = time.time(), True
    workers = plan_workers(sizes, len(todo), fewer)
    log.info(
        "embedding: %d units on %d %s worker(s) of %d thread(s)",
        len(todo),
        workers.count,
        workers.device,
        workers.threads,
    )
    watch, others = _Watch(job, workers), _pipelines()
    try:
        for row in _aside(_rows(todo, job, workers), watch.look):
            if first:
                ready(max(0.0, row["ready"] - started))  # another node's clock may differ
                first = False
            watch.heard()
            yield row["split"], Receipt(**json.loads(row["value"]))
    finally:  # what it holds has to be free for whatever comes next
        for pipeline in _pipelines() - others:
            pipeline.shutdown(force=True)


def _pipelines() -> set[Any]:
    """Ray Data's executors that are at work: each is a thread. There is no other way to one before its first block."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ == "StreamingExecutor"}


def _rows(todo: list[tuple[str, Unit]], job: Job, workers: Workers) -> Iterator[dict[str, Any]]:
    """What the actors answer to each unit."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # it takes slow units for hung ones: see _Watch
    context.max_consecutive_actor_init_deaths = _FAILURES
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # a pool grows when all in it are busy
    blocks = [
        {"units": [{"split": name, **asdict(unit)} for name, unit in todo[part]]}
        for part in _blocks(len(todo), workers.count)
    ]
    receipts = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        UnitEncoder,
        fn_constructor_args=(job, workers.device, workers.threads),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=workers.count if workers.most else 1,
            max_size=workers.most,
            initial_size=workers.count,  # Ray Data adds actors one at a time otherwise
            max_concurrent_calls_per_actor=UNITS_AT_ONCE,
            max_tasks_in_flight_per_actor=UNITS_AT_ONCE + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
    )
    receipts.set_name(f"embed_{re.sub(r'[^A-Za-z0-9_]', '_', next(iter(job.stores.values())).run_name)}")
    with solo.running():
        for batch in receipts.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in batch.to_pylist():
                if row["error"]:
                    raise ERRORS[row["error"]](row["value"])
                yield row


def _blocks(units: int, workers: int) -> Iterator[slice]:
    """Which units are handed to a worker together: of so many that they would be too many blocks, several, ever fewer
    toward the end, so that all workers end at about the same time."""
    start, most = 0, math.ceil(units / _BLOCKS)
    while start < units:
        size = min(most, math.ceil((units - start) / (_SHARES * workers)))
        yield slice(start, start + size)
        start += size


def _aside(items: Iterator[Any], meanwhile: Callable[[], None]) -> Iterator[Any]:
    """Items as they come from an iterator that runs in a thread, so that the caller can look after other things each
    second, and Ctrl-C finds a thread that waits for nothing of Ray's."""
    queue: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def drain() -> None:
        try:
            for item in items:
                queue.put((False, item))
            queue.put((True, None))
        except BaseException as error:
            queue.put((True, error))

    threading.Thread(target=drain, name="bertray-pipeline", daemon=True).start()
    while True:
        try:
            ended, item = queue.get(timeout=1)
        except Empty:
            meanwhile()
            continue
        if ended and item:
            raise item
        if ended:
            return
        yield item
        meanwhile()


@dataclass
class _Watch:
    """Tells encoder processes that hang from those that are slow, by whether they renew their attempts, and ends them:
    Ray starts them again."""

    job: Job
    workers: Workers
    seen: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    sign: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    queued: bool = False  # whether other work held what the processes need
    ended: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.queued = is_full(self.workers)

    def heard(self) -> None:
        """A unit is done."""
        self.sign, self.queued = time.monotonic(), False

    def look(self) -> None:
        """Look after the processes, now and then.

        Raises:
            ClusterError: none of them has shown a sign of life.
        """
        now, patience = time.monotonic(), self.job.patience
        if now - self.looked < min(_LOOK_SECONDS, patience / 4):
            return
        self.looked, before = now, self.seen
        self.seen = {}
        for split, store in self.job.stores.items():
            for file in store.attempts():
                stamp, since = before.get((split, file.name), ("", now))
                if stamp != file.stamp:
                    self.sign, since = now, now
                elif now - since > patience:
                    self._end(store.attempt(file.name.removesuffix(".json")))
                    since = now
                self.seen[split, file.name] = (file.stamp, since)
        if now - self.sign > 2 * patience:
            self._nothing()

    def _end(self, attempt: Attempt | None) -> None:
        if not attempt or attempt.run != self.job.run or (attempt.node, attempt.pid) in self.ended:
            return  # what was noted is of another run, or of a process that is gone
        self.ended.add((attempt.node, attempt.pid))
        if attempt.node not in alive_nodes():
            return
        log.warning(
            "embedding: process %d on %s has shown no sign of life for %d s: it is ended, and begun again",
            attempt.pid,
            attempt.host,
            self.job.patience,
        )
        end_process(attempt.node, attempt.pid, UnitEncoder.__name__)
        self.sign = time.monotonic()

    def _nothing(self) -> None:
        if self.queued and is_full(self.workers):
            log.warning("embedding: still waiting: the Ray cluster is busy with other work")
            self.sign = time.monotonic()
            return
        raise ClusterError(
            f"No encoder process has shown a sign of life for {2 * self.job.patience} s: they hang, die while they "
            "start (out of memory?), or their nodes are gone. See `ray status` and the logs in /tmp/ray; the same "
            "command goes on from here."
        )


def reasons(store: Store, manifest: Manifest) -> dict[str, int]:
    """How many rows were set aside for each reason."""
    counts: Counter[str] = Counter()
    for receipt in manifest.units:
        if receipt.rejected:
            counts.update(row["reason"] for row in store.rejects(receipt.unit))
    return dict(counts)
