#!/usr/bin/env python
"""Write the tables of README.md, CONTRIBUTING.md and docs/ from the files in benchmarks/results.

A table stands between <!-- table: NAME --> and <!-- end table -->, with one line below it: where, when, at which commit
and by which command it was measured. What a file lacks is left out, and named. --check changes nothing: it prints how
many commits have changed the measured scripts since, and exits with 1 where a document differs from its files.

    python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from output import git, replace_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
BLOCK = re.compile(r"^(<!-- table: (\S+) -->\n)(.*?)^(<!-- end table -->)", re.S | re.M)
NO_RECORD = "before provenance was recorded"
NEEDS_RECORD = ("unet_step.json", "end_to_end.json")  # older ones are of PyTorch's int8 kernels: archive/
UNITS = {"amx_int8": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
Row = dict[str, Any]


@dataclass
class Content:
    """What a table shows. text: instead of head and rows, as it stands. missing: names of what is not measured."""

    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    text: str = ""
    used: list[tuple[str, Row]] = field(default_factory=list)  # (file, row) of what was measured by another run


@dataclass
class Table:
    """files: of benchmarks/results; scripts: whose commits may change what was measured."""

    build: Callable[..., Content]
    files: tuple[str, ...]
    scripts: tuple[str, ...]


TRAIN, GENERATE = "train_text_to_image_qat.py", "text2images.py"
TABLES: dict[str, Table] = {}


def table(name: str, *files: str, scripts: tuple[str, ...] = ()) -> Callable:
    """Register the function as the builder of a table; it gets the contents of the files, {} for a missing one."""

    def register(build: Callable[..., Content]) -> Callable[..., Content]:
        assert name not in TABLES, name
        TABLES[name] = Table(build, files, scripts)
        return build

    return register


# ---------------------------------------------------------------- cells


def number(value: float | None, decimals: int = 2) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def interval(values: list[float] | None, decimals: int = 2) -> str:
    """mean [low, high]"""
    if not values:
        return ""
    mean, low, high = (f"{value:.{decimals}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def with_ratio(value: float | None, base: float | None, decimals: int) -> str:
    if value is None:
        return ""
    return number(value, decimals) + (f" ({value / base:.2f})" if base and value != base else "")


def code(name: str) -> str:
    """With flags in backquotes."""
    return re.sub(r"--\w+( \d+)?", r"`\g<0>`", name)


def drop_empty(content: Content) -> Content:
    """Without columns that no row fills, and without rows that no column fills; their names are missing."""
    if not any(any(row[1:]) for row in content.rows):
        return Content(missing=["this table"])
    columns = [place for place in range(1, len(content.head)) if any(row[place] for row in content.rows)]
    content.missing += [name for place, name in enumerate(content.head) if place and place not in columns]
    content.missing += [row[0] for row in content.rows if not any(row[1:])]
    content.rows = [[row[0], *(row[place] for place in columns)] for row in content.rows if any(row[1:])]
    content.head = [content.head[0], *(content.head[place] for place in columns)]
    return content


def by_name(rows: list[Row], key: str = "name") -> dict[str, Row]:
    return {row[key]: row for row in rows}


# ---------------------------------------------------------------- speed and memory


def step_rows(result: Row, batch: int = 2, latents: int = 64) -> dict[str, Row]:
    """Rows of one shape."""
    rows = [row for row in recorded_rows(result) if (row["batch"], row["latents"]) == (batch, latents)]
    return by_name(rows)


def recorded_rows(result: Row) -> list[Row]:
    return [row for row in result.get("rows", []) if row.get("provenance", result.get("provenance"))]


def computes_in_bf16(result: Row) -> bool:
    """Whether --dtype auto is bfloat16 on the CPU that was measured."""
    return bool({"avx512_bf16", "amx_bf16"} & set(result.get("machine", {}).get("flags", [])))


@table("headline", "unet_step.json", "fidelity_guidance_7.5.json", scripts=(TRAIN, GENERATE, "benchmarks/unet_step.py"))
def headline(speed: Row, fidelity: Row) -> Content:
    """A row joins speed and fidelity of the same setting only."""
    steps, folders = step_rows(speed), by_name(fidelity.get("folders", []), "folder")
    auto = "int8" if computes_in_bf16(speed) else None
    names = [
        ("fp32, diffusers", "diffusers fp32", "fp32"),
        ("bf16, diffusers", "diffusers bf16", "bf16"),
        ("OpenVINO's own int8 (NNCF), the rest in bf16", "openvino int8", "openvino-int8-bf16"),
        ("OpenVINO's own int8 (NNCF), the rest in fp32", "openvino int8, fp32 elsewhere", "openvino-int8"),
        ("**this repository's int8**, the rest in bf16", auto, "int8-qat-bf16"),
        ("**this repository's int8**, the rest in fp32", "int8 --dtype float32" if auto else "int8", "int8-qat"),
    ]
    heads = ["SD v1.5: file, MB", "peak GiB", "s/step", "64-pixel model: PSNR, dB", "LPIPS"]
    content, fp32 = Content(["UNet", *heads]), steps.get("diffusers fp32", {})
    for name, step, folder in names:
        cost, closeness = steps.get(step, {}), folders.get(folder, {})
        cells = [with_ratio(cost.get(key), fp32.get(key), digits) for key, digits in COSTS.items()]
        row = [name, *cells, interval(closeness.get("psnr")), number(first(closeness.get("lpips")), 5)]
        if folder == "fp32" and folders:
            row[-2] = "reference"
        content.rows.append(row)
    return drop_empty(content)


COSTS = {"file_mb": 0, "peak_gib": 1, "seconds": 2}  # decimals of each


def first(values: list[float] | None) -> float | None:
    return values[0] if values else None


@table("unet-step", "unet_step.json", scripts=(GENERATE, "benchmarks/unet_step.py"))
def unet_step(result: Row) -> Content:
    steps = step_rows(result)
    wanted = ["diffusers fp32", "diffusers bf16", "openvino bf16", "openvino int8", "openvino int8, fp32 elsewhere"]
    wanted += ["int8", "int8 --no_paired_guidance", "int8 --dtype float32", "int8 as exported", "original recipe"]
    content = Content(["UNet", "s/step", "spread", "to fp32", "to bf16", "first step, s", "peak GiB", "file, MB"])
    for name in dict.fromkeys([*wanted, *steps]):
        row = steps.get(name, {})
        ratios = [with_ratio_only(row, steps.get(base, {})) for base in ("diffusers fp32", "diffusers bf16")]
        cells = [f"{row['spread']:.0%}" if "spread" in row else "", *ratios, number(row.get("first_seconds"))]
        cells = [number(row.get("seconds")), *cells, number(row.get("peak_gib")), number(row.get("file_mb"), 0)]
        content.rows.append([STEP_NAMES.get(name, name), *cells])
        content.used += [("unet_step.json", row)]
    return drop_empty(content)


STEP_NAMES = {
    "diffusers fp32": "fp32, diffusers",
    "diffusers bf16": "bf16, diffusers",
    "openvino bf16": "bf16, OpenVINO",
    "openvino int8": "OpenVINO's own int8 (NNCF), the rest in bf16",
    "openvino int8, fp32 elsewhere": "OpenVINO's own int8 (NNCF), the rest in fp32",
    "int8": "**this repository's int8**",
    "int8 --no_paired_guidance": "**this repository's int8**, `--no_paired_guidance`",
    "int8 --dtype float32": "**this repository's int8**, `--dtype float32`",
    "int8 as exported": "**this repository's int8** in OpenVINO GenAI, or without a C++ compiler",
    "original recipe": "the published recipe's modules (torch.ao)",
}


def with_ratio_only(row: Row, base: Row) -> str:
    return number(row["seconds"] / base["seconds"]) if row and base else ""


@table("unet-step-sizes", "unet_step.json", scripts=(GENERATE, "benchmarks/unet_step.py"))
def unet_step_sizes(result: Row) -> Content:
    """Seconds at other sizes and batches, with the ratio to fp32."""
    content = Content(["batch x latents", *(STEP_NAMES[name] for name in SIZED)])
    for batch, latents in ((2, 64), (2, 96), (2, 128), (8, 64)):
        steps = step_rows(result, batch, latents)
        fp32 = steps.get("diffusers fp32", {}).get("seconds")
        cells = [with_ratio(steps.get(name, {}).get("seconds"), fp32, 2) for name in SIZED]
        content.rows.append([f"{batch} x {latents}x{latents}", *cells])
        content.used += [("unet_step.json", row) for row in steps.values()]
    return drop_empty(content)


SIZED = ("diffusers fp32", "diffusers bf16", "openvino int8", "int8")


@table(
    "unet-step-vnni",
    "unet_step_avx512_vnni.json",
    "unet_step_avx2_vnni.json",
    scripts=(GENERATE, "benchmarks/unet_step.py", "vnni_attention.cpp"),
)
def unet_step_vnni(*results: Row) -> Content:
    """Seconds on CPUs with VNNI and no bf16, with the ratio to fp32."""
    content = Content(["UNet", "AVX512-VNNI, s/step", "AVX-VNNI, s/step"])
    for name in ("diffusers fp32", "openvino int8, fp32 elsewhere", "int8 --dtype float32"):
        cells = []
        for steps in map(step_rows, results):
            seconds = [steps.get(each, {}).get("seconds") for each in (name, "diffusers fp32")]
            cells.append(with_ratio(*seconds, 2))
        content.rows.append([STEP_NAMES[name], *cells])
    return drop_empty(content)


@table("operators", "unet_step.json", scripts=(GENERATE, "benchmarks/unet_step.py"))
def operators(result: Row) -> Content:
    """What a step of the int8 UNet spends its time on."""
    rows = result.get("profiles", {}).get("int8", [])
    content = Content(["operator (kernel)", "calls", "seconds"])
    content.rows = [[row["operator"], str(row["calls"]), number(row["seconds"], 3)] for row in rows]
    content.missing = [] if rows else ["profile of int8 (unet_step.py --profile)"]
    return content


@table("attention", "attention.json", scripts=("amx_attention.cpp", "vnni_attention.cpp", "benchmarks/attention.py"))
def attention(result: Row) -> Content:
    """Long attention beside PyTorch's and OpenVINO's, on one thread."""
    names = ("PyTorch", "OpenVINO", "kernel")
    times = [f"{name}, ms" for name in names]
    content = Content(["dtype; heads, queries, keys, width", *times, "of its limit", "errors"])
    cases: dict[tuple, dict[str, Row]] = {}
    for row in (row for row in result.get("rows", []) if row["threads"] == 1):
        case = row["dtype"], row["heads"], row["queries"], row["keys"], row["width"]
        cases.setdefault(case, {})[row["name"]] = row
    for (dtype, heads, queries, keys, width), rows in cases.items():
        base = rows["PyTorch"]["seconds"] * 1e3
        times = [with_ratio(rows[name]["seconds"] * 1e3, base, 1) for name in names]
        errors = " / ".join(f"{rows[name]['error']:.1e}" for name in names)
        share = f"{rows[names[-1]]['limit_share']:.0%}"
        content.rows.append([f"{dtype}; {heads}, {queries:,}, {keys:,}, {width}", *times, share, errors])
    content.missing = [] if content.rows else ["attention (benchmarks/attention.py)"]
    return content


def whole_runs(result: Row, parts: dict[str, str]) -> Content:
    """parts: headings of the seconds that a run's time is made of, by key."""
    content = Content(["UNet, denoising steps", "s", "to fp32", *parts.values(), "peak GiB"])
    for row in result.get("rows", []):
        cells = [number(row["seconds"], 1), number(row["ratio_to_fp32"])]
        cells += [number(row[key], 2 if key == "step_seconds" else 1) for key in parts]
        content.rows.append([f"{row['name']}, {row['steps']}", *cells, number(row["peak_gib"])])
    content.missing = [] if content.rows else ["whole runs (end_to_end.py)"]
    return content


@table("end-to-end", "end_to_end.json", scripts=(GENERATE, "benchmarks/end_to_end.py"))
def end_to_end(result: Row) -> Content:
    parts = {"start_seconds": "start, s", "step_seconds": "s/step", "text_and_vae_seconds": "text encoder and VAE, s"}
    return whole_runs(result, parts)


@table("pytorch-kernels-end-to-end", "archive/end_to_end_pytorch_kernels.json")
def pytorch_end_to_end(result: Row) -> Content:
    return whole_runs(result, {"first_step_seconds": "until the first step, s"})


@table("metadata", "metadata.json", scripts=("create_metadata.py", "benchmarks/metadata.py"))
def metadata(result: Row) -> Content:
    content = Content(["`create_metadata.py`", "pairs", "s", "CPU s", "ratio"])
    for row in result.get("rows", []):
        cells = [number(row["seconds"]), number(row["cpu_seconds"]), number(row["ratio"])]
        content.rows.append([code(row["name"]), f"{row['pairs']:,}", *cells])
    return content


# ---------------------------------------------------------------- training


def training_rows(result: Row, **setting: Any) -> dict[str, Row]:
    setting = {"unet": "SD v1.5, 2 layers per block", "batch": 1, "latents": 64} | setting
    return by_name([row for row in result.get("rows", []) if setting.items() <= row.items()])


ENCODING = "encoding of images and captions, which --cache_latents saves"
OURS = "ours, QAT + KD"
TRAINING_NAMES = {
    "plain fine-tune": "plain fine-tuning",
    "fine-tune + teacher": "fine-tuning + teacher",
    OURS: "**QAT + distillation, this repository**",
    "ours, QAT + KD, eager": "the same without a C++ compiler",
    "original recipe's modules + KD, fp32": "the published recipe's modules + distillation, fp32",
}


@table("train-step", "train_step.json", scripts=(TRAIN, "benchmarks/train_step.py"))
def train_step(result: Row) -> Content:
    rows = training_rows(result, checkpointing=True)
    parts = ("student_forward", "teacher", "backward", "optimizer_and_ema")
    heads = ["s", "student forward", "teacher", "backward", "optimizer, average"]
    content = Content(["one optimizer step, batch 1", *heads, "to fine-tuning + teacher", "peak GiB"])
    for name, shown in TRAINING_NAMES.items():
        row = rows.get(name, {})
        times = [number(row.get(key), 1) for key in ("seconds", *parts)]
        cells = [*times, number(row.get("ratio_to_plain_and_teacher")), number(row.get("peak_gib"), 1)]
        content.rows.append([shown, *cells])
        content.used += [("train_step.json", row)]
    return drop_empty(content)


def hours_of_training(result: Row) -> tuple[float, float] | None:
    """Of calibration (200 batches of 4) and training (300 steps of 4) for SD v1.5, from a step at batch 1."""
    rows = training_rows(result, checkpointing=True)
    ours, encoding = rows.get(OURS), rows.get(ENCODING)
    if not ours or not encoding:
        return None
    calibration = 800 * (encoding["seconds"] + ours["student_forward"])
    images = 1200 * (encoding["seconds"] + ours["seconds"] - ours["optimizer_and_ema"])
    return calibration / 3600, (images + 300 * ours["optimizer_and_ema"]) / 3600


@table("commands", "train_step.json", "end_to_end.json", scripts=(TRAIN, GENERATE))
def commands(training: Row, runs: Row) -> Content:
    """Time, memory and disk of the README's commands for SD v1.5 at 512 pixels."""
    content = Content(["SD v1.5, 512 pixels", "time", "peak memory", "disk"])
    hours, ours = hours_of_training(training), training_rows(training, checkpointing=True).get(OURS, {})
    time = f"{sum(hours):.1f} h, computed from a step at batch 1" if hours else ""
    disk = f"{3 * CHECKPOINT_BYTES / 1e9:.0f} GB, computed: three checkpoints" if hours else ""
    memory = f"{ours['peak_gib']:.1f} GiB, a step in the variant for 24 GB" if ours.get("peak_gib") else ""
    content.rows.append(["training", time, memory, disk])
    by_steps = {(row["name"], row["steps"]): row for row in runs.get("rows", [])}
    for (name, steps), row in by_steps.items():
        if steps == 50:
            cells = [f"{row['seconds']:.0f} s", f"{row['peak_gib']:.1f} GiB", ""]
            content.rows.append([f"`text2images.py`, {name}, one image of {steps} steps", *cells])
    if first_run := runs.get("first_run"):
        cells = [f"{first_run['seconds']:.0f} s", f"{first_run['peak_gib']:.1f} GiB", f"{first_run['kept_gb']:.1f} GB"]
        content.rows.append(["the same, int8, first run with a file, 2 steps", *cells])
    content.missing = [] if by_steps else ["text2images.py"]
    return drop_empty(content)


PARAMETERS = 859_520_964  # of SD v1.5's UNet
CHECKPOINT_BYTES = 16 * PARAMETERS  # fp32 weights, their average, and Adam's two moments


@table("streaming", "streaming.json", scripts=(TRAIN, "benchmarks/streaming.py"))
def streaming(result: Row) -> Content:
    content = Content(["`--streaming`", "samples", "CPU ms a step, start", "end", "resident MB, start", "end"])
    for row in result.get("rows", []):
        if "cpu_ms_per_step_start" in row:
            keys = ("cpu_ms_per_step_start", "cpu_ms_per_step_end", "resident_mb_start", "resident_mb_end")
            cells = [number(row[key], 0 if "mb" in key else 1) for key in keys]
            content.rows.append([f"{row['what']}, batch {row['batch']}", f"{row['samples']:,}", *cells])
    return content


# ---------------------------------------------------------------- fidelity

VARIANTS = {
    "bf16": "bf16",
    "openvino-int8": "OpenVINO's own int8 (NNCF), the rest in fp32",
    "openvino-int8-bf16": "OpenVINO's own int8 (NNCF), the rest in bf16",
    "int8-ptq": "int8, calibrated, the rest in fp32",
    "int8-qat-300-steps": "int8, 300 steps of training, the rest in fp32",
    "int8-qat": "int8, 600 steps of training, the rest in fp32",
    "int8-ptq-bf16": "int8, calibrated, the rest in bf16",
    "int8-qat-bf16": "int8, 600 steps of training, the rest in bf16",
    "int8-ptq-unpaired": "int8, calibrated, `--no_paired_guidance`, the rest in fp32",
    "int8-qat-unpaired": "int8, 600 steps, `--no_paired_guidance`, the rest in fp32",
}
SEED_VARIANTS = tuple(f"int8-{how}-seed-{seed}" for seed in (1, 2) for how in ("ptq", "qat"))


def closeness(result: Row, names: dict[str, str]) -> Content:
    folders = by_name(result.get("folders", []), "folder")
    content = Content(["UNet", "PSNR, dB", "SSIM", "LPIPS", "CIEDE2000", "worst pair, dB", "file, MB"])
    for folder, name in names.items():
        row = folders.get(folder, {})
        cells = [interval(row.get("psnr")), number(first(row.get("ssim")), 4), number(first(row.get("lpips")), 5)]
        cells += [number(first(row.get("ciede2000"))), number(row.get("psnr_worst"), 1)]
        content.rows.append([name, *cells, number(row.get("unet_mb") if folder != "bf16" else None, 1)])
    content = drop_empty(content)
    content.missing = [name for name in content.missing if name not in ("CIEDE2000",)]
    return content


def gains(result: Row, pairs: list[tuple[str, str, str]]) -> Content:
    """Paired differences: (from, to, name)."""
    known = {(row["from"], row["to"]): row["psnr"] for row in result.get("differences", [])}
    known |= {(after, before): [-mean, -high, -low] for (before, after), (mean, low, high) in known.items()}
    content = Content(["what", "gain in PSNR, dB"])
    content.rows = [[name, interval(known.get((before, after)))] for before, after, name in pairs]
    return drop_empty(content)


GAINS = [
    ("int8-ptq", "int8-qat", "600 steps of training over calibration, the rest in fp32"),
    ("int8-ptq-bf16", "int8-qat-bf16", "600 steps of training over calibration, the rest in bf16"),
    ("int8-qat-unpaired", "int8-qat", "paired guidance over `--no_paired_guidance`, 600 steps"),
    ("int8-ptq-unpaired", "int8-ptq", "paired guidance over `--no_paired_guidance`, calibrated"),
    ("bf16", "int8-qat", "int8 with the rest in fp32 over bf16"),
    ("bf16", "int8-qat-bf16", "int8 with the rest in bf16 over bf16"),
    ("openvino-int8", "int8-qat", "int8 over OpenVINO's own, the rest in fp32"),
    ("openvino-int8-bf16", "int8-qat-bf16", "int8 over OpenVINO's own, the rest in bf16"),
]


@table("gains", "fidelity_guidance_7.5.json", scripts=(TRAIN, GENERATE, "benchmarks/fidelity.py"))
def paired_gains(result: Row) -> Content:
    return gains(result, GAINS)


@table("guidance-7.5", "fidelity_guidance_7.5.json", scripts=(TRAIN, GENERATE, "benchmarks/fidelity.py"))
@table("guidance-3", "fidelity_guidance_3.json", scripts=(TRAIN, GENERATE, "benchmarks/fidelity.py"))
def fidelity(result: Row) -> Content:
    there = {row["folder"] for row in result.get("folders", [])}
    return closeness(result, {folder: name for folder, name in VARIANTS.items() if folder in there})


@table("outliers", "fidelity_stressed.json", scripts=(TRAIN, GENERATE, "demo/stress.py"))
def outliers(result: Row) -> Content:
    folders = by_name(result.get("folders", []), "folder")
    known = {(row["from"], row["to"]): row["psnr"] for row in result.get("differences", [])}
    content = Content(["`--seed` of calibration and training", "calibrated, dB", "600 steps, dB", "gain, dB"])
    for seed, suffix in ((0, ""), (1, "-seed-1"), (2, "-seed-2")):
        before, after = f"int8-ptq{suffix}", f"int8-qat{suffix}"
        cells = [interval(folders.get(name, {}).get("psnr")) for name in (before, after)]
        content.rows.append([str(seed), *cells, interval(known.get((before, after)))])
    return drop_empty(content)


@table("sensitivity", "sensitivity.json", scripts=(TRAIN, "benchmarks/sensitivity.py"))
def sensitivity(result: Row) -> Content:
    """The layers that err most when they alone are int8, in % of the sum over all layers."""
    layers = result.get("layers", [])
    total = sum(row["int8"]["guided"] for row in layers)
    content = Content(
        ["layer", "by default", "% of the arithmetic", "% of the error", "by its input", "by its weights"]
    )
    for row in layers[:12]:
        shares = [number(100 * row[key]["guided"] / total, 1) for key in ("int8", "input", "weights")]
        content.rows.append([f"`{row['layer']}`", row["default"], number(row["macs_percent"], 1), *shares])
    return content


# ---------------------------------------------------------------- the laboratory notes


def change(name: str) -> str:
    return CHANGES.get(name, name)


CHANGES = {
    "published-ptq": "the published recipe's quantizers",
    "int8-ptq-all-min-max": "inputs and weights of all layers, min-max",
    "int8-ptq-all": "the same with smoothing scales (SmoothQuant)",
    "int8-ptq-float-conv_in-conv_out": "... and conv_in and conv_out in float",
    "int8-ptq-float-time_embedding": "... or the time embedding",
    "int8-ptq-float-time_emb_proj": "... or the time projections",
    "int8-ptq-float-cross_kv": "... or the keys and values of cross-attention",
    "int8-ptq-float-conv_shortcut": "... or the shortcuts",
    "int8-ptq-float-proj": "... or proj_in and proj_out",
    "int8-ptq-float-ff2": "... or the feed-forward's second Linear",
    "int8-ptq-painting": "... or all of these as by default (some with int8 weights)",
    "int8-ptq-painting-without-smoothing": "that without smoothing scales",
    "int8-ptq-painting-least-error": "that with ranges of least squared error",
    "int8-ptq": "that with the ranges of noised images: the default",
    "int8-qat-300-steps": "the default",
    "int8-qat-300-steps-one-rate": "one learning rate for all weights, whatever their size",
    "int8-qat-300-steps-no-ema": "without `--use_ema`",
    "int8-qat-300-steps-cosine": "`--lr_scheduler cosine`",
    "int8-qat-300-steps-frozen-ranges": "frozen ranges (`--quantizer_learning_rate 0`)",
    "int8-qat-300-steps-mean-squared-error": "mean squared error as the loss",
    "int8-qat-300-steps-feature-kd": "with feature distillation (`--feature_kd_weight 0.1`)",
    "int8-qat-300-steps-task-loss": "with the denoising loss (`--task_weight 0.1`)",
    "int8-qat-300-steps-random-timesteps": "timesteps not stratified",
    "int8-qat-300-steps-painting": "after calibration on the model's own trajectories",
    "published": "the published recipe",
}


def beside_outliers(plain: Row, outliers: Row, names: list[str], base: str | None) -> Content:
    """PSNR of each variant on the bundled model and on its variant with outlier channels; gain over `base`."""
    columns = []
    for result, suffix in ((plain, ""), (outliers, " with outliers")):
        folders = by_name(result.get("folders", []), "folder")
        columns.append((f"PSNR{suffix}, dB", {name: interval(row.get("psnr")) for name, row in folders.items()}))
        known = {row["to"]: row["psnr"] for row in result.get("differences", []) if row["from"] == base}
        if base:
            columns.append((f"over calibration{suffix}", {name: interval(values) for name, values in known.items()}))
    content = Content(["one change at a time", *(head for head, _ in columns)])
    content.rows = [[change(name), *(cells.get(name, "") for _, cells in columns)] for name in names]
    return drop_empty(content)


@table("tried-calibration", "archive/fidelity_calibration.json", "archive/fidelity_stressed_64.json")
def tried_calibration(plain: Row, outliers: Row) -> Content:
    names = [name for name in CHANGES if name.endswith("-ptq") or name.startswith("int8-ptq")]
    return beside_outliers(plain, outliers, names, None)


@table("tried-training", "archive/fidelity_training.json", "archive/fidelity_stressed_64.json")
def tried_training(plain: Row, outliers: Row) -> Content:
    names = [name for name in CHANGES if name.startswith("int8-qat") or name == "published"]
    return beside_outliers(plain, outliers, names, "int8-ptq")


def archived_steps(result: Row) -> Content:
    content = Content(["UNet, batch 2, latents 64x64", "s/step", "to fp32", "peak GiB"])
    for row in result.get("rows", []):
        if (row["batch"], row["latents"]) == (2, 64):
            cells = [number(row["seconds"]), number(row["ratio_to_fp32"]), number(row["peak_gib"])]
            content.rows.append([code(row["name"]), *cells])
    return content


for place in ("epyc", "amx", "amx_paired", "without_amx"):
    name = f"pytorch-kernels-{place.replace('_', '-')}"
    table(name, f"archive/unet_step_{place}.json")(archived_steps)
table("steps-avx512-bf16", "archive/unet_step_avx512_bf16.json")(archived_steps)


@table("pytorch-kernels-fidelity", "archive/fidelity_pytorch_kernels.json")
def pytorch_fidelity(result: Row) -> Content:
    bf16, published = {"bf16": "bf16"}, {"published": "the published recipe (simulated), 300 steps"}
    return closeness(result, bf16 | published | VARIANTS)


@table(
    "pytorch-kernels-fidelity-without-amx",
    "archive/fidelity_without_amx.json",
    "archive/fidelity_stressed_without_amx.json",
)
def pytorch_without_amx(plain: Row, outliers: Row) -> Content:
    content = Content(["model", "calibrated, dB", "600 steps, dB", "gain, dB"])
    for name, result in (("bundled", plain), ("with outlier channels", outliers)):
        folders = by_name(result.get("folders", []), "folder")
        cells = [interval(folders.get(folder, {}).get("psnr")) for folder in ("int8-ptq", "int8-qat")]
        known = {(row["from"], row["to"]): row["psnr"] for row in result.get("differences", [])}
        content.rows.append([name, *cells, interval(known.get(("int8-ptq", "int8-qat")))])
    return drop_empty(content)


@table("error-by-step", "archive/steps.json")
def error_by_step(result: Row) -> Content:
    content = Content(["denoising steps in int8", "error of the final latents, relative", "%"])
    for row in result.get("rows", []):
        steps = f"{row['first'] + 1} to {row['last'] + 1}" if row["last"] > row["first"] else f"{row['first'] + 1}"
        steps += ", int8 weights only" if row["weights_alone"] else ""
        content.rows.append([steps, f"{row['error']:.1e}", number(row["percent"], 1)])
    return content


# ---------------------------------------------------------------- the demo


@table("demo", "demo.json", scripts=("Makefile", TRAIN, GENERATE, "evaluate.py"))
def demo(result: Row) -> Content:
    """How long `make demo` takes, and the last lines that it prints."""
    if not result:
        return Content(missing=["make demo (benchmarks/demo.py)"])
    minutes = f"{result['seconds'] / 60:.0f} minutes after the installation, it prints:"
    rows = [number for number, line in enumerate(result["output"]) if line.startswith("|")]
    return Content(text="\n".join([minutes, "```", *result["output"][: rows[-1] + 1], "```"]))


# ---------------------------------------------------------------- below each table


def where(result: Row, row: Row | None = None) -> str:
    """CPU, threads and versions."""
    machine = (row or {}).get("machine") or result.get("machine") or {}
    if not machine:
        return ""
    flags = machine.get("flags", machine.get("isa", []))
    units = [name for flag, name in UNITS.items() if flag in flags]
    known = "flags" in machine or "isa" in machine
    text = machine["cpu"] + (f" ({', '.join(units) or 'none of ' + ', '.join(UNITS.values())})" if known else "")
    if "threads" in machine:
        text += f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    versions = result.get("provenance", {}).get("versions", {})
    shown = [f"{name} {versions[name]}" for name in ("torch", "openvino", "nncf") if name in versions]
    return ", ".join([text, *shown])


def when(result: Row, row: Row | None = None, command: bool = True) -> str:
    """Date, commit and, if asked for, command; of a file without provenance, what is known of it."""
    origin = (row or {}).get("provenance") or result.get("provenance")
    if not origin:
        recorded = result.get("recorded")
        known = f", added in commit {recorded['commit']} on {recorded['date']}" if recorded else ""
        return f"measured {NO_RECORD}{known}" + (f" ({recorded['setting']})" if recorded else "")
    commit = f"at commit {origin['commit']}" if origin["commit"] else "outside of a repository"
    commit += ", with uncommitted changes" if origin["dirty"] else ""
    if began := origin.get("work_dir_began"):
        commit += f", in part from commit {began['commit'][:10]} of {began['date'][:10]}"
    return f"measured {origin['date'][:10]} {commit}" + (f": `{origin['command']}`" if command else "")


def source_line(name: str, content: Content, results: dict[str, Row], document: Path) -> str:
    """Where and when the table was measured; README leaves the commands to the files that it links to."""
    sentences, command = [], document.name != "README.md"
    for file, result in results.items():
        if result:
            link = os.path.relpath(ROOT / RESULTS / file, document.parent).replace(os.sep, "/")
            facts = [text for text in (where(result), when(result, command=command)) if text]
            sentences.append(f"[{Path(file).name}]({link}): {'; '.join(facts)}.")
            others: dict[str, list[str]] = {}
            for row in (row for used, row in content.used if used == file and row.get("provenance")):
                others.setdefault(f"{where(result, row)}; {when(result, row, command)}.", []).append(row["name"])
            sentences += [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in others.items()]
    if content.missing and not all("archive" in file for file in results):
        sentences.append(f"Not measured yet: {'; '.join(dict.fromkeys(content.missing))}.")
    return "<sub>" + " ".join(sentences) + "</sub>"


# ---------------------------------------------------------------- documents


def load(file: str) -> Row:
    """{} for a missing file, and for one whose rows were another engine's before provenance was recorded."""
    path = ROOT / RESULTS / file
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {} if file in NEEDS_RECORD and not result.get("provenance") else result


def render(name: str, document: Path) -> str:
    """What stands between the markers."""
    one = TABLES[name]
    results = {file: load(file) for file in one.files}
    content = one.build(*results.values())
    lines = [content.text] if content.text else []
    if content.rows:
        lines = ["| " + " | ".join(content.head) + " |", "|---" * len(content.head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in content.rows]
    return "\n".join([*lines, "", source_line(name, content, results, document)]).lstrip("\n") + "\n"


def documents() -> list[Path]:
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


@dataclass
class Block:
    document: Path
    name: str
    problem: str | None  # one line, None where the document has what the files say


def blocks(document: Path) -> Iterator[Block]:
    """The tables of a document, as they stand."""
    text = document.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    starts, ends = (len(re.findall(f"^<!-- {word}", text, re.M)) for word in ("table:", "end table"))
    if not starts == ends == len(found):
        yield Block(document, "?", "<!-- table: NAME --> and <!-- end table --> do not pair")
        return
    for _, name, body, _ in found:
        if name not in TABLES:
            yield Block(document, name, f"benchmarks/tables.py has no such table; there are {', '.join(TABLES)}")
        else:
            stale = "differs from its files: run python benchmarks/tables.py"
            yield Block(document, name, None if body == render(name, document) else stale)


@cache
def commits_since(commit: str, scripts: tuple[str, ...]) -> int | None:
    """None where git or the commit is not there, as in an unpacked archive or a shallow clone."""
    count = git("rev-list", "--count", f"{commit}..HEAD", "--", *scripts)
    return int(count) if count else None


def age(name: str) -> str:
    """How many commits have changed the scripts since the table was measured."""
    facts = []
    for file in TABLES[name].files:
        origin = load(file).get("provenance") or load(file).get("recorded")
        if origin and origin["commit"] and TABLES[name].scripts:
            count = commits_since(origin["commit"], TABLES[name].scripts)
            commits = "an unknown number of commits" if count is None else f"{count} commit{'s' * (count != 1)}"
            facts.append(f"{file} of {origin['commit']}, {commits} to {', '.join(TABLES[name].scripts)} since")
        else:
            facts.append(f"{file} of the archive" if "archive" in file else f"{file}, {NO_RECORD}")
    return "; ".join(facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    args = parser.parse_args(argv)
    failed = False
    for document in documents():
        if not args.check:
            text = document.read_text(encoding="utf-8")
            written = BLOCK.sub(
                lambda found, document=document: (
                    found[1] + render(found[2], document) + found[4] if found[2] in TABLES else found[0]
                ),
                text,
            )
            if written != text:
                replace_text(document, written)
        for block in blocks(document):
            failed |= block.problem is not None
            state = block.problem or f"up to date ({age(block.name)})"
            print(f"{document.relative_to(ROOT).as_posix()}: {block.name}: {state}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
