#!/usr/bin/env python
"""One call of the UNet, as in a denoising step with guidance: fp32, bf16, int8 and OpenVINO, interleaved.

Makes a random-weight SD v1.5 UNet (or takes --model FOLDER), quantizes it with the default recipe of
train_text_to_image_qat.py and runs every variant in turn in one process; then each alone in a process of its
own, for its peak memory. Models are kept in --work_dir. Rows of other shapes that are in --output stay.
"seconds" is the median, "spread" (max - min) / median, "ratio_to_fp32" the median over that of fp32. Where others
use the machine, "cpu_seconds" and "cpu_ratio_to_fp32" with OMP_NUM_THREADS=1 tell more.

    python benchmarks/unet_step.py --output benchmarks/results/unet_step.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402

import text2images  # noqa: E402
from full_size import SD15_UNET  # noqa: E402
from output import kept_rows, write_json  # noqa: E402
from timing import interleaved, peak_gib, spread  # noqa: E402

Step = Callable[[], Any]


# ---------------------------------------------------------------- the models on disk


def write_unet(args: argparse.Namespace) -> Path:
    """The full-precision UNet's folder."""
    if args.model is not None:
        return args.model
    folder = args.work_dir / "unet"
    if not folder.is_dir():
        torch.manual_seed(0)
        partial = folder.with_suffix(".partial")
        UNet2DConditionModel(**SD15_UNET).save_pretrained(partial)
        partial.rename(folder)
    return folder


def load_fp32(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(write_unet(args), torch_dtype=dtype)
    return unet.eval().requires_grad_(False)


def example(args: argparse.Namespace, config: dict, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Latents [B, 4, H/8, W/8], a timestep, and a text encoding [B, 77, D]."""
    generator = torch.Generator().manual_seed(seed)
    batch, edge = args.shape
    latents = torch.randn(batch, config["in_channels"], edge, edge, generator=generator)
    text = torch.randn(batch, 77, config["cross_attention_dim"], generator=generator)
    return latents.to(dtype), torch.tensor(500), text.to(dtype)


def write_ours(args: argparse.Namespace) -> Path:
    """quant_model.pt of the default recipe; the ranges are those of one random input."""
    path = args.work_dir / "quant_model.pt"
    if path.is_file():
        return path
    from neural_compressor.torch.quantization import convert, prepare

    import train_text_to_image_qat as trainer

    unet = load_fp32(args)
    names = {"keep_float": trainer.DEFAULT_KEEP_FLOAT, "weight_only": trainer.DEFAULT_WEIGHT_ONLY}
    config = trainer.quantization_config(argparse.Namespace(**names, quantization_config=None), unet)
    student = prepare(unet, config)
    trainer.set_mode(student, "observe")
    with torch.no_grad():
        student(*example(args, unet.config, torch.float32))
    trainer.finish_calibration(student)
    state_dict = {name: tensor.contiguous() for name, tensor in convert(student).state_dict().items()}
    unet_config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    payload = {"format": "sd-unet-int8", "format_version": 1, "unet_config": unet_config, "state_dict": state_dict}
    torch.save(payload | {"checksum": trainer.checksum(state_dict)}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
    return path


def write_openvino(args: argparse.Namespace, int8: bool) -> Path:
    """OpenVINO's IR of the same UNet; int8 as nncf's post-training quantization makes it for transformers."""
    ov = text2images.import_openvino()
    path = args.work_dir / ("openvino int8.xml" if int8 else "openvino.xml")
    if path.is_file():
        return path
    if int8:
        import nncf

        model = text2images.openvino_core().read_model(write_openvino(args, int8=False))
        config = UNet2DConditionModel.load_config(write_unet(args))
        inputs = [tensor.numpy() for tensor in example(args, config, torch.float32)]
        model = nncf.quantize(
            model,
            nncf.Dataset([inputs]),
            subset_size=1,
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    else:
        unet = load_fp32(args)
        unet.forward = lambda *inputs, forward=unet.forward: forward(*inputs, return_dict=False)[0]
        with torch.no_grad():
            model = ov.convert_model(unet, example_input=example(args, unet.config, torch.float32))
    ov.save_model(model, path, compress_to_fp16=True)
    return path


# ---------------------------------------------------------------- the variants


def diffusers_step(args: argparse.Namespace, dtype: torch.dtype) -> Step:
    unet = load_fp32(args, dtype).to(memory_format=torch.channels_last)
    inputs = example(args, unet.config, dtype)
    return lambda: unet(*inputs, return_dict=False)


def our_step(args: argparse.Namespace, *flags: str, longest: float = text2images.LONG_ATTENTION) -> Step:
    """As text2images.py runs it: compiled for this very shape; `longest`: from where on attention is by its kernels."""
    file = write_ours(args)
    given = text2images.parse_args(["-m", "given", "-c", "given", "-qm", str(file), *flags])
    unet = text2images.OpenVINOUNet(text2images.read_quant_model(file), given, {"PERF_COUNT": args.profile})
    inputs = example(args, unet.config, torch.float32)

    def step() -> Any:
        with unittest.mock.patch.object(text2images, "LONG_ATTENTION", longest):
            unet(*inputs)
        return unet.compiled[-1]

    return step


def original_step(args: argparse.Namespace) -> Step:
    """As Intel's example ran it: every Linear and Conv2d a torch.ao module between quantize and dequantize."""
    from torch.ao import quantization as ao

    torch.backends.quantized.engine = "onednn"
    unet = load_fp32(args)
    qconfig = ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.quint8), ao.default_per_channel_weight_observer)
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            parent, _, child = name.rpartition(".")
            layer.qconfig = qconfig
            setattr(unet.get_submodule(parent), child, ao.QuantWrapper(layer))
    inputs = example(args, unet.config, torch.float32)
    ao.prepare(unet, inplace=True)
    unet(*inputs)
    ao.convert(unet, inplace=True)
    return lambda: unet(*inputs, return_dict=False)


def openvino_step(args: argparse.Namespace, int8: bool, dtype: str = "bfloat16") -> Step:
    """Compiled for this very shape, with the settings that ours has."""
    config = UNet2DConditionModel.load_config(write_unet(args))
    inputs = [tensor.numpy() for tensor in example(args, config, torch.float32)]
    model = text2images.openvino_core().read_model(write_openvino(args, int8))
    model.reshape({number: list(array.shape) for number, array in enumerate(inputs)})
    given = text2images.parse_args(["-m", "given", "-c", "given", "-qm", "given", "--dtype", dtype])
    settings = text2images.openvino_settings(given) | {"PERF_COUNT": args.profile}
    request = text2images.openvino_core().compile_model(model, "CPU", settings).create_infer_request()

    def step() -> Any:
        request.infer(inputs)
        return request

    return step


VARIANTS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "diffusers fp32": lambda args: diffusers_step(args, torch.float32),
    "diffusers bf16": lambda args: diffusers_step(args, torch.bfloat16),
    "int8": our_step,
    "int8 --no_paired_guidance": lambda args: our_step(args, "--no_paired_guidance"),
    "int8 --dtype float32": lambda args: our_step(args, "--dtype", "float32"),
    "int8 as exported": lambda args: our_step(args, longest=math.inf),  # without kernels, as where there is no compiler
    "original recipe": original_step,
    "openvino bf16": lambda args: openvino_step(args, int8=False),
    "openvino int8": lambda args: openvino_step(args, int8=True),
    "openvino int8, fp32 elsewhere": lambda args: openvino_step(args, int8=True, dtype="float32"),
}


def available(name: str) -> bool:
    return not name.startswith("openvino") or all(map(importlib.util.find_spec, ("openvino", "nncf")))


# ---------------------------------------------------------------- measuring


def alone(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a process that runs the variant once, and how long its first step takes."""
    command = [sys.executable, __file__, "--alone", name, "--shape", "{}x{}".format(*args.shape)]
    command += ["--work_dir", str(args.work_dir), *(["--model", str(args.model)] if args.model is not None else [])]
    command += ["--profile"] * args.profile  # which is part of what a model is compiled with, and so kept under
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_alone(name: str, args: argparse.Namespace) -> None:
    step = VARIANTS[name](args)
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    row = {"peak_gib": round(peak_gib(), 2), "first_seconds": round(seconds, 2), "file_mb": file_mb(name, args)}
    print(json.dumps(row))


def file_mb(name: str, args: argparse.Namespace) -> float | None:
    """Size of the weights on disk; bf16's would be half of fp32's, from which diffusers converts them."""
    if name == "original recipe":
        return None  # it wrote none that can be loaded
    if name.startswith("diffusers"):
        size = sum(path.stat().st_size for path in write_unet(args).glob("*.safetensors"))
        return round(size / (2e6 if "bf16" in name else 1e6), 1)
    path = write_ours(args) if name.startswith("int8") else write_openvino(args, "int8" in name).with_suffix(".bin")
    return round(path.stat().st_size / 1e6, 1)


def profile(name: str, step: Step, top: int = 12) -> list[dict[str, Any]]:
    """The operators that one step's time goes to, longest first."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    if name.startswith(("openvino", "int8")):
        for node in step().profiling_info:
            operator = f"{node.node_type} ({node.exec_type})"
            seconds[operator] += node.real_time.total_seconds()
            calls[operator] += 1
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        for event in profiler.key_averages():
            seconds[event.key] += event.self_cpu_time_total / 1e6
            calls[event.key] += event.count
    return [
        {"operator": operator, "calls": calls[operator], "seconds": round(took, 4)}
        for operator, took in seconds.most_common(top)
    ]


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The rows of the table, and the profile of each variant where it is asked for."""
    steps = {name: VARIANTS[name](args) for name in args.variants}
    seconds = interleaved(steps, args.rounds)
    profiles = {name: profile(name, step) for name, step in steps.items()} if args.profile else {}
    steps.clear()
    rows = []
    for name, times in seconds.items():
        wall, cpu = ([one[clock] for one in times] for clock in (0, 1))
        row = {"name": name, "batch": args.shape[0], "latents": args.shape[1], "seconds": statistics.median(wall)}
        row |= {"spread": spread(wall), "cpu_seconds": statistics.median(cpu)}
        for clock in ("", "cpu_"):
            fp32 = rows[0] if rows else row
            row[f"{clock}ratio_to_fp32"] = row[f"{clock}seconds"] / fp32[f"{clock}seconds"]
        rows.append(row | alone(name, args))
    rows = [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return rows, profiles


# ---------------------------------------------------------------- the flow


def shape(text: str) -> tuple[int, int]:
    batch, edge = map(int, text.split("x"))
    return batch, edge


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="folder of a UNet (config.json and weights) in place of a random SD v1.5")
    text = "batch and edge of the latents: 2x64 is a guidance step at 512 pixels; 2x96 and 8x64 are worth a look"
    add("--shape", type=shape, default=(2, 64), metavar="2x64", help=text)
    add("--rounds", type=int, default=5, help="timed steps of each variant, after one that warms up")
    add("--variants", nargs="+", choices=VARIANTS, help="by default all that are installed; fp32 is always among them")
    add("--profile", action="store_true", help="also name the operators that the time goes to")
    add(
        "--work_dir", type=Path, default=ROOT / "demo/output/unet_step", help="gets the models, 8 GB; kept between runs"
    )
    add("--output", type=Path, help="the JSON to write")
    add("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.shape[0] % 2:
        parser.error("--shape: a step with guidance has two samples for each image: give an even batch")
    missing = [name for name in args.variants or [] if not available(name)]
    if missing:
        parser.error(f"--variants {missing[0]}: pip install -r requirements-bench.txt first")
    args.variants = [name for name in VARIANTS if name in (args.variants or VARIANTS) and available(name)]
    args.variants = list(dict.fromkeys(["diffusers fp32", *args.variants]))
    return args


def print_tables(rows: list[dict[str, Any]], profiles: dict[str, list[dict[str, Any]]]) -> None:
    print(
        "\n| batch x latents | UNet | s / step | spread | to fp32 | CPU s | to fp32 | peak GiB |\n" + "|---" * 8 + "|"
    )
    for row in rows:
        print(
            f"| {row['batch']} x {row['latents']}² | {row['name']} | {row['seconds']:.3f} | {row['spread']:.0%} | "
            f"{row['ratio_to_fp32']:.3f} | {row['cpu_seconds']:.3f} | {row['cpu_ratio_to_fp32']:.3f} | "
            f"{row['peak_gib']:.2f} |"
        )
    for name, operators in profiles.items():
        print(f"\n{name}:")
        for line in operators:
            print(f"{line['seconds']:9.3f} s  {line['calls']:5d} x {line['operator']}")


@torch.no_grad()
def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.alone is not None:
        return run_alone(args.alone, args)
    rows, profiles = measure(args)
    print_tables(rows, profiles)
    if args.output is None:
        return
    kept = kept_rows(args.output, {"batch": args.shape[0], "latents": args.shape[1]})
    write_json({"rows": kept + rows, "profiles": profiles}, args.output)


if __name__ == "__main__":
    main()
