#!/usr/bin/env python
"""create_metadata.py beside one plain pass that reads every caption; and what a second core brings in decoding.

Makes pairs in img2dataset's layout, 10,000 a folder: tiny ones for the plain pass and --no_verify, fewer of
512 pixels for decoding by one process and by all cores. The commands run by turns. "seconds" and "cpu_seconds"
are medians, "spread" is (max - min) / median; "ratio" is the median over the rounds' ratios to the first row
of the same pairs in wall time, "cpu_ratio" in CPU time, which says more where others use the machine.

    python benchmarks/metadata.py --output benchmarks/results/metadata.json
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from output import ROOT, cores, write_json
from timing import ratio, spread

READ = "for folder, _, names in os.walk(sys.argv[1]):\n for name in names:\n  if name.endswith('.txt'):\n   "
READ = "import os, sys\n" + READ + "with open(os.path.join(folder, name), 'rb') as file: file.read()"


def make_pairs(folder: Path, pairs: int, size: int) -> None:
    """Of 16 different images of coarse noise."""
    rng, images = random.Random(0), []
    for _ in range(16):
        file = io.BytesIO()
        Image.frombytes("RGB", (12, 12), rng.randbytes(432)).resize((size, size)).save(file, "JPEG")
        images.append(file.getvalue())
    for number in range(pairs):
        stem = folder / f"{number // 10_000:05d}" / f"{number:09d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".jpg").write_bytes(images[number % len(images)])
        stem.with_suffix(".txt").write_text(f"a photo of a small thing with the number {number}, high definition")


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children, which must succeed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(commands: dict[str, list[str]], pairs: int, rounds: int) -> list[dict]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):  # the first fills the disk cache
        for name, command in commands.items():
            seconds = timed(command)
            times[name] += [seconds] * (number > 0)
    rows, first = [], next(iter(times.values()))
    for name, each in times.items():
        wall, cpu = ([seconds[index] for seconds in each] for index in range(2))
        row = {"name": name, "pairs": pairs, "seconds": round(statistics.median(wall), 3)}
        row["spread"] = round(spread(wall), 3)
        row["cpu_seconds"] = round(statistics.median(cpu), 3)
        for index, key in enumerate(("ratio", "cpu_ratio")):
            row[key] = round(ratio(*([seconds[index] for seconds in times] for times in (each, first))), 2)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000, help="how many to make")
    parser.add_argument("--large_pairs", type=int, default=4_000, help="likewise, with images of 512 pixels")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each, after one that warms up")
    parser.add_argument("--scratch", type=Path, help="where the pairs are made; by default the system's folder")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        tiny, large = f"{scratch}/tiny", f"{scratch}/large"
        make_pairs(Path(tiny), args.pairs, 32)
        make_pairs(Path(large), args.large_pairs, 512)
        script = [str(ROOT / "create_metadata.py"), "--image_path"]
        commands = {"one pass over every .txt": ["-c", READ, tiny], "--no_verify": [*script, tiny, "--no_verify"]}
        rows = measure(commands, args.pairs, args.rounds)
        workers = {
            f"every image decoded, --num_workers {n}": [*script, large, "--num_workers", f"{n}"] for n in (1, cores())
        }
        rows += measure(workers, args.large_pairs, args.rounds)
    for row in rows:
        print(json.dumps(row))
    write_json({"rows": rows}, args.output)


if __name__ == "__main__":
    main()
