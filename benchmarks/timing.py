"""How every benchmark times its rounds and sums them up, and what it calls peak memory."""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each variant in each round, after one that warms up; they take turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            if number:
                seconds[name].append((time.perf_counter() - began, time.process_time() - cpu_began))
    return seconds


def spread(seconds: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios of each round: what slows the machine down in one round is in both."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, base, strict=True))


def peak_gib() -> float:
    """Peak resident memory of this process alone: getrusage also counts what its parent held when it started it."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M) if status.is_file() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def in_own_process(function: Callable[..., object], *arguments: Any) -> None:
    """Call it in a new process, whose memory is free afterwards.

    Raises:
        RuntimeError: the process failed; its traceback is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")
