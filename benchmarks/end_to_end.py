#!/usr/bin/env python
"""text2images.py as a process, fp32, bf16 and int8: from its start to the written PNG, and its peak memory.

Generates one image with --model and --quant_model. By default that is an SD v1.5 with random weights, made in
--work_dir first; without --quant_model, one is made by the default recipe with the ranges of one random input. What is
measured already in --work_dir is not measured again, so an interrupted run goes on.

"seconds" is the wall time of the whole process, the median over --rounds, "spread" (max - min) / median. It is made of
"start_seconds" (imports, loading, OpenVINO's compilation, writing the PNG; not the conversion of quant_model.pt, which
only the first run of a file does: "first_run"), of "step_seconds" for each denoising step, and of
"text_and_vae_seconds" (text encoder, VAE). text2images.py times the generation itself in results.jsonl; the difference
between the fewest and the most steps divides it into steps and the rest.

    python benchmarks/end_to_end.py --output benchmarks/results/end_to_end.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import full_size
import unet_step
from output import ROOT, note_start, write_json
from timing import in_own_process, spread

VARIANTS = {
    "fp32": ["--dtype", "float32"],
    "bf16": ["--dtype", "bfloat16"],
    "int8": ["-qm"],  # the file follows
}
Runs = dict[tuple[str, int], list[dict[str, float]]]  # by variant and denoising steps


# ---------------------------------------------------------------- the models on disk


def make_models(args: argparse.Namespace) -> None:
    """Fill args.model and args.quant_model where not given."""
    if args.model is None:
        args.model = args.work_dir / "sd15"
        if not args.model.is_dir():
            partial = args.work_dir / "sd15.partial"
            in_own_process(full_size.write_random_sd15, partial)
            partial.rename(args.model)
    if args.quant_model is None:
        edge = json.loads((args.model / "unet/config.json").read_text(encoding="utf-8"))["sample_size"]
        given = argparse.Namespace(model=args.model / "unet", work_dir=args.work_dir, shape=(2, edge))
        in_own_process(unet_step.write_ours, given)
        args.quant_model = args.work_dir / "quant_model.pt"


# ---------------------------------------------------------------- measuring


def run(name: str, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """One process: its wall time, what text2images.py says of the generation, and its peak memory."""
    folder = args.work_dir / "images"
    flags = [*VARIANTS[name], *([str(args.quant_model)] if "-qm" in VARIANTS[name] else [])]
    size = ["--height", str(args.size), "--width", str(args.size)] if args.size else []
    caption = ["-c", "a lake", "--num_inference_steps", str(steps), "--output_dir", str(folder)]
    command = [sys.executable, str(ROOT / "text2images.py"), "-m", str(args.model), *flags, *size, *caption]
    began = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if result.returncode:
        sys.exit(f"text2images.py failed:\n{result.stderr}")
    row = json.loads((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"seconds": seconds, "generation_seconds": row["seconds"], "peak_gib": row["peak_memory_gib"]}


def first_run(args: argparse.Namespace) -> dict[str, float]:
    """Of a quant_model.pt that OpenVINO has not seen: its seconds of two steps, its peak memory, and what it keeps."""
    path, kept = args.work_dir / "first run.json", args.quant_model.with_suffix(".openvino")
    if not path.is_file():
        shutil.rmtree(kept, ignore_errors=True)
        made = run("int8", 2, args) | {"kept_gb": sum(file.stat().st_size for file in kept.rglob("*.*")) / 1e9}
        path.write_text(json.dumps({key: round(value, 3) for key, value in made.items()}))
    return json.loads(path.read_text())


def measure(args: argparse.Namespace) -> Runs:
    """At least --rounds of each, as far as possible from --work_dir."""
    runs: Runs = {}
    for steps in args.steps:
        for name in args.variants:
            path = args.work_dir / f"runs {name} {steps} {args.size or ''}.json"
            done = json.loads(path.read_text()) if path.is_file() else []
            while len(done) < args.rounds:
                done.append(run(name, steps, args))
                path.write_text(json.dumps(done))
                print(f"{name}, {steps} steps: {done[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
            runs[name, steps] = done
    return runs


def median(done: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in done)


def summary(name: str, steps: int, runs: Runs) -> dict[str, Any]:
    """The row of one variant; its step time is that between the fewest and the most steps that were measured."""
    done, counts = runs[name, steps], sorted(number for other, number in runs if other == name)
    seconds, generation = median(done, "seconds"), median(done, "generation_seconds")
    row = {"name": name, "steps": steps, "seconds": seconds, "spread": spread([one["seconds"] for one in done])}
    row["ratio_to_fp32"] = seconds / median(runs["fp32", steps], "seconds")
    row["start_seconds"] = seconds - generation
    if len(counts) > 1:
        ends = [median(runs[name, number], "generation_seconds") for number in (counts[0], counts[-1])]
        row["step_seconds"] = (ends[1] - ends[0]) / (counts[-1] - counts[0])
        row["text_and_vae_seconds"] = generation - steps * row["step_seconds"]
    row["peak_gib"] = max(one["peak_gib"] for one in done)
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


# ---------------------------------------------------------------- the flow


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a Stable Diffusion folder, as demo/tiny-stable-diffusion, for a quick try")
    add("--quant_model", type=Path, help="its quant_model.pt")
    add("--size", type=int, help="pixels; by default the model's own, 512 for SD v1.5")
    add("--steps", type=int, nargs="+", default=[20, 50], help="denoising steps; a row for each")
    add("--rounds", type=int, default=1, help="runs of each variant")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="fp32 is always among them")
    add("--work_dir", type=Path, default=ROOT / "demo/output/end_to_end", help="models and runs, kept; 8 GB")
    add("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.rounds < 1 or min(args.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    args.variants = list(dict.fromkeys(["fp32", *args.variants]))
    return args


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| steps | UNet | s, start to PNG | to fp32 | start, s | s/step | text encoder, VAE, s | peak GiB |")
    print("|---" * 8 + "|")
    for row in rows:
        parts = [row.get(key) for key in ("start_seconds", "step_seconds", "text_and_vae_seconds")]
        cells = " | ".join("-" if part is None else f"{part:.2f}" for part in parts)
        start = f"| {row['steps']} | {row['name']} | {row['seconds']:.1f} | {row['ratio_to_fp32']:.3f} "
        print(f"{start}| {cells} | {row['peak_gib']:.2f} |")


def main() -> None:
    args = parse_args()
    note_start(args.work_dir)
    make_models(args)
    first = {"first_run": first_run(args)} if "int8" in args.variants else {}
    runs = measure(args)
    rows = [summary(name, steps, runs) for name, steps in runs]
    print_table(rows)
    write_json({"rows": rows} | first, args.output, args.work_dir)


if __name__ == "__main__":
    main()
