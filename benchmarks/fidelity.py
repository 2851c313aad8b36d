#!/usr/bin/env python
"""How close int8 images are to fp32's, variant by variant, from the same captions and seeds.

Trains every variant on the bundled model with train_text_to_image_qat.py, generates demo/captions.txt
with text2images.py, compares with evaluate.py, and counts with demo/check_scenes.py how often the
images show what their captions say. What is done already in --work_dir is not done again, so an
interrupted run goes on. Writes the report as JSON, and the default's contact sheet beside it.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity.json
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
PUBLISHED = [*SHORT, "--keep_float", "--task_weight=1", "--mixed_precision=no", "--quantizer_learning_rate=0"]
PUBLISHED += ["--learning_rate=1e-05", "--bias_learning_rate=1e-05", "--lr_scheduler=constant"]
PUBLISHED += ["--proportion_empty_prompts=0"]
FLOAT_CANDIDATES = {
    "conv_in-conv_out": ["conv_in", "conv_out"],
    "time_embedding": ["time_embedding"],
    "time_emb_proj": [r".*\.time_emb_proj"],
    "cross_kv": [r".*\.attn2\.to_[kv]"],
    "conv_shortcut": [r".*\.conv_shortcut"],
    "proj": [r".*\.proj_(in|out)"],
    "ff2": [r".*\.ff\.net\.2"],
}
SEEDS = (1, 2)  # of calibration and training, beside the default 0
# differences from these are kept in the report
BASELINES = ("bf16", "int8-ptq", "int8-ptq-bf16", "int8-ptq-unpaired", "int8-ptq-painting", "published")
BASELINES += tuple(f"int8-ptq-seed-{seed}" for seed in SEEDS)
BASELINES += ("int8-qat-unpaired", "openvino-int8", "openvino-int8-bf16")


@dataclass
class Variant:
    """trainer: flags of the training, None for a full-precision picture; painter: flags of the painting;
    alternative: of benchmarks/alternatives.py, instead of the script's own way."""

    trainer: list[str] | None
    painter: list[str] = field(default_factory=lambda: ["--dtype", "float32"])
    alternative: str | None = None


VARIANTS = {
    "fp32": Variant(None),
    "bf16": Variant(None, ["--dtype", "bfloat16"]),  # the noise floor
    "openvino-int8": Variant(None, alternative="nncf"),
    "openvino-int8-bf16": Variant(None, ["--dtype", "bfloat16"], alternative="nncf"),
    "int8-ptq": Variant(PTQ),
    "int8-qat": Variant(QAT),
    "int8-ptq-bf16": Variant(PTQ, ["--dtype", "bfloat16"]),
    "int8-qat-bf16": Variant(QAT, ["--dtype", "bfloat16"]),
    "int8-ptq-unpaired": Variant(PTQ, ["--dtype", "float32", "--no_paired_guidance"]),
    "int8-qat-unpaired": Variant(QAT, ["--dtype", "float32", "--no_paired_guidance"]),
    "int8-qat-300-steps": Variant(SHORT),
    "int8-qat-1000-steps": Variant(["--max_train_steps=1000", "--use_ema"]),
    # the published recipe: quantized outputs, moving ranges, every layer; and its quantizers without training
    "published": Variant(PUBLISHED, alternative="random_timesteps+even_timesteps+one_rate+published"),
    "published-ptq": Variant([*PUBLISHED, *PTQ], alternative="painting+published"),
    # calibration, one thing at a time
    "int8-ptq-all-min-max": Variant([*PTQ, "--keep_float"], alternative="painting+without_smoothing"),
    "int8-ptq-all": Variant([*PTQ, "--keep_float"], alternative="painting"),
    **{
        f"int8-ptq-float-{name}": Variant([*PTQ, "--keep_float", *what], alternative="painting")
        for name, what in FLOAT_CANDIDATES.items()
    },
    "int8-ptq-painting": Variant(PTQ, alternative="painting"),  # all of them, as by default
    "int8-ptq-painting-without-smoothing": Variant(PTQ, alternative="painting+without_smoothing"),
    "int8-ptq-painting-least-error": Variant(PTQ, alternative="painting+least_error"),
    # training, one thing at a time
    "int8-qat-painting": Variant(QAT, alternative="painting"),
    "int8-qat-frozen-ranges": Variant([*QAT, "--quantizer_learning_rate=0"]),
    "int8-qat-one-rate": Variant(QAT, alternative="one_rate"),
    "int8-qat-cosine": Variant([*QAT, "--lr_scheduler=cosine"]),
    "int8-qat-no-ema": Variant(["--max_train_steps=600"]),
    "int8-qat-random-timesteps": Variant(QAT, alternative="random_timesteps"),
    "int8-qat-even-timesteps": Variant(QAT, alternative="even_timesteps"),
    "int8-qat-fixed-factors": Variant(QAT, alternative="fixed_factors"),
    "int8-qat-mean-squared-error": Variant(QAT, alternative="mean_squared_error"),
    "int8-qat-feature-kd": Variant([*QAT, "--feature_kd_weight=0.1"]),
    "int8-qat-task-loss": Variant([*QAT, "--task_weight=0.1"]),
    **{f"int8-ptq-seed-{seed}": Variant([*PTQ, f"--seed={seed}"]) for seed in SEEDS},
    **{f"int8-qat-seed-{seed}": Variant([*QAT, f"--seed={seed}"]) for seed in SEEDS},
}


def run(script: str, *flags: str | Path | int | float, alternative: str | None = None) -> float:
    """Run a script; returns its seconds."""
    began = time.monotonic()
    command = [script] if alternative is None else ["benchmarks/alternatives.py", alternative, script]
    subprocess.run([sys.executable, *command, *map(str, flags)], cwd=ROOT, check=True)
    return time.monotonic() - began


def train(variant: Variant, args: argparse.Namespace) -> tuple[Path, float]:
    """Its quant_model.pt, and the seconds it took; variants that are trained in the same way share it."""
    words = [flag.lstrip("-") for flag in ([variant.alternative] if variant.alternative else []) + variant.trainer]
    folder = args.work_dir / f"trained {' '.join(words)}".replace("\\", "").replace("*", "_").replace("|", "_")
    seconds = folder / "seconds.json"
    if not seconds.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        data = ["--train_data_dir", args.train_data_dir, "--resolution=64", "--train_batch_size=4", "--use_cpu"]
        data += ["--center_crop", "--random_flip", "--report_to=none", "--checkpointing_steps=1000000"]
        model = ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
        what = [*model, *data, *variant.trainer, "--output_dir", folder]
        took = run("train_text_to_image_qat.py", *what, alternative=variant.alternative)
        seconds.write_text(json.dumps(took))
    return folder / "quant_model.pt", json.loads(seconds.read_text())


def paint(name: str, variant: Variant, args: argparse.Namespace) -> tuple[Path, float | None]:
    """The folder of the variant's pictures, and the seconds of its training."""
    quantized, seconds = [], None
    if variant.trainer is not None:
        file, seconds = train(variant, args)
        quantized = ["-qm", file]
    folder = args.work_dir / name
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        what = ["--captions_file", args.captions_file, "-n", args.images_num, "--batch_size", 16]
        how = ["--num_inference_steps", args.num_inference_steps, "--guidance_scale", args.guidance_scale]
        model = ["-m", args.pretrained_model_name_or_path, *quantized, *variant.painter]
        run("text2images.py", *model, *what, *how, "--output_dir", partial, alternative=variant.alternative)
        partial.rename(folder)
    return folder, seconds


def caption_accuracies(folders: list[Path]) -> list[float]:
    """Percent of what the captions ask for (sky, mountains, ground, object, side) that each folder shows."""
    ridges, _ = check_scenes.fit_classifier(900)
    percentages = []
    for folder in folders:
        requests = check_scenes.read_requests(folder)
        seen = check_scenes.see(ridges, [check_scenes.look(image) for image in check_scenes.open_pictures(requests)])
        counts = check_scenes.accuracy([request.asked for request in requests], seen).values()
        hits = sum(pictures * percent for pictures, percent in counts if pictures)
        percentages.append(hits / sum(pictures for pictures, _ in counts))
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
    painted = {name: paint(name, VARIANTS[name], args) for name in names}
    lpips = [] if args.lpips_weights is None else ["--lpips_weights", args.lpips_weights]
    run("evaluate.py", *(folder for folder, _ in painted.values()), "--output_dir", args.work_dir, *lpips)
    report = json.loads((args.work_dir / "report.json").read_text())
    shown = caption_accuracies([folder for folder, _ in painted.values()])
    for row, (name, (_, seconds)), percent in zip(report["folders"], painted.items(), shown):
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
