"""What every benchmark does at its end: name the machine's CPU, and write its JSON."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text(encoding="utf-8"), re.M) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write_json(content: Any, path: Path) -> None:
    """Under a temporary name first, so that an interrupted run leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
