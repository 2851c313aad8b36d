#!/usr/bin/env python
"""text2images.py as a process, fp32, bf16 and int8: from its start to the written PNG, and its peak memory.

Generates one image with --model and --quant_model (by default a random-weight SD v1.5, which is made in
--work_dir first, with the quant_model.pt of unet_step.py). What is measured already in --work_dir is not
measured again, so an interrupted run goes on. "first_step_seconds" is from the process's start to the first
call of the UNet; "spread" is (max - min) / median over --rounds.

    python benchmarks/end_to_end.py --output benchmarks/results/end_to_end.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from output import note_start, write_json

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "fp32": ["--dtype", "float32"],
    "bf16": ["--dtype", "bfloat16"],
    "int8": ["-qm"],  # the file follows
}
# Runs the script as it is, and notes when the UNet is called first.
TIMED = """
import sys, time
began = float(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
import text2images
def noting(function):
    def noted(*args):
        global began
        result = function(*args)
        if began:
            print(f"first step after {time.time() - began:.3f} s", flush=True)
            began = 0
        return result
    return noted
text2images.to_unet_dtype = noting(text2images.to_unet_dtype)
text2images.OpenVINOUNet.compile_for = noting(text2images.OpenVINOUNet.compile_for)
text2images.main()
"""


def run(name: str, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """One process; returns its wall time, the time until its first step, and its peak memory."""
    folder = args.work_dir / "pictures"
    flags = [*VARIANTS[name], *([str(args.quant_model)] if "-qm" in VARIANTS[name] else [])]
    size = ["--height", str(args.size), "--width", str(args.size)] if args.size else []
    painted = ["-m", str(args.model), *flags, *size, "-c", "a lake", "--num_inference_steps", str(steps)]
    began = time.time()
    command = [sys.executable, "-c", TIMED, str(began), str(ROOT), *painted, "--output_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - began
    if result.returncode:
        sys.exit(f"text2images.py failed:\n{result.stderr}")
    row = json.loads((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    first = float(re.search(r"^first step after ([\d.]+) s$", result.stdout, re.M)[1])
    return {"seconds": seconds, "first_step_seconds": first, "peak_gib": row["peak_memory_gib"]}


def runs(name: str, steps: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """At least --rounds of them, as far as possible from --work_dir."""
    path = args.work_dir / f"runs {name} {steps}.json"
    done = json.loads(path.read_text()) if path.is_file() else []
    while len(done) < args.rounds:
        done.append(run(name, steps, args))
        path.write_text(json.dumps(done))
    return done


def python(code: str, *arguments: Path) -> str:
    """What `code` prints, in a process of its own, as what it holds in memory is not ours."""
    folders = os.pathsep.join(str(ROOT / name) for name in (".", "benchmarks", "tests"))
    command = [sys.executable, "-c", "import sys; from pathlib import Path; " + code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": folders}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_models(args: argparse.Namespace) -> None:
    """Fill args.model and args.quant_model where not given."""
    if args.model is None:
        args.model = args.work_dir / "sd15"
        if not args.model.is_dir():
            partial = args.work_dir / "sd15.partial"
            python("import test_full_size; test_full_size.write_random_sd15(Path(sys.argv[1]))", partial)
            partial.rename(args.model)
    if args.quant_model is None:
        code = "import unet_step, argparse; unet_step.write_ours(argparse.Namespace(model=Path(sys.argv[1]), "
        python(code + "work_dir=Path(sys.argv[2]), shape=(2, 64)))", args.model / "unet", args.work_dir)
        args.quant_model = args.work_dir / "quant_model.pt"


def summary(name: str, steps: int, done: list[dict[str, float]]) -> dict[str, Any]:
    times = [one["seconds"] for one in done]
    row = {"name": name, "steps": steps, "seconds": statistics.median(times)}
    row["spread"] = (max(times) - min(times)) / row["seconds"]
    row["first_step_seconds"] = statistics.median(one["first_step_seconds"] for one in done)
    row["peak_gib"] = max(one["peak_gib"] for one in done)
    return row


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a Stable Diffusion folder")
    add("--quant_model", type=Path, help="its quant_model.pt")
    add("--size", type=int, help="pixels; by default the model's own, 512 for SD v1.5")
    add("--steps", type=int, nargs="+", default=[20, 50], help="denoising steps; a row for each")
    add("--rounds", type=int, default=1, help="runs of each variant")
    add("--variants", nargs="+", choices=VARIANTS, default=["fp32", "bf16", "int8"], help="fp32 is always among them")
    add("--work_dir", type=Path, default=ROOT / "demo/output/end_to_end", help="models and runs, kept; 8 GB")
    add("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.model is not None and args.quant_model is None:
        parser.error("--model needs its --quant_model")
    if args.rounds < 1 or min(args.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    note_start(args.work_dir)
    make_models(args)
    rows: list[dict[str, Any]] = []
    print("| steps | UNet | s, start to PNG | spread | first step after, s | to fp32 | peak GiB |\n" + "|---" * 7 + "|")
    for steps in args.steps:
        fp32_seconds = None
        for name in dict.fromkeys(["fp32", *args.variants]):
            row = summary(name, steps, runs(name, steps, args))
            fp32_seconds = fp32_seconds or row["seconds"]
            row["ratio_to_fp32"] = row["seconds"] / fp32_seconds
            rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
            print(
                f"| {steps} | {name} | {row['seconds']:.1f} | {row['spread']:.0%} | {row['first_step_seconds']:.1f} | "
                f"{row['ratio_to_fp32']:.3f} | {row['peak_gib']:.2f} |",
                flush=True,
            )
    write_json({"rows": rows}, args.output, args.work_dir)


if __name__ == "__main__":
    main()
