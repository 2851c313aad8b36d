#!/usr/bin/env python
"""How close int8 images are to fp32's, variant by variant, from the same captions and seeds.

Trains every variant on the bundled model with train_text_to_image_qat.py, generates demo/captions.txt
with text2images.py, compares with evaluate.py, and counts with demo/check_scenes.py how often the
images show what their captions say. What is done already in --work_dir is not done again, so an
interrupted run goes on. Writes the report as JSON, and the default's contact sheet beside it.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity_guidance_3.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))

import check_scenes  # noqa: E402
from output import note_start, write_json  # noqa: E402

PTQ = ["--max_train_steps=0"]
QAT = ["--max_train_steps=600", "--use_ema"]  # all else is by default as in the original README
SHORT = ["--max_train_steps=300", "--use_ema"]  # that has 300 steps, and so does make demo
OPENVINO = "benchmarks/openvino_int8.py"
FP32, BF16 = ["--dtype", "float32"], ["--dtype", "bfloat16"]
SEEDS = (1, 2)  # of calibration and training, beside the default 0
# Differences from these are kept in the report.
BASELINES = ("bf16", "int8-ptq", "int8-ptq-bf16", "int8-ptq-unpaired", "int8-qat-unpaired")
BASELINES += ("openvino-int8", "openvino-int8-bf16", *(f"int8-ptq-seed-{seed}" for seed in SEEDS))


@dataclass
class Variant:
    """training: flags of train_text_to_image_qat.py, None where there is none; generation: flags of `script`."""

    training: list[str] | None
    generation: list[str] = field(default_factory=lambda: FP32)
    script: str = "text2images.py"


VARIANTS = {
    "fp32": Variant(None),
    "bf16": Variant(None, BF16),  # the noise floor
    "openvino-int8": Variant(None, FP32, OPENVINO),
    "openvino-int8-bf16": Variant(None, BF16, OPENVINO),
    "int8-ptq": Variant(PTQ),
    "int8-qat": Variant(QAT),
    "int8-ptq-bf16": Variant(PTQ, BF16),
    "int8-qat-bf16": Variant(QAT, BF16),
    "int8-ptq-unpaired": Variant(PTQ, [*FP32, "--no_paired_guidance"]),
    "int8-qat-unpaired": Variant(QAT, [*FP32, "--no_paired_guidance"]),
    "int8-qat-300-steps": Variant(SHORT),
    **{f"int8-ptq-seed-{seed}": Variant([*PTQ, f"--seed={seed}"]) for seed in SEEDS},
    **{f"int8-qat-seed-{seed}": Variant([*QAT, f"--seed={seed}"]) for seed in SEEDS},
}


def run(script: str, *flags: str | Path | int | float) -> float:
    """Run a script; returns its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, check=True)
    return time.monotonic() - began


def train(variant: Variant, args: argparse.Namespace) -> tuple[Path, float]:
    """Its quant_model.pt, and the seconds it took; variants that are trained in the same way share it."""
    folder = args.work_dir / f"trained {' '.join(flag.lstrip('-') for flag in variant.training)}"
    seconds = folder / "seconds.json"
    if not seconds.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        data = ["--train_data_dir", args.train_data_dir, "--resolution=64", "--train_batch_size=4", "--use_cpu"]
        data += ["--center_crop", "--random_flip", "--report_to=none", "--checkpointing_steps=1000000"]
        model = ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
        took = run("train_text_to_image_qat.py", *model, *data, *variant.training, "--output_dir", folder)
        seconds.write_text(json.dumps(took))
    return folder / "quant_model.pt", json.loads(seconds.read_text())


def generate(name: str, variant: Variant, args: argparse.Namespace) -> tuple[Path, float | None]:
    """The folder of the variant's images, and the seconds of its training."""
    quantized, seconds = [], None
    if variant.training is not None:
        file, seconds = train(variant, args)
        quantized = ["-qm", file]
    folder = args.work_dir / name
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        what = ["--captions_file", args.captions_file, "-n", args.images_num, "--batch_size", 16]
        how = ["--num_inference_steps", args.num_inference_steps, "--guidance_scale", args.guidance_scale]
        model = ["-m", args.pretrained_model_name_or_path, *quantized, *variant.generation]
        scenes = ["--scenes", args.train_data_dir] if variant.script == OPENVINO else []
        run(variant.script, *scenes, *model, *what, *how, "--output_dir", partial)
        partial.rename(folder)
    return folder, seconds


def caption_accuracies(folders: list[Path]) -> list[float]:
    """Percent of what the captions ask for (sky, mountains, ground, object, side) that each folder shows."""
    ridges, _ = check_scenes.fit_classifier(900)
    percentages = []
    for folder in folders:
        requests = check_scenes.read_requests(folder)
        seen = check_scenes.see(ridges, [check_scenes.look(image) for image in check_scenes.open_images(requests)])
        counts = check_scenes.accuracy([request.asked for request in requests], seen).values()
        hits = sum(images * percent for images, percent in counts if images)
        percentages.append(hits / sum(images for images, _ in counts))
    return percentages


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=Path, default=ROOT / "demo/tiny-stable-diffusion")
    add("--train_data_dir", type=Path, default=ROOT / "demo/scenes", help="made by make demo")
    add("--captions_file", type=Path, default=ROOT / "demo/captions.txt")
    add("--images_num", type=int, default=4, help="images of each of the 64 captions")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=3.0)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="fp32 is always among them")
    add("--lpips_weights", type=Path, help="as evaluate.py has it")
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
    note_start(args.work_dir)
    names = ["fp32", *sorted(set(args.variants) - {"fp32"}, key=list(VARIANTS).index)]
    names.sort(key=lambda name: name == "int8-qat")  # the contact sheet is of the last one
    generated = {name: generate(name, VARIANTS[name], args) for name in names}
    lpips = [] if args.lpips_weights is None else ["--lpips_weights", args.lpips_weights]
    run("evaluate.py", *(folder for folder, _ in generated.values()), "--output_dir", args.work_dir, *lpips)
    report = json.loads((args.work_dir / "report.json").read_text())
    shown = caption_accuracies([folder for folder, _ in generated.values()])
    for row, (name, (_, seconds)), percent in zip(report["folders"], generated.items(), shown):
        row |= {"folder": name, "training_seconds": seconds, "caption_accuracy": percent}
        print(f"{name}: {row['caption_accuracy']:.1f} % of what the captions ask for")
    report["reference"] = "fp32"
    for row in report["differences"]:
        row |= {end: Path(row[end]).name for end in ("from", "to")}
    report["differences"] = [row for row in report["differences"] if row["from"] in BASELINES]
    write_json(report, args.output, args.work_dir)
    shutil.copyfile(args.work_dir / "contact_sheet.png", args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
