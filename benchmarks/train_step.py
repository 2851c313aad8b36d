#!/usr/bin/env python
"""One optimizer step of the trainer: what fake quantization and the teacher add to a plain fine-tune.

The UNet is SD v1.5's with random weights (or --unet), the latents those of 512 px. All variants share one
set of master weights and run by turns; each part is the median of its rounds. Clipping, optimizer and EMA
are the same code on the same tensors for all of them, so they are timed by themselves, once for all.
Peak memory is that of a process that does nothing but the variant's step. "seconds" is the median, "spread"
(max - min) / median, the ratios are medians of the rounds' ratios. Rows of other settings in the output
file stay there.

    python benchmarks/train_step.py --gradient_checkpointing --output benchmarks/results/train_step.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in the trainer, which is imported after torch

import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.ao.quantization import default_fake_quant, default_per_channel_weight_fake_quant
from transformers import CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import full_size  # noqa: E402
import timing  # noqa: E402
import train_text_to_image_qat as trainer  # noqa: E402
from output import kept_rows, write_json  # noqa: E402

PARTS = ("student_forward", "teacher", "backward")
PLAIN, BASE, EAGER, OURS, ORIGINAL = (
    "plain fine-tune",
    "fine-tune + teacher",
    "ours, QAT + KD, eager",
    "ours, QAT + KD",
    "original recipe's modules + KD, fp32",
)
ENCODING = "encoding of images and captions, which --cache_latents saves"
VARIANTS = [PLAIN, BASE, EAGER, OURS, ORIGINAL]


@dataclass
class Cpu:
    """What the trainer asks of an Accelerator here."""

    mixed_precision: str
    device: torch.device = torch.device("cpu")
    num_processes: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision == "bf16")


@dataclass
class Variant:
    name: str
    student: UNet2DConditionModel
    teacher: UNet2DConditionModel | None
    cpu: Cpu

    def forward_backward(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """Seconds of each part of one step; leaves gradients behind."""
        output, marks = torch.zeros_like(inputs[0]), [time.perf_counter()]
        if self.teacher is not None:
            with torch.no_grad(), self.cpu.autocast():
                output = self.teacher(*inputs).sample.float()
        marks.append(time.perf_counter())
        with self.cpu.autocast():
            loss = F.mse_loss(self.student(*inputs).sample.float(), output)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        seconds = [after - before for before, after in zip(marks, marks[1:])]
        return dict(zip(("teacher", "student_forward", "backward"), seconds))


class PublishedLayer(nn.Module):
    """A Linear or Conv2d as the original recipe's neural-compressor 2.x trains it.

    Input, weight and output are fake-quantized, by ranges that move with every forward pass.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.input, self.output = (default_fake_quant(reduce_range=False) for _ in range(2))
        self.quantized_weight = default_per_channel_weight_fake_quant()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = self.input(x.float()), self.quantized_weight(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            return self.output(self.layer._conv_forward(x, weight, self.layer.bias).float())
        return self.output(F.linear(x, weight, self.layer.bias).float())


def publish(unet: nn.Module) -> None:
    """Make every Linear and Conv2d a PublishedLayer."""
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            unet.set_submodule(name, PublishedLayer(layer))


def load_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    if args.unet is not None:
        return UNet2DConditionModel.from_pretrained(args.unet)
    torch.manual_seed(0)
    return UNet2DConditionModel(**full_size.SD15_UNET, layers_per_block=args.layers_per_block)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Modules of its own over the same parameters."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(keep_vars=True), assign=True)
    return other.train()


def make_inputs(unet: UNet2DConditionModel, batch: int, edge: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(batch, unet.config.in_channels, edge, edge, generator=generator)
    hidden_states = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    return noisy_latents, torch.full((batch,), 500), hidden_states


def make_variants(names: list[str], args: argparse.Namespace, own_teacher: bool) -> list[Variant]:
    """The variants over shared master weights; fp32 teachers share these too, unless memory is what is measured."""
    cpu, unet, teacher = Cpu(args.mixed_precision), load_unet(args), None
    if set(names) & {BASE, EAGER, OURS}:
        teacher, unet = trainer.make_teacher_and_student(unet, cpu)
    unet = unet.train().to(memory_format=torch.channels_last)
    variants = []
    for name in names:
        variant = Variant(name, twin(unet), None if name == PLAIN else teacher, cpu)
        if name in (OURS, EAGER):
            variant.student = quantized(variant.student, cpu, may_compile=name == OURS)
        if name == ORIGINAL:
            publish(variant.student)
            with torch.no_grad():  # its observers have no sizes before
                variant.student(*make_inputs(unet, 1, 16))
            variant.teacher = copy.deepcopy(unet).requires_grad_(False) if own_teacher else twin(unet)
            variant.cpu = Cpu("no")
        if args.gradient_checkpointing:
            variant.student.enable_gradient_checkpointing()
        variants.append(variant)
    return variants


def quantized(student: UNet2DConditionModel, cpu: Cpu, may_compile: bool) -> nn.Module:
    """The default recipe, with ranges from a single pass; smoothing scales, which do not change the time, stay 1."""
    student = trainer.prepare(student, trainer.quantization_config(trainer_flags(), student))
    trainer.set_mode(student, "observe")
    with torch.no_grad(), cpu.autocast():
        student(*make_inputs(student, 1, 16))
    for quantizer in trainer.activation_quantizers(student):
        quantizer.compute_qparams()
    compiled = may_compile and trainer.compile_fake_quantization(student, cpu)  # not for small UNets
    trainer.set_mode(student, "quantize", compiled)
    return student.train()


def trainer_flags() -> argparse.Namespace:
    return trainer.parse_args(["--pretrained_model_name_or_path", "-", "--dataset_name", "-", "--use_ema"])


class Update:
    """Clipping, AdamW and EMA, as the trainer has them."""

    def __init__(self, student: UNet2DConditionModel, args: argparse.Namespace) -> None:
        self.trainer = trainer.create_train_state(student, 1000, Cpu(args.mixed_precision), trainer_flags())

    def __call__(self) -> float:
        began = time.perf_counter()
        nn.utils.clip_grad_norm_(self.trainer.student.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.update_average()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - began


def peak_gib(name: str, flags: list[str]) -> float | None:
    """Of a process of its own; None if it needs more memory than it may have."""
    command = [sys.executable, __file__, *flags, "--peak_of", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace) -> None:
    allowed = int(args.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))  # fails here, before the system runs out of it
    try:
        (variant,) = make_variants([args.peak_of], args, own_teacher=True)
        update = Update(variant.student, args)
        for batch, edge in ((1, 16), (args.batch_size, args.edge)):  # a small step first: the optimizer's state
            variant.forward_backward(make_inputs(variant.student, batch, edge))
            update()
        print(round(timing.peak_gib(), 2))
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        print("null")


def timed(names: list[str], args: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Seconds of the parts of each round, by variant; and of each update."""
    variants = make_variants(names, args, own_teacher=False)
    inputs = make_inputs(variants[0].student, args.batch_size, args.edge)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.warmup + args.rounds):
        for variant in variants:
            seconds = variant.forward_backward(inputs)
            if number >= args.warmup:
                rounds[variant.name].append(seconds)
            if number < args.warmup + args.rounds - 1 or variant is not variants[-1]:
                variant.student.zero_grad()
            print(f"{variant.name}: {sum(seconds.values()):.2f} s", file=sys.stderr)
    student, gradients = variants[-1].student, [parameter.grad for parameter in variants[-1].student.parameters()]
    del variants
    gc.collect()
    update, updates = Update(student, args), []
    for number in range(args.warmup + args.rounds):
        for parameter, gradient in zip(student.parameters(), gradients):
            parameter.grad = gradient
        seconds = update()
        updates += [seconds] * (number >= args.warmup)
    return rounds, updates


def encoding(args: argparse.Namespace) -> list[float]:
    """Seconds in which VAE and text encoder encode a step's images and captions; bf16 autocast, as in training."""
    if args.unet is not None:
        vae = AutoencoderKL.from_pretrained(args.unet.parent, subfolder="vae")
        text_encoder = CLIPTextModel.from_pretrained(args.unet.parent, subfolder="text_encoder")
    else:
        vae, text_encoder = full_size.vae(), CLIPTextModel(full_size.text_config())
    vae.to(memory_format=torch.channels_last)
    pipeline = argparse.Namespace(vae=vae, parts={"text_encoder": text_encoder, "vae": vae})
    edge, words = 8 * args.edge, torch.randint(text_encoder.config.vocab_size, (args.batch_size, 1, 77))
    batch, seconds = {"pixel_values": torch.rand(args.batch_size, 3, edge, edge), "input_ids": words}, []
    for number in range(args.warmup + args.rounds):
        began = time.perf_counter()
        with torch.no_grad(), Cpu(args.mixed_precision).autocast():
            trainer.encode(pipeline, batch, torch.device("cpu"))
        seconds += [time.perf_counter() - began] * (number >= args.warmup)
    return seconds


def make_rows(rounds: dict, updates: list[float], setting: dict) -> list[dict]:
    update = statistics.median(updates)
    totals = {name: [sum(parts.values()) + update for parts in each] for name, each in rounds.items()}
    rows = []
    for name, seconds in totals.items():
        median = statistics.median(seconds)
        row = {"name": name, **setting, "seconds": round(median, 3)}
        row["spread"] = round(timing.spread(seconds), 3)
        for other, key in (
            (PLAIN, "ratio_to_plain"),
            (BASE, "ratio_to_plain_and_teacher"),
            (ORIGINAL, "ratio_to_original"),
        ):
            if other in totals:
                row[key] = round(timing.ratio(seconds, totals[other]), 3)
        for part in PARTS:
            row[part] = round(statistics.median(parts[part] for parts in rounds[name]), 3)
        rows.append({**row, "optimizer_and_ema": round(update, 3)})
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--unet", type=Path, help="folder of a UNet; without it SD v1.5's, with random weights")
    add("--layers_per_block", type=int, default=2, help="of SD v1.5's; 1: the same shapes in less memory and time")
    add("--batch_size", type=int, default=1, help="images of a step")
    add("--edge", type=int, default=64, help="edge of the latents: an eighth of the image's")
    add("--gradient_checkpointing", action="store_true", help="as the trainer's flag")
    add("--mixed_precision", choices=["no", "bf16"], default="bf16", help="of all but the original")
    add("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    add("--measure", choices=["time", "memory", "both"], default="both", help="the other is kept as the file has it")
    add("--rounds", type=int, default=5, help="measured steps of each variant")
    add("--warmup", type=int, default=1, help="steps of each before these")
    available = round(psutil.virtual_memory().available / 2**30 * 0.97, 1)
    add("--memory_gib", type=float, default=available, help="what a process may take; by default nearly all there is")
    add("--output", type=Path, required=True, help="the JSON file to write")
    add("--peak_of", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.peak_of:
        print_peak(args)
        return
    model = args.unet.name if args.unet else f"SD v1.5, {args.layers_per_block} layers per block"
    setting = {"unet": model, "batch": args.batch_size, "latents": args.edge}
    setting |= {"checkpointing": args.gradient_checkpointing, "mixed_precision": args.mixed_precision}
    others = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.is_file() else []
    earlier = {row["name"]: row for row in others if setting.items() <= row.items()}
    names, peaks = args.variants, {}
    if args.measure != "time":
        peaks = {name: peak_gib(name, list(sys.argv[1:] if argv is None else argv)) for name in names}
        names = [name for name in names if peaks[name] is not None]
    rows = list(earlier.values())
    if args.measure != "memory":
        rows = make_rows(*timed(names, args), setting)
        seconds = encoding(args)
        row = {"seconds": round(statistics.median(seconds), 3), "spread": round(timing.spread(seconds), 3)}
        rows.append({"name": ENCODING, **setting, **row})
    for row in rows:
        row["peak_gib"] = peaks.get(row["name"], earlier.get(row["name"], {}).get("peak_gib"))
    for row in rows:
        print(json.dumps(row))
    write_json({"rows": kept_rows(args.output, setting) + rows}, args.output)


if __name__ == "__main__":
    main()
