"""The `bertray` command. Imported by nobody but `jobs/`; loads what a command needs only when it runs."""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from bertray.errors import BertrayError

_REASONS = 5  # why rows are set aside, in a summary
_METRICS = ("accuracy", "exact", "f1", "micro_f1", "macro_f1", "pearson", "spearman", "rmse", "loss")  # in a summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("bertray").setLevel(logging.DEBUG if options.debug else logging.INFO)
    answer = os.dup(1)
    if options.json:
        os.dup2(2, 1)  # whatever else is printed, by anyone, goes to stderr
    signal.signal(signal.SIGINT, _interrupt)
    try:
        result = options.action(options)
    except KeyboardInterrupt:
        print(
            "Stopped." if options.action is _serve else "Stopped. The same command goes on from here.", file=sys.stderr
        )
        return 130
    except Exception as error:
        if options.debug:
            raise
        known = isinstance(error, BertrayError | OSError)  # such as a folder that may not be written
        line = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(f"bertray: {line}" if known else f"bertray: unexpected {line} (--debug shows all)", file=sys.stderr)
        return 2 if known else 1
    if options.json:
        with os.fdopen(answer, "w") as stdout:
            print(json.dumps(result, ensure_ascii=False), file=stdout)
    return 0 if (result or {}).get("ok", True) else 2


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command as a process: `main`, and out. Python's own way out, which takes torch and all else down piece by
    piece, can take a second; by now nothing is left to be ended or written."""
    ended = _told_if_killed()
    try:
        code = main(arguments)
    finally:
        with suppress(OSError):
            os.write(ended, b".")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _told_if_killed() -> int:
    """Start a process that does nothing but wait for this one, and says so where this one ends without a word: by the
    kernel, out of memory, or by Ray, which takes its drivers along when its node ends.

    Returns:
        What to write a byte to when all is said.
    """
    waiting, ended = os.pipe()
    if os.fork():
        os.close(waiting)
        return ended
    os.close(ended)
    for stream in (0, 1):  # whoever reads the output must not wait for this process
        os.close(stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not os.read(waiting, 1):
        line = (
            "bertray: ended from outside: killed, out of memory, or Ray's node on this machine ended. What is written "
            "is kept: the same command goes on from here.\n"
        )
        with suppress(OSError):
            os.write(2, line.encode())
    os._exit(0)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    from bertray.progress import interrupted

    interrupted.set()
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and Ray's own logs")
    common.add_argument("--json", action="store_true", help="print the result as one JSON object, all else on stderr")
    of_spec = argparse.ArgumentParser(add_help=False, parents=[common])
    of_spec.add_argument("spec", help="YAML file")
    of_spec.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the spec, such as encoder.pooling=mean",
    )
    of_spec.add_argument("--output", metavar="DIR", help="where the run is written (folder or URL)")

    parser = argparse.ArgumentParser(
        prog="bertray", description="A frozen BERT over your text once; linear heads on the vectors, judged and served."
    )
    from bertray import __version__

    parser.add_argument("--version", action="version", version=f"bertray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, until, text in (
        ("run", "evaluate", "embed, fit, evaluate and report"),
        ("embed", "embed", "encode the rows that are not encoded yet"),
        ("fit", "fit", "embed what is missing and fit the head"),
        ("evaluate", "evaluate", "embed and fit what is missing and judge the head"),
    ):
        command = commands.add_parser(name, parents=[of_spec], help=text, description=text)
        command.set_defaults(action=_run, until=until)
    _add_plan(commands, of_spec)
    _add_predict(commands, common)
    _add_export(commands, common)
    _add_publish(commands, common)
    _add_serve(commands, common)
    _add_explore(commands, common)
    for name, action, text in (
        ("status", _status, "what of a run is done, missing and set aside, and at what speed"),
        ("verify", _verify, "check every shard of a run: checksums, counts, ids, vectors"),
    ):
        command = commands.add_parser(name, parents=[common], help=text, description=text)
        command.add_argument("run", help="folder of a run, such as runs/demo (or URL)")
        command.set_defaults(action=action)
    command.add_argument("--repair", action="store_true", help="encode again what is damaged or missing")
    text = "set finished runs side by side"
    command = commands.add_parser("compare", parents=[common], help=text, description=text)
    command.add_argument("runs", nargs="+", metavar="run", help="folder of a run, such as runs/demo (or URL)")
    command.set_defaults(action=_compare)
    command = commands.add_parser("spec", parents=[common], help="print all keys of a spec with their defaults")
    command.set_defaults(action=_spec)
    return parser


def _add_plan(commands: Any, of_spec: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "plan",
        parents=[of_spec],
        help="tell what encoding the rows would take, and encode nothing",
        description="Looks at a sample of the rows and tells units, tokens, hours, storage, cost and what holds it up. "
        "Needs no Ray. Without --gpus it is for CPUs.",
    )
    command.add_argument("--gpus", type=int, metavar="N", help="how many GPUs")
    command.add_argument("--gpu", default="", metavar="NAME", help="which, such as h200 or l4")
    command.add_argument("--cpus", type=int, metavar="N", help="how many CPUs in all; else those of this machine")
    command.add_argument("--price", type=float, metavar="X", help="of one GPU (or CPU) for an hour")
    command.add_argument(
        "--bandwidth", type=float, metavar="MB", help="MB/s between each process and the store; else 125"
    )
    command.add_argument("--measure", action="store_true", help="measure this machine's own device on the sample")
    command.set_defaults(action=_plan)


def _add_predict(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "label all rows of files with a bundle"
    command = commands.add_parser("predict", parents=[common], help=text, description=text)
    command.add_argument("bundle", help="folder of a bundle, such as runs/demo/head")
    command.add_argument("input", help="file, glob, folder or URL of rows")
    command.add_argument(
        "--output", required=True, metavar="OUT", help="a .csv, .jsonl or .parquet file, or a folder for Parquet shards"
    )
    for column in ("text", "text-pair"):
        command.add_argument(f"--{column}", metavar="COLUMN", help="column of the input, if not as in training")
    command.add_argument("--id", metavar="COLUMN", help="column of the ids; else they are made of file and row")
    command.add_argument("--format", default="auto", help="format of the input; auto goes by file names")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a size for Ray, such as ray.workers=4"
    )
    command.set_defaults(action=_predict)


def _add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "serve",
        parents=[common],
        help="answer over HTTP, with a page to try it",
        description="Serve bundles that share an encoder, with Ray Serve. A text is encoded once, and any number of "
        "heads answer. /docs tells what can be asked.",
    )
    command.add_argument(
        "bundle",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="folder of a bundle, such as runs/demo/head; it is called like its run unless given a name",
    )
    command.add_argument("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 for all the machine's addresses")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--heads", default="", metavar="FOLDER", help="that bundles may be put from while it serves")
    command.add_argument(
        "--keys",
        default="",
        metavar="FILE",
        help="of API keys, one a line, one of which each request has to carry; also BERTRAY_API_KEYS=KEY,KEY",
    )
    command.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="of a site whose pages may call it"
    )
    command.add_argument(
        "--replicas", type=_replicas, default="auto", help="encoder processes; as many as there is room for"
    )
    command.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="texts of a request, characters of a text, body (bytes), queue (texts), deadline (seconds), "
        "cache (bytes of vectors)",
    )
    command.set_defaults(action=_serve)


def _replicas(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be auto or a whole number of at least 1. Got {text!r} instead.")
    return text if text == "auto" else int(text)


def _add_explore(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "explore",
        parents=[common],
        help="look at a text, or two, as BERT does",
        description="Tokens, embedding tables, layers, vectors and attention of a text, or of two as a pair; masked "
        "words filled; with a bundle, why its head answers as it does. Needs no Ray.",
    )
    command.add_argument("text", nargs="?", metavar="TEXT", help="may hold [MASK] for a word")
    command.add_argument("pair", nargs="?", metavar="TEXT_B", help="the second text of a pair")
    command.add_argument(
        "--model", default="", metavar="NAME", help="a folder, its URL, or a name on the Hugging Face hub"
    )
    command.add_argument(
        "--bundle", default="", metavar="BUNDLE", help="whose encoder looks, and whose answer is explained"
    )
    command.add_argument("--ids", default="", metavar="ID,ID,...", help="tell which tokens these are, and no more")
    command.add_argument(
        "--show",
        default="",
        metavar="SECTION,...",
        help="some sections alone: tokens, tables, architecture, outputs, pretraining, prediction",
    )
    command.add_argument(
        "--dims", type=int, default=10, metavar="N", help="first numbers of vectors in --json and --html; 0 for all"
    )
    command.add_argument("--html", default="", metavar="FILE", help="write a page with all maps instead")
    command.set_defaults(action=_explore)


def _add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "write a bundle and its encoder for another library"
    command = commands.add_parser("export", parents=[common], help=text, description=text)
    command.add_argument("bundle", help="folder of a bundle, such as runs/demo/head")
    command.add_argument("--format", required=True, help="transformers, onnx or sentence-transformers")
    command.add_argument("--output", required=True, metavar="DIR", help="local folder, new or of an earlier export")
    command.set_defaults(action=_export)


def _add_publish(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "write a run's vectors, with their rows, into a table of Lance or LanceDB"
    command = commands.add_parser("publish", parents=[common], help=text, description=text)
    command.add_argument("run", help="folder of a run, such as runs/demo (or URL)")
    command.add_argument(
        "destination",
        metavar="DB/TABLE.lance",
        help="folder (or URL) of the table: made, or what it holds of the run replaced",
    )
    command.add_argument("--features", default="", metavar="NAME,...", help="columns such as mean_6; else all")
    command.add_argument("--splits", default="", metavar="NAME,...", help="such as train; else all")
    command.add_argument("--name", default="", help="of the run, in the table; else that of its folder")
    command.set_defaults(action=_publish)


def _overrides(options: argparse.Namespace) -> list[str]:
    return [*options.set, *([f"output={json.dumps(options.output)}"] if options.output else [])]


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.forecast import BANDWIDTH, forecast, lines

    found = forecast(
        options.spec,
        gpus=options.gpus,
        gpu=options.gpu,
        cpus=options.cpus,
        price=options.price,
        bandwidth=BANDWIDTH if options.bandwidth is None else options.bandwidth,
        measure=options.measure,
        overrides=_overrides(options),
    )
    if not options.json:
        print("\n".join(lines(found)))
    return found


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.pipeline import run

    summary = run(options.spec, overrides=_overrides(options), until=options.until)
    if not options.json:
        _print_summary(summary)
    return summary


def _print_summary(summary: dict[str, Any]) -> None:
    print()
    for name, rows in summary["rows"].items():
        notes = [
            f"{rows[count]:,} {word}"
            for count, word in (
                ("empty", "empty"),
                ("truncated", "truncated"),
                ("windowed", "in several windows"),
                ("rejected", "set aside"),
            )
            if rows[count]
        ]
        print(f"{name:<9} {rows['rows']:,} rows, {rows['tokens']:,} tokens{''.join(', ' + note for note in notes)}")
        for reason, count in sorted(rows["reasons"].items(), key=lambda item: -item[1])[:_REASONS]:
            print(f"  set aside: {count:,} because {reason}")
    print(f"{'encoder':<9} {', '.join(summary['encoder']['backends'])}")
    if summary.get("head", {}).get("search", {}) and any(summary["head"]["search"].values()):
        from bertray.features import named

        head = summary["head"]
        print(f"{'chosen':<9} {named(summary['features'])}, {head['combine']}, l2 {head['l2']:g}")
    if any(summary["faults"].values()):
        faults = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in summary["faults"].items() if count)
        print(f"{'faults':<9} {faults}")
    for name, metrics in summary.get("metrics", {}).items():
        shown = [metric for metric in _METRICS if metrics.get(metric) is not None]
        if "accuracy" in shown and "micro_f1" in shown:  # the same, where each row has one class
            shown.remove("micro_f1")
        print(f"{name:<9} " + ", ".join(f"{_spoken(metric)} {metrics[metric]:.4f}" for metric in shown))
    for example in summary.get("examples", ()):
        score = "" if example["score"] is None else f" ({example['score']:.2f})"
        print(f"  {example['text']} -> {example['label']}{score}")
    print(f"{'time':<9} " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in summary["seconds"].items()))
    _print_spent(summary["spent"])
    if "metrics" in summary:
        print(f"{'report':<9} {summary['report']}\n{'bundle':<9} {summary['bundle']}")
        print(f"{'next':<9} {_command()} serve {summary['bundle']}")
    else:
        print(f"{'written':<9} {summary['output']}")


def _print_spent(spent: dict[str, Any]) -> None:
    from bertray.clock import lines

    for title, line in lines(spent):
        print(f"{title:<9} {line}")


def _spoken(metric: str) -> str:
    return metric.replace("_", " ").replace("f1", "F1").replace("rmse", "RMSE").replace("exact", "exact match")


def _command() -> str:
    """How this command can be typed again: by its path where it is not on PATH, as in an environment that is not
    activated."""
    path = Path(sys.argv[0])
    return "bertray" if path.name != "bertray" or shutil.which("bertray") else os.path.relpath(path)


def _predict(options: argparse.Namespace) -> dict[str, Any]:
    from bertray import bundle as bundles
    from bertray.cluster import connected
    from bertray.predict import predict_files
    from bertray.sources import Columns
    from bertray.spec import load_spec

    names = bundles.load(options.bundle).columns
    columns = Columns(options.text or names["text"], options.text_pair or names["text_pair"], "", options.id or "")
    source = {"path": options.input, "format": options.format}
    spec = load_spec({"data": {"train": source}}, options.set)
    with connected(spec.ray, alone=True):
        manifest = predict_files(
            options.bundle, spec.data.train, options.output, columns, spec.ray, spec.data.max_rejects
        )
    counts = manifest.counts
    if not options.json:
        print(
            f"{counts['rows']:,} rows labelled ({counts['truncated']:,} truncated, {counts['windowed']:,} in several "
            f"windows, {counts['empty']:,} empty, "
            f"{counts['rejected']:,} set aside): {options.output}"
        )
    return {"output": options.output, **counts}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from bertray import bundle as bundles
    from bertray.export import export

    made = export(bundles.load(options.bundle), options.format, options.output)
    if not options.json:
        code = "code in the folder: trust_remote_code=True" if made["wrapper"] else "no code of ours"
        print(
            f"exported for {made['format']}: {made['output']}, loaded by {made['classes']} ({code}); differs from "
            f"plain transformers by {made['difference']:.1g} at most"
        )
    return made


def _publish(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.publication import publish

    features, splits = (_listed(names) for names in (options.features, options.splits))
    made = publish(options.run, options.destination, features, splits, options.name)
    if not options.json:
        rows = ", ".join(f"{rows:,} of {split}" for split, rows in made["splits"].items())
        print(f"published: {rows}, with {', '.join(made['features'])}: {made['output']} ({made['table_rows']:,} rows)")
    return made


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _serve(options: argparse.Namespace) -> None:
    from bertray.serve import Settings, limits_of, named, run
    from bertray.spec import RaySizes

    limits = limits_of(dict(item.partition("=")[::2] for item in options.limit))
    settings = Settings(options.host, options.port, options.heads, options.keys, tuple(options.cors), limits)
    run(named(options.bundle), settings, RaySizes(workers=options.replicas))


def _explore(options: argparse.Namespace) -> dict[str, Any]:
    from bertray import display, explorer

    if options.ids:
        if options.text is not None or options.bundle or options.show or options.html:
            raise BertrayError("--ids goes with --model and --json alone: it tells tokens, and looks at no text.")
        found = explorer.vocabulary(_numbers(options.ids), model=options.model)
        lines = display.vocabulary_lines(found)
    elif options.text is None:
        raise BertrayError('There is nothing to look at. Give a text: bertray explore "I was thirsty!"')
    else:
        show = _listed(options.show)
        found = explorer.explore(
            options.text, options.pair, model=options.model, bundle=options.bundle, show=show, dims=options.dims
        )
        lines = display.lines(found)
    plain: dict[str, Any] = explorer.plain(found)
    if options.html:
        from bertray.storage import Location

        Location(options.html).write(display.page(plain))
        lines = iter([f"written: {options.html}"])
    if not options.json:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        print("\n".join(lines))
    return plain


def _numbers(given: str) -> list[int]:
    try:
        if numbers := [int(number) for number in given.replace(",", " ").split()]:
            return numbers
        raise ValueError
    except ValueError:
        raise BertrayError(f"--ids must be numbers with commas between, such as 101,102. Got {given!r:.60}.") from None


def _status(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.audit import status

    found = status(options.run)
    if not options.json:
        for store in found["stores"]:
            print(_status_line(store))
            for unit in store["at_work"]:
                what = f"{unit['file']}, rows {unit['start']:,} to {unit['stop']:,}" if unit["file"] else "starting"
                print(
                    f"  {'at work' if found['running'] else 'broken off'}: {what}, process {unit['pid']} on "
                    f"{unit['host']}, begun at {unit['since']}, {unit['seconds']:,.0f} s ago"
                )
        running, last = found["running"], found["last"]
        print("running   " + (f"process {running['pid']} on {running['host']}" if running else "no"))
        if last:
            how = last.get("outcome", "begun") + (f" ({last['error']})" if "error" in last else "")
            print(f"last step {last['step']}, {how}, {last['time']}")
        _print_spent(found["spent"])
        print(f"head      {'fitted' if found['head'] else 'not fitted yet'}")
        print(f"report    {found['output'] + '/report.html' if found['report'] else 'not written yet'}")
    return found


def _status_line(store: dict[str, Any]) -> str:
    notes = [
        f"{store['rows_done']:,} of {store['rows']:,} rows in {store['units_done']:,} of {store['units']:,} units",
        f"{store['rows_missing']:,} missing" if store["rows_missing"] else "",
        f"{store['rejected']:,} set aside",
        f"{store['units_begun_again']:,} units begun again" if store["units_begun_again"] else "",
        f"{store['rows_per_second']:,.0f} rows/s",
        f"{store['seconds_left']:,.0f} s left at that" if store["seconds_left"] else "",
        "" if store["complete"] else "not complete",
    ]
    return f"{store['split']:<9} {', '.join(filter(None, notes))}"


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.audit import verify

    found = verify(options.run, options.repair)
    if not options.json:
        for store in found["stores"]:
            problems = len(store["problems"])
            state = f"{problems:,} problem{'s' if problems > 1 else ''}" if problems else "all right"
            print(f"{store['name']}: {store['shards']:,} shards, {store['rows']:,} rows: {state}")
            for line in (*store["problems"], *store["notes"]):
                print(f"  {line}")
        if not found["ok"]:
            print(f"bertray verify --repair {options.run} encodes again what is damaged or missing.", file=sys.stderr)
    return found


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.compare import compare, lines

    found = compare(options.runs)
    if not options.json:
        print("\n".join(lines(found)))
    return found


def _spec(options: argparse.Namespace) -> dict[str, Any]:
    from bertray.spec import Spec, describe

    if not options.json:
        print(describe())
    return Spec().model_dump(mode="json")


if __name__ == "__main__":
    command()
