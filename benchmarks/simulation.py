"""What 10 billion rows on 1,000 GPUs ask of the driver and of the store: python -m benchmarks.simulation

No GPUs are needed. Real are the source (Parquet files of a million rows each, of one text, and so small), how it is
cut into units, the plan, the pipeline on Ray Data, receipts, notes, manifest, `bertray status`, and requests to an S3
server (moto). A stub stands for the encoder: it gives a shard of one row, or from 2,000 units on a receipt alone. How
long 1,000 GPUs take is simulated, from the cost of a unit and of a block that was measured here. Each measurement is a
process of its own, whose peak memory is the driver's.
"""

import argparse
import heapq
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import machine, results
from bertray import audit, embed
from bertray.clock import Stopwatch
from bertray.sources import UNIT_ROWS, Columns, Unit, units
from bertray.spec import Encoder, RaySizes, Source
from bertray.splits import Split, plan_of
from bertray.storage import Location
from bertray.store import Attempt, Manifest, Receipt, Store
from bertray.worker import UNITS_AT_ONCE, Job, UnitEncoder

SIZES = (1_000, 10_000, 50_000, 500_000)  # units; the last are 10 billion rows
DRIVEN = (1_000, 5_000, 500_000)
GPUS = 1_000
TOKENS = (30, 128)  # a row
_RATE = 2e6  # tokens a second that a GPU encodes
_FILE_ROWS, _GROUP_ROWS = 1_000_000, 100_000
_WRITTEN = 2_000  # up to so many units, shards are written
_ASKED = 20  # units whose requests are counted
_COLUMNS = Columns("text", label="label")
_SPEC = Encoder(model="none")
_CHECKPOINT: Any = SimpleNamespace(name="none", revision="main", identity={})
_MADE_BY = {"features": ["mean_6"]}
_NO_REJECTS = pa.table({"id": pa.array([], pa.string()), "reason": [], "preview": []})
_Found = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.measure:
        print(json.dumps(_MEASURED[options.measure](options.units)))
        return
    books = [_ask("books", size) for size in options.sizes]
    driven = [_ask("driven", size) for size in options.driven]
    asked = _ask("requests", _ASKED)
    markdown = report(books, driven, asked)
    print(markdown)
    if options.write:
        results.write("simulation", markdown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="units to keep the books of")
    parser.add_argument("--driven", type=int, nargs="+", default=DRIVEN, help="units to drive through Ray Data")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--measure", choices=_MEASURED, help=argparse.SUPPRESS)  # one measurement, in its own process
    parser.add_argument("--units", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _ask(measure: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.simulation", "--measure", measure, "--units", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(measure, found, file=sys.stderr)
    return found


# --- the source and its store ---------------------------------------------------------------------------------


def _source(count: int, folder: Path) -> Source:
    """Files of so many units (up to 50, or a multiple): one, and links to it under other names."""
    folder.mkdir()
    first, rows = folder / "part-00000.parquet", min(_FILE_ROWS, count * UNIT_ROWS)
    pq.write_table(pa.table({"text": ["a text"] * rows, "label": ["no"] * rows}), first, row_group_size=_GROUP_ROWS)
    for number in range(1, count * UNIT_ROWS // rows):
        os.link(first, folder / f"part-{number:05d}.parquet")
    return Source(path=str(folder))


def _split(cut: Sequence[Unit], folder: Path) -> Split:
    return Split("train", tuple(cut), _COLUMNS, Store(str(folder / "stores" / "train-simulated")), _MADE_BY)


def _receipt(unit: Unit, lost: int = 0) -> Receipt:
    return Receipt(unit.key, unit.rows, 0, 0, 0, 30 * unit.rows, 0.3, {"no": unit.rows}, "stub", 0, lost, 0, "0" * 64)


class Stub(UnitEncoder):
    """Writes a shard of one row for each unit, and says that it holds all."""

    def _loaded(self, attempt: Attempt, device: str, threads: int) -> Any:
        backend = SimpleNamespace(busy=Stopwatch(), budget=0)
        return SimpleNamespace(steps=0, tokenizing=Stopwatch(), backend=backend)

    def _encode(self, split: str, unit: Unit, attempt: Attempt) -> Receipt:
        if done := self.job.stores[split].receipt(unit.key):
            return done
        rows = pa.table({"id": [unit.name], "text": ["a text"], "label": ["no"]})
        table = self.job.finish(rows, SimpleNamespace(vectors=np.zeros((1, 2), np.float16)), _MADE_BY["features"])
        return self.job.stores[split].write_shard(_receipt(unit, attempt.lost), table, _NO_REJECTS)


class Answering(Stub):
    """Writes nothing."""

    def _attempt(self, split: str, unit: Unit) -> Receipt:
        return _receipt(unit)


def _job(split: Split) -> Job:
    return Job("none", "", {}, _SPEC, (), {split.name: split.columns}, {split.name: split.store})


def _seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = action()
    return time.perf_counter() - started, found


# --- what is measured -----------------------------------------------------------------------------------------


def _books(count: int) -> dict[str, Any]:
    """What there is to read and write beside the pipeline, now and as it was before."""
    with tempfile.TemporaryDirectory(prefix="bertray-simulation-") as place:
        folder = Path(place)
        source = _source(count, folder / "source")
        cutting, cut = _seconds(lambda: units(source, _COLUMNS))
        split = _split(cut, folder)
        store, keys = split.store, [unit.key for unit in cut]
        planning, _ = _seconds(lambda: store.write_plan(plan_of(split, _SPEC, _CHECKPOINT, ())))
        _fill(store, cut)
        footers, found = _seconds(lambda: store.done(keys))
        assert len(found) == len(keys)
        receipts = [found[key] for key in keys]
        for start in range(0, count, embed._NOTED):
            store.note(receipts[start : start + embed._NOTED])
        noted, found = _seconds(lambda: store.done(keys))
        assert [found[key] for key in keys] == receipts
        for key in keys[::2]:
            store.shard(key).delete()
        half, found = _seconds(lambda: store.done(keys))
        assert len(found) == count // 2
        telling, told = _seconds(lambda: audit.status(place))
        assert told["stores"][0]["units_done"] == count // 2
        manifest = Manifest("simulated", _MADE_BY, tuple(receipts))
        del found, told, receipts
        writing, _ = _seconds(lambda: store.finish(manifest))
        reading, again = _seconds(store.manifest)
        assert again == manifest
        memory = machine.peak_memory("cpu")
        before, text = _seconds(lambda: json.dumps(asdict(manifest), indent=1).encode())
        return {
            "units": count,
            "files": len({unit.url for unit in cut}),
            "cut": cutting,
            "plan": planning,
            "footers": footers,
            "noted": noted,
            "half": half,
            "status": telling,
            "manifest": writing,
            "manifest before": before,
            "read": reading,
            "bytes": (Path(store.url) / "manifest.json").stat().st_size,
            "bytes before": len(text),
            "memory": memory,
        }


def _fill(store: Store, cut: Sequence[Unit]) -> None:
    """The shards of all units: one, in which each unit's receipt is put in its place."""
    Stub(_job(Split("train", (), _COLUMNS, store, _MADE_BY)), "cpu", 1)._answer("train", **asdict(cut[0]))
    first = Path(store.shard(cut[0].key).path)
    shard, key = first.read_bytes(), cut[0].key.encode()
    for unit in cut[1:]:
        (first.parent / f"{unit.key}.parquet").write_bytes(shard.replace(key, unit.key.encode()))


def _driven(count: int) -> dict[str, Any]:
    """Units through the real pipeline; where shards are written, half of them once more."""
    from bertray.cluster import connected

    with tempfile.TemporaryDirectory(prefix="bertray-simulation-") as place:
        split = _split(units(_source(count, Path(place) / "source"), _COLUMNS), Path(place))
        stub = Stub if count <= _WRITTEN else Answering
        real, blocks = embed._blocks, len([*embed._blocks(count, GPUS)])
        with (
            patch.object(embed, "UnitEncoder", stub),
            patch.object(embed, "_blocks", lambda units, _: real(units, GPUS)),
            connected(RaySizes(address="local"), alone=True),
        ):
            seconds, used, manifest = _embedded(split)
            assert manifest.holds([unit.key for unit in split.units])
            memory = machine.peak_memory("cpu")
            if stub is Stub:
                _go_on(split, manifest)
        return {
            "units": count,
            "blocks": blocks,
            "written": stub is Stub,
            "seconds": seconds,
            "cpu": used,
            "memory": memory,
        }


def _embedded(split: Split) -> tuple[float, float, Manifest]:
    """Seconds from when the first process was ready, seconds of the driver's processor, and the manifest."""
    started: list[float] = []

    def ready(_: float) -> None:
        started.extend((time.perf_counter(), time.process_time()))

    sizes = RaySizes(workers=2, cpus_per_worker=1)
    manifest = embed.embed([split], _SPEC, _CHECKPOINT, sizes, ready=ready)[split.name]
    return time.perf_counter() - started[0], time.process_time() - started[1], manifest


def _go_on(split: Split, manifest: Manifest) -> None:
    """A run that was killed half way: what is there is not encoded again."""
    shards = [Path(split.store.shard(unit.key).path) for unit in split.units]
    for shard in shards[::2]:
        shard.unlink()
    kept = {shard: shard.stat().st_mtime_ns for shard in shards[1::2]}
    again = _embedded(split)[2]
    assert [unit.unit for unit in again.units] == [unit.unit for unit in manifest.units]
    assert {shard: shard.stat().st_mtime_ns for shard in kept} == kept
    assert not split.store.attempts()


def _requests(count: int) -> dict[str, Any]:
    """Requests to an S3 server for each unit, and for each of the units that a resumed run finds."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, _server() as seen:
        source = Path(_source(count, Path(place) / "source").path) / "part-00000.parquet"
        for form in ("before", "now"):
            with _as_it_was(form == "before"):
                (Location("s3://box") / form / "source" / source.name).write(source.read_bytes())
                cut = units(Source(path=f"s3://box/{form}/source"), _COLUMNS)
                split = replace(_split(cut, Path(place)), store=Store(f"s3://box/{form}/store"))
                worker = Stub(_job(split), "cpu", 1)
                seen.clear()
                for unit in cut:
                    worker._read("train", unit)
                    assert not worker._answer("train", **asdict(unit))["error"]
                found[form] = {kind: n / len(cut) for kind, n in sorted(seen.items())}
                if form == "now":
                    split.store.note(list(split.store.done([unit.key for unit in cut]).values()))
                seen.clear()
                assert len(split.store.done([unit.key for unit in cut])) == len(cut)
                every, once = sum(seen.values()), seen["LIST"] + (2 if form == "now" else 0)
                found[f"done {form}"] = {
                    "all": every,
                    "units": len(cut),
                    "once": once,
                    "a unit": (every - once) / len(cut),
                }
    return found


@contextmanager
def _as_it_was(wanted: bool) -> Iterator[None]:
    """Every object an upload in parts, and no receipts noted."""
    if not wanted:
        yield
        return
    from pyarrow import fs

    class InParts:
        @staticmethod
        def from_uri(url: str) -> Any:
            return fs.FileSystem.from_uri(url.removesuffix("?allow_delayed_open=true"))

    pafs = SimpleNamespace(**{name: getattr(fs, name) for name in dir(fs) if name != "FileSystem"}, FileSystem=InParts)
    with patch("bertray.storage.pafs", pafs), patch.object(Store, "_noted", lambda store: {}):
        yield


@contextmanager
def _server() -> Iterator[Counter[str]]:
    """An S3 server with a bucket `box`, and its count of requests."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Application
    from moto.server import ThreadedMotoServer

    seen: Counter[str] = Counter()
    answer = Application.__call__

    def counted(self: Any, environ: dict[str, Any], start: Any) -> Any:
        listing = "list-type" in environ.get("QUERY_STRING", "")
        seen["LIST" if listing else environ["REQUEST_METHOD"]] += 1
        return answer(self, environ, start)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    with patch.object(Application, "__call__", counted), patch.dict(os.environ, settings):
        server.start()
        boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"]).create_bucket(Bucket="box")
        yield seen
        server.stop()


_MEASURED: dict[str, Callable[[int], dict[str, Any]]] = {"books": _books, "driven": _driven, "requests": _requests}


# --- what is simulated ----------------------------------------------------------------------------------------


def simulated(blocks: Sequence[int], seconds: float, block: float, unit: float, gpus: int = GPUS) -> float:
    """Seconds until all blocks are done, where a GPU takes so many a unit, give or take a fifth, and the driver, one
    block after another, so many a block and a unit in it. A GPU has a few blocks in flight."""
    rng = random.Random(0)
    due = [(0.0, gpu) for _ in range(UNITS_AT_ONCE + 1) for gpu in range(gpus)]  # when a GPU can take another
    free, driver = [0.0] * gpus, 0.0
    for size in blocks:
        at, gpu = heapq.heappop(due)
        driver = max(driver, at) + block + unit * size
        free[gpu] = max(free[gpu], driver) + seconds * size * rng.uniform(0.8, 1.2)
        heapq.heappush(due, (free[gpu], gpu))
    return max(free)


def _costs(driven: Sequence[_Found]) -> tuple[float, float]:
    """Seconds that the driver takes for a block and for a unit in it, by least squares over what was measured."""
    weights = np.array([[one["blocks"], one["units"]] for one in driven], float)
    seconds = np.array([one["cpu"] for one in driven], float)
    scale = 1 / np.maximum(seconds, 1e-9)
    if np.linalg.matrix_rank(weights * scale[:, None], tol=1e-6) < 2:  # all were blocks of one unit
        return float(seconds.sum() / weights[:, 0].sum()), 0.0
    block, unit = np.linalg.lstsq(weights * scale[:, None], seconds * scale, rcond=None)[0]
    return float(block), max(0.0, float(unit))


# --- the report -----------------------------------------------------------------------------------------------


def report(books: Sequence[_Found], driven: Sequence[_Found], asked: _Found) -> str:
    """The section."""
    block, unit = _costs(driven)
    a_unit = {form: sum(asked[form].values()) for form in ("before", "now")}
    return "\n".join(
        [
            "## 10 billion rows on 1,000 GPUs, simulated",
            "",
            f"Units of {UNIT_ROWS:,} rows of real Parquet files of {_FILE_ROWS:,} rows each (all of one text, and so "
            "small). Nothing is encoded: a stub answers in place of the encoder. *Before* is what bertray did before "
            "this was measured: a unit a block, every receipt from its shard, every object an upload in parts.",
            "",
            "### What the driver reads and writes",
            "",
            "Real, on a local disk, in seconds. *Cut* counts the rows of all files, whose content is hashed too, since "
            "they are local and small. *Receipts* are those of a run that goes on with all shards there, or half of "
            "them, and no manifest.",
            "",
            results.table([_kept(one) for one in books]),
            "",
            results.table([_compared(one) for one in books]),
            "",
            "### Units through Ray Data",
            "",
            "Real: the pipeline, its driver, receipts and manifest, on 2 stub processes of this machine; units are put "
            f"into blocks as for {GPUS:,} GPUs. Up to {_WRITTEN:,} units, each is noted as begun and its shard of one "
            "row written, and a run that goes on with half of them encodes none twice (it is asserted); beyond, the "
            "stub gives receipts alone, so that the driver is what is measured.",
            "",
            results.table([_drove(one) for one in driven]),
            "",
            f"By these, a block takes {1e3 * block:.1f} ms of the driver's processor and a unit in it "
            f"{1e3 * unit:.2f} ms.",
            "",
            "### Requests to an object store",
            "",
            f"Counted by an S3 server (moto) over {_ASKED} units: one real process reads its rows, notes that it is at "
            "work, and writes its shard. These files are read with their footers, in one request; others take "
            "more. Of a resume, what it takes to know 1,000 units that are done: a listing shows 1,000, and "
            "a note holds as many.",
            "",
            results.table([_asked(form, asked) for form in ("before", "now")]),
            "",
            "### 1,000 GPUs",
            "",
            f"Simulated, by events: a GPU encodes {_RATE / 1e6:.0f} million tokens a second, and takes a unit a fifth "
            "longer or shorter than that; the driver takes what was measured above, one block after another, and "
            f"{UNITS_AT_ONCE + 1} blocks a GPU are in flight. Left out: what Ray takes to start 1,000 processes, and "
            "that its scheduler may take longer for a block with 1,000 of them than with the 2 of the measurement.",
            "",
            results.table([_told(tokens, form, block, unit, a_unit) for tokens in TOKENS for form in a_unit]),
            "",
            *(f"- {name}: {fact}" for name, fact in machine.describe().items()),
        ]
    )


def _kept(one: _Found) -> dict[str, str]:
    return {
        "units": f"{one['units']:,}",
        "files": f"{one['files']:,}",
        **{name: f"{one[name]:.2f}" for name in ("cut", "plan")},
        "receipts": f"{one['noted']:.2f}",
        "half of them": f"{one['half']:.2f}",
        "status": f"{one['status']:.2f}",
        "manifest written": f"{one['manifest']:.2f}",
        "and read": f"{one['read']:.2f}",
        "memory at most, MB": f"{one['memory'] / 1e6:,.0f}",
    }


def _compared(one: _Found) -> dict[str, str]:
    return {
        "units": f"{one['units']:,}",
        "receipts before, s": f"{one['footers']:.2f}",
        "ratio to now": f"{one['footers'] / one['noted']:.1f}",
        "manifest before, s": f"{one['manifest before']:.2f}",
        "ratio to now's": f"{one['manifest before'] / one['manifest']:.1f}",
        "MB before": f"{one['bytes before'] / 1e6:.1f}",
        "MB now": f"{one['bytes'] / 1e6:.1f}",
    }


def _drove(one: _Found) -> dict[str, str]:
    return {
        "units": f"{one['units']:,}",
        "blocks": f"{one['blocks']:,}",
        "shards": "written" if one["written"] else "-",
        "seconds": f"{one['seconds']:.1f}",
        "units/s": f"{one['units'] / one['seconds']:,.0f}",
        "driver's processor, ms a unit": f"{1e3 * one['cpu'] / one['units']:.2f}",
        "driver's memory, MB": f"{one['memory'] / 1e6:,.0f}",
    }


def _asked(form: str, asked: _Found) -> dict[str, str]:
    kinds = ("GET", "HEAD", "LIST", "PUT", "POST", "DELETE")
    done = asked[f"done {form}"]
    return {
        "a unit": form,
        **{kind: f"{asked[form].get(kind, 0):.2f}" for kind in kinds},
        "all": f"{sum(asked[form].values()):.1f}",
        f"a resume of {done['units']}": f"{done['all']}",
        "of 1,000": f"{1_000 * done['a unit'] + done['once']:,.0f}",
    }


def _told(tokens: int, form: str, block: float, unit: float, a_unit: Mapping[str, float]) -> dict[str, str]:
    count = max(SIZES)
    seconds = UNIT_ROWS * tokens / _RATE
    parts = list(embed._blocks(count, GPUS)) if form == "now" else []
    blocks = [part.stop - part.start for part in parts] or [1] * count
    took = simulated(blocks, seconds, block, unit)
    return {
        "tokens a row": f"{tokens} ({form})",
        "a unit takes, s": f"{seconds:.2f}",
        "blocks": f"{len(blocks):,}",
        "seconds in all": f"{took:,.0f}",
        "GPUs idle": f"{100 * (1 - count * seconds / GPUS / took):.0f}%",
        "units/s": f"{count / took:,.0f}",
        "requests/s": f"{count / took * a_unit[form]:,.0f}",
    }


if __name__ == "__main__":
    main()
