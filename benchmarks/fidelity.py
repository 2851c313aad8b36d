#!/usr/bin/env python
"""How close int8 pictures are to fp32's, recipe by recipe, on the same captions and seeds.

Trains every variant on the bundled model with train_text_to_image_qat.py, paints demo/captions.txt
with text2images.py and compares with evaluate.py. What is done already in --work_dir is not done
again, so an interrupted run goes on. Writes the report as JSON.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PTQ = ["--max_train_steps=0"]
QAT = ["--max_train_steps=300", "--use_ema"]
ORIGINAL = [*QAT, "--learning_rate=1e-05", "--lr_scheduler=constant"]  # as in the original README


@dataclass
class Variant:
    """trainer: flags of the training, None for a full-precision picture; painter: flags of the painting."""

    trainer: list[str] | None
    painter: list[str] = field(default_factory=list)


VARIANTS = {
    "fp32": Variant(None, ["--dtype", "float32"]),
    "bf16": Variant(None, ["--dtype", "bfloat16"]),  # the noise floor
    "int8-ptq": Variant(PTQ, ["--dtype", "float32"]),
    "int8-qat": Variant(QAT, ["--dtype", "float32"]),
    "int8-qat-constant": Variant(ORIGINAL, ["--dtype", "float32"]),
    "int8-qat-high-precision-2": Variant(QAT, ["--dtype", "float32", "--high_precision_steps", "2"]),
    "int8-qat-high-precision-5": Variant(QAT, ["--dtype", "float32", "--high_precision_steps", "5"]),
    "int8-ptq-bf16": Variant(PTQ, ["--dtype", "bfloat16"]),
    "int8-qat-bf16": Variant(QAT, ["--dtype", "bfloat16"]),
}


def run(*command: str | Path) -> float:
    """Run a script; returns its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.monotonic() - began


def train(flags: list[str], args: argparse.Namespace) -> tuple[Path, float | None]:
    """quant_model.pt of these flags, and the seconds it took; variants with equal flags share it."""
    folder = args.work_dir / ("trained " + " ".join(flag.lstrip("-").replace("/", "_") for flag in flags))
    seconds = folder / "seconds.json"
    if not seconds.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        data = ["--train_data_dir", args.train_data_dir, "--resolution=64", "--train_batch_size=4", "--use_cpu"]
        data += ["--center_crop", "--random_flip", "--report_to=none", "--checkpointing_steps=1000000"]
        model = ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
        took = run("train_text_to_image_qat.py", *model, *data, *flags, "--output_dir", folder)
        seconds.write_text(json.dumps(took))
    return folder / "quant_model.pt", json.loads(seconds.read_text())


def paint(name: str, variant: Variant, args: argparse.Namespace) -> tuple[Path, float | None]:
    """The folder of the variant's pictures, and the seconds of its training."""
    quantized, seconds = [], None
    if variant.trainer is not None:
        file, seconds = train(variant.trainer, args)
        quantized = ["-qm", file]
    folder = args.work_dir / name
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        what = ["--captions_file", args.captions_file, "-n", args.images_num, "--batch_size", 16]
        how = ["--num_inference_steps", args.num_inference_steps, "--guidance_scale", args.guidance_scale]
        model = ["-m", args.pretrained_model_name_or_path, *quantized, *variant.painter]
        run("text2images.py", *model, *what, *how, "--output_dir", partial)
        partial.rename(folder)
    return folder, seconds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=Path, default=ROOT / "demo/tiny-stable-diffusion")
    add("--train_data_dir", type=Path, default=ROOT / "demo/scenes", help="made by make demo")
    add("--captions_file", type=Path, default=ROOT / "demo/captions.txt")
    add("--images_num", type=int, default=2, help="pictures of each of the 64 captions")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=3.0)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="fp32 is always among them")
    add("--work_dir", type=Path, default=ROOT / "demo/output/fidelity", help="kept between runs")
    add("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    if not (args.train_data_dir / "metadata.jsonl").is_file():
        parser.error(
            f"--train_data_dir {args.train_data_dir} has no metadata.jsonl: run make demo, or create_metadata.py"
        )
    return args


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    names = ["fp32", *(name for name in args.variants if name != "fp32")]
    painted = {name: paint(name, VARIANTS[name], args) for name in names}
    run("evaluate.py", *(folder for folder, _ in painted.values()), "--output_dir", args.work_dir)
    report = json.loads((args.work_dir / "report.json").read_text())
    for row, (name, (_, seconds)) in zip(report["folders"], painted.items()):
        row |= {"folder": name, "training_seconds": seconds}
    report["reference"] = "fp32"
    for row in report["differences"]:
        row |= {end: Path(row[end]).name for end in ("from", "to")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, args.output)


if __name__ == "__main__":
    main()
