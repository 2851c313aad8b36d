#!/usr/bin/env python
"""Run make demo, and keep how long it takes and the last lines that it prints, for README.

The environment must be there: the time is without the installation.

    python benchmarks/demo.py --output benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from output import ROOT, write_json

FIRST = "pairs, compared with"  # in the line of evaluate.py with which the comparison begins


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    subprocess.run(["make", "-s", ".venv/installed"], cwd=ROOT, check=True)
    began, lines = time.monotonic(), []
    with subprocess.Popen(["make", "-s", "demo"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        sys.exit("make demo failed")
    first = max(number for number, line in enumerate(lines) if FIRST in line)
    write_json({"seconds": round(time.monotonic() - began, 1), "output": lines[first:]}, args.output)


if __name__ == "__main__":
    main()
