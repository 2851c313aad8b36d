"""What every benchmark does with its results: write them as JSON, with where they come from.

"machine": CPU, its instruction sets, threads. "provenance": library versions, commit, whether files of the
repository differed from it, date (UTC) and command line. tables.py prints both under every table.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "neural-compressor", "openvino", "nncf", "numpy")
ENVIRONMENT = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")  # what changes how fast or in which kernels things run
STARTED = "provenance.json"  # in a --work_dir: of the run that began it


def machine() -> dict[str, Any]:
    """The CPU as lscpu describes it, and the threads that this process, or one that it starts, computes with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    torch = sys.modules.get("torch")  # not imported here: it takes seconds
    threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS", cores()))
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_id": " ".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "threads": threads,
        "memory_gib": memory_gib(),
        "system": platform.system(),
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gib() -> float | None:
    info = Path("/proc/meminfo")
    found = re.search(r"^MemTotal:\s*(\d+) kB", info.read_text(), re.M) if info.is_file() else None
    return round(int(found[1]) / 2**20, 1) if found else None


def provenance() -> dict[str, Any]:
    """Of a measurement by this process: what was run, when, and from which state of the repository."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": git("rev-parse", "--short=10", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "command": command_line(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := installed(name))},
    }


def git(*arguments: str) -> str | None:
    """What git says of this repository; None without git, or outside of a repository."""
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def command_line() -> str:
    """As one would type it in the repository; of a path outside of it, only the name is kept."""
    words = ["python", *(shorter(word) for word in sys.argv)]
    return " ".join([*(f"{key}={os.environ[key]}" for key in ENVIRONMENT if key in os.environ), shlex.join(words)])


def shorter(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        value = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return flag + equals + value


def note_start(work_dir: Path) -> None:
    """Remember which commit filled a --work_dir whose contents a later run may take over."""
    work_dir.mkdir(parents=True, exist_ok=True)
    if not (work_dir / STARTED).is_file():
        replace(work_dir / STARTED, {key: provenance()[key] for key in ("date", "commit", "dirty")})


def kept_rows(path: Path, measured_again: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier file that a run with these settings leaves alone; each keeps where it comes from."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    origin = {"machine": earlier.get("machine"), "provenance": earlier.get("provenance")}
    return [origin | row for row in earlier.get("rows", []) if not measured_again.items() <= row.items()]


def write_json(content: dict[str, Any], path: Path, work_dir: Path | None = None) -> None:
    """Write results with `machine` and `provenance`, and the commit that began `work_dir`, if that is another."""
    origin = provenance()
    started = work_dir / STARTED if work_dir else None
    if started and started.is_file() and json.loads(started.read_text())["commit"] != origin["commit"]:
        origin["work_dir_began"] = json.loads(started.read_text())
    replace(path, {"machine": machine(), "provenance": origin, **content})


def replace(path: Path, content: Any) -> None:
    """Write JSON."""
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write under a temporary name first, so that an interrupted run leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
