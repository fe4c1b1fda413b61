"""How many tokens a second a device encodes: a table of measured and published rates, and what follows from it for
other encoders, lengths and GPUs. Knows nothing of rows, files or clusters.

The table is rates.json. Each of its rows tells the device, the encoder's layers, width and inner width, the precision,
the tokens/s, of texts of what mean length, and where that was measured. Its `peaks` are 10^12 operations/s as NVIDIA's
data sheets tell them, without sparsity: in 16 bits and in fp32.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bertray.errors import BertrayError

_ALIKE = 2.0  # lengths that differ by less have one rate; encoders of less work reach as much of a GPU


@dataclass(frozen=True)
class Shape:
    """An encoder's layers: how many are run, how wide their states are, and their inner states."""

    layers: int
    width: int
    inner: int

    def flops(self, attended: float) -> float:
        """Operations a token: two for each weight of the layers, and in each layer 4 * width for each token that it
        attends to (scores, and the mean by them).

        Args:
            attended: tokens of its text, the mean over tokens.
        """
        weights = self.layers * (4 * self.width**2 + 2 * self.width * self.inner)
        return 2 * weights + 4 * self.layers * attended * self.width


@dataclass(frozen=True)
class Rate:
    """Tokens that one device (of CPUs: one process of `threads` threads) encodes in a second.

    kind: `measured` by bertray, `published` by others, an `estimate` from one of those, or `measured here`.
    how: where it was measured, and how it follows from that.
    """

    tokens_per_second: float
    kind: str
    how: str


@cache
def table() -> dict[str, Any]:
    """What rates.json holds."""
    found: dict[str, Any] = json.loads(files("bertray").joinpath("rates.json").read_text(encoding="utf-8"))
    return found


def gpus() -> list[str]:
    """The names of the GPUs that are known."""
    return list(table()["peaks"])


def peak(device: str) -> float:
    """Dense 16-bit operations a second of a GPU that torch calls so (NVIDIA H100 80GB HBM3, say); 0 if not known."""
    words = set(re.split(r"[\s-]+", device.lower()))
    fitting = [name for name in gpus() if set(name.split("-")) <= words]
    return float(table()["peaks"][max(fitting, key=len)]["half"]) * 1e12 if fitting else 0.0


def check_gpu(name: str) -> None:
    """Raises a BertrayError if nothing is known of a GPU."""
    if not name:
        raise BertrayError(f"gpus need a gpu: which of {', '.join(gpus())} they are.")
    if name not in gpus():
        raise BertrayError(
            f"gpu must be one of {', '.join(gpus())}. Got {name!r} instead. Of another, measure the rate on a machine "
            "that has it: --measure, without --gpu."
        )


def rate(device: str, threads: int, precision: str, shape: Shape, attended: float) -> Rate:
    """The rate of a device, from the row of the table that is nearest.

    Args:
        device: `cpu`, or the name of a GPU.
        threads: of one process, on CPUs.
        attended: as `Shape.flops` takes it.

    Raises:
        BertrayError: there is no such precision on the device.
    """
    precision = _precision(device, precision)
    rows = [row for row in table()["rates"] if (row["device"] == "cpu") == (device == "cpu")]
    if device == "cpu":
        rows = [row for row in rows if row["precision"] == precision]
    rows = [row for row in rows if row["device"] == device] or rows
    row = min(rows, key=_distance(device, precision, shape, attended))
    base = Shape(row["layers"], row["width"], row["inner"])
    work = base.flops(row["attended"]) / shape.flops(attended)
    power = _power(device, precision) / _power(row["device"], row["precision"])
    share = threads / row.get("threads", threads)
    same = (
        row["device"] == device
        and base == shape
        and power == share == 1
        and abs(math.log(row["attended"] / attended)) < math.log(_ALIKE)
    )
    how = [f"{row['tokens_per_second']:,} tokens/s of texts of {row['length']} tokens, {row['kind']}: {row['where']}"]
    how += [f"x {work:.3g} for the operations a token ({base.flops(row['attended']):.3g} there)"]
    other = (row["device"], power) != (device, 1)
    how += [f"x {power:.3g} for the peak of {device} in {precision} against {row['device']}'s"] * other
    how += [f"x {share:.3g} for {threads} threads instead of {row.get('threads')}"] * (share != 1)
    how += ["smaller encoders reach less of a GPU's peak: expect less"] * (device != "cpu" and work > _ALIKE)
    tokens = row["tokens_per_second"] * work * power * share
    return Rate(tokens, row["kind"] if same else "estimate", "; ".join(how))


def _precision(device: str, wanted: str) -> str:
    """What `auto` is on a device; and whether it has what is wanted.

    Raises:
        BertrayError: it has not.
    """
    if wanted == "auto":  # auto takes bf16 on GPUs that have it; the table's own are all equally fast in fp16
        return "int16" if device == "cpu" else "bf16"
    if device != "cpu" and wanted in ("int16", "int8"):
        raise BertrayError(f"encoder.precision {wanted} cannot be had on a GPU. Set it to auto.")
    return wanted


def _power(device: str, precision: str) -> float:
    """The peak of a device; of all CPUs 1, since only rates in the same precision are compared."""
    if device == "cpu":
        return 1.0
    return float(table()["peaks"][device]["fp32" if precision == "fp32" else "half"])


def _distance(device: str, precision: str, shape: Shape, attended: float) -> Callable[[dict[str, Any]], float]:
    """How far a row of the table is from what is asked: by work, by power, and less so by the length of texts."""

    def distance(row: dict[str, Any]) -> float:
        base = Shape(row["layers"], row["width"], row["inner"])
        work = abs(math.log(base.flops(attended) / shape.flops(attended)))
        power = abs(math.log(_power(row["device"], row["precision"]) / _power(device, precision)))
        return work + power + 0.25 * abs(math.log(row["attended"] / max(1.0, attended)))

    return distance
