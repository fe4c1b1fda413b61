"""The machine: what it is, how fast it multiplies matrices, and how much memory this process took at most."""

import datetime
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = (
    "bertray",
    "torch",
    "transformers",
    "tokenizers",
    "nanotoken",
    "sentence-transformers",
    "onnxruntime",
    "openvino",
    "nncf",
    "ray",
    "numpy",
)
# What makes matrices fast, as Linux names it.
_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}  # and torch's name
_SECONDS = 0.5  # to measure one rate


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chip(device: str) -> str:
    """What computes, without what makers decorate its name with: AMD EPYC, Intel Xeon, NVIDIA H200."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()[0]
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|Processor|@.*", " ", name).split())


def describe() -> dict[str, str]:
    """What to tell with every figure: processor, GPU, system, versions and the day."""
    import torch

    model, flags = _processor()
    facts = {"CPU": f"{model}, {cores()} cores", "of its instructions": " ".join(f for f in _FLAGS if f in flags)}
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    facts["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    facts["versions"] = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    facts["day"] = datetime.date.today().isoformat()
    return {name: fact for name, fact in facts.items() if fact}


def _processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), set()
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "flags", "Features")}
    model = found["model name"]
    flags = found["flags"] or found["Features"]
    return model[1] if model else platform.machine(), set(flags[1].split()) if flags else set()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def matmul_rates(device: str, size: int = 0) -> dict[str, float]:
    """The best rate, in operations per second, at which torch multiplies two square matrices in each precision.

    Args:
        size: rows and columns, 4096 on CPUs and 8192 on GPUs unless given; halved until one product takes a
            fraction of a second. Precisions that the device cannot multiply in are left out.
    """
    rates = {}
    for precision in _PRECISIONS:
        try:
            rates[precision] = _rate(precision, device, size or {"cpu": 4096, "cuda": 8192}[device])
        except (RuntimeError, NotImplementedError):  # this device has no such product
            continue
    return rates


def _rate(precision: str, device: str, largest: int) -> float:
    size = min(256, largest)
    while size < largest and 8 * _best(_product(precision, device, size), device, 0.0) < _SECONDS / 3:
        size *= 2
    return 2 * size**3 / _best(_product(precision, device, size), device, _SECONDS)


def _product(precision: str, device: str, size: int) -> Callable[[], Any]:
    import torch

    matrix = torch.randint(-9, 9, (size, size), device=device).to(getattr(torch, _PRECISIONS[precision]))
    if precision == "int8":
        return lambda: torch._int_mm(matrix, matrix)
    return lambda: matrix @ matrix


def _best(run: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest time of a run among those that fit into so many seconds, at least two after the first."""
    import torch

    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peak_memory(device: str) -> int:
    """The most bytes that this process held so far: of the GPU's memory on `cuda`, else of the machine's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
