#!/usr/bin/env python
"""Which layers err: the error at the UNet's output that each layer causes when it alone is int8.

The full-precision model generates captions of demo/captions.txt. At some denoising steps one layer after the
other is fake-quantized as train_text_to_image_qat.py does it before its first step: in full, its input
only, and its weights only. Errors are squared and relative to the output's square, of both branches of
guidance ("output") and of what guidance makes of them ("guided"), which is what the next step gets and
what the list is sorted by. Writes the list as JSON and, beside it, as a chart.

    python benchmarks/sensitivity.py --output benchmarks/results/sensitivity.json

--float_budget 5 also writes a configuration for the trainer's --quantization_config: the layers that err most
for their arithmetic compute in float, up to 5 percent of all multiply-accumulates.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_text_to_image_qat as trainer  # noqa: E402
from output import replace, write_json  # noqa: E402

KINDS = {("int8", "uint8"): "int8", ("int8", "fp32"): "int8 weights", ("fp32", "fp32"): "float"}
INNOCENT = 0.1  # a layer in float keeps its weights in int8 where they cause less than this share of its error
SHOWN = 40  # layers in the chart; the others share one bar
COLOURS = {"input": "#d95f02", "weights": "#4477aa"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=str(ROOT / "demo/tiny-stable-diffusion"))
    add("--train_data_dir", type=Path, default=ROOT / "demo/scenes", help="whose images calibrate; made by make demo")
    add("--captions_file", type=Path, default=ROOT / "demo/captions.txt", help="captions to generate")
    add("--resolution", type=int, default=64, help="edge of the images in pixels")
    add("--images_num", type=int, default=4, help="images, each of another caption [%(default)s]")
    add("--timesteps", type=int, default=10, help="steps of each that are looked at [%(default)s]")
    add("--num_inference_steps", type=int, default=50, help="steps that an image takes [%(default)s]")
    add("--guidance_scale", type=float, default=7.5, help="[%(default)s]")
    text = "percent of the multiply-accumulates to compute in float: also write the recipe OUTPUT_float_P.json"
    add("--float_budget", type=float, metavar="P", help=text)
    add("--output", type=Path, required=True, help="the JSON to write; the chart gets the same name")
    args = parser.parse_args(argv)
    if not (args.train_data_dir / "metadata.jsonl").is_file():
        parser.error(
            f"--train_data_dir {args.train_data_dir} has no metadata.jsonl: run make demo, or create_metadata.py"
        )
    if min(args.images_num, args.timesteps) < 1 or args.timesteps > args.num_inference_steps:
        parser.error("--images_num and --timesteps must be at least 1, --timesteps at most --num_inference_steps")
    if args.float_budget is not None and not 0 < args.float_budget < 100:
        parser.error("--float_budget is a percentage: give a number between 0 and 100")
    return args


# ---------------------------------------------------------------- what the UNet is run on


@torch.no_grad()
def trajectory(pipeline: trainer.Pipeline, args: argparse.Namespace) -> list[tuple[torch.Tensor, ...]]:
    """(noisy_latents [2B, 4, H/8, W/8], timestep, encoder_hidden_states [2B, 77, D]) at evenly spread steps."""
    captions = [line for line in args.captions_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    captions = [captions[number * len(captions) // args.images_num] for number in range(args.images_num)]
    (tokenizer,), (text_encoder,) = pipeline.tokenizers, trainer.text_encoders(pipeline.parts)
    words = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    input_ids = tokenizer([""] * args.images_num + captions, return_tensors="pt", **words).input_ids
    encoder_hidden_states = text_encoder(input_ids)[0]
    scheduler = DDIMScheduler.from_config(pipeline.noise_scheduler.config)
    scheduler.set_timesteps(args.num_inference_steps)
    edge = args.resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    shape = (args.images_num, pipeline.unet.config.in_channels, edge, edge)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    chosen = {int((number + 0.5) * args.num_inference_steps / args.timesteps) for number in range(args.timesteps)}
    inputs = []
    for step, timestep in enumerate(scheduler.timesteps):
        noisy_latents = torch.cat([latents] * 2)
        if step in chosen:
            inputs.append((noisy_latents, timestep, encoder_hidden_states))
        output = pipeline.unet(noisy_latents, timestep, encoder_hidden_states).sample
        latents = scheduler.step(guided(output, args.guidance_scale), timestep, latents).prev_sample
    return inputs


def guided(output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """[2B, ...] -> [B, ...]"""
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def relative_errors(output: torch.Tensor, expected: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Squared error over square, [output, guided]: guidance cancels what both branches have in common."""
    ends = [(output, expected), tuple(guided(end, guidance_scale) for end in (output, expected))]
    return torch.stack([(ours - theirs).square().sum() / theirs.square().sum() for ours, theirs in ends])


class Replay:
    """A UNet that runs on one input again and again, each time with another layer changed.

    Blocks that come before that layer give what they gave the first time, and need not be computed.
    """

    def __init__(self, unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]) -> None:
        self.unet, self.inputs = unet, inputs
        self.done: list[tuple[nn.Module, torch.Tensor]] = []  # blocks and their outputs, as they ran
        self.before: dict[str, int] = {}  # how many blocks had run before a layer did
        self.macs: dict[str, int] = {}
        hooks = []
        for name, module in unet.named_modules():
            if isinstance(module, (ResnetBlock2D, Transformer2DModel)):
                hooks.append(module.register_forward_hook(lambda block, _, output: self.done.append((block, output))))
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                hooks.append(module.register_forward_hook(lambda layer, _, y, name=name: self.note(name, layer, y)))
        self.output = unet(*inputs).sample
        for hook in hooks:
            hook.remove()

    def note(self, name: str, layer: nn.Module, output: torch.Tensor) -> None:
        self.before[name] = len(self.done)
        self.macs[name] = output.numel() * layer.weight[0].numel()

    def changed(self, name: str, layer: nn.Module) -> torch.Tensor:
        """The output with `layer` in the place of `name`."""
        original, skipped = self.unet.get_submodule(name), self.done[: self.before[name]]
        self.unet.set_submodule(name, layer)
        for block, output in skipped:
            block.forward = lambda *_, output=output, **__: output
        changed = self.unet(*self.inputs).sample
        for block, _ in skipped:
            del block.forward
        self.unet.set_submodule(name, original)
        return changed


# ---------------------------------------------------------------- measuring


class InputOnly(nn.Module):
    """A fake-int8 layer whose weights stay floats."""

    def __init__(self, fake: trainer.FakeInt8Linear | trainer.FakeInt8Conv2d) -> None:
        super().__init__()
        self.fake = fake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = self.fake.observer(x), self.fake.weight, self.fake.bias
        return F.linear(*inputs) if isinstance(self.fake, nn.Linear) else self.fake._conv_forward(*inputs)


def kinds(config: trainer.Int8Config, unet: nn.Module) -> dict[str, str]:
    """What `config` makes of every layer."""
    mapping = config.to_config_mapping(model_info=config.get_model_info(unet))
    return {name: KINDS[layer.w_dtype, layer.act_dtype] for (name, _), layer in mapping.items()}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    """Totals, and one row a layer, the worst one first."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    flags = {key: getattr(args, key) for key in ("pretrained_model_name_or_path", "train_data_dir", "resolution")}
    settings = trainer.parse_args([f"--{key}={value}" for key, value in flags.items()])
    pipeline = trainer.load_pipeline(settings, accelerator)
    dataset = trainer.load_dataset(settings, pipeline.tokenizers)
    unet = pipeline.unet.to(memory_format=torch.channels_last).eval()
    recipe = trainer.quantization_config(settings, unet)
    students = {}
    for key, config in {"int8": trainer.Int8Config(), "weights": trainer.WEIGHT_ONLY, "default": recipe}.items():
        students[key] = trainer.prepare(copy.deepcopy(unet), config)
        trainer.calibrate(students[key], pipeline, dataset, accelerator, settings)
        trainer.set_mode(students[key], "quantize")
    layers = kinds(recipe, unet)
    errors = {name: {key: torch.zeros(2) for key in ("int8", "input", "weights")} for name in layers}
    totals = {key: torch.zeros(2) for key in students}
    inputs = trajectory(pipeline, args)
    for batch in tqdm(inputs, desc="timesteps"):
        replay = Replay(unet, batch)
        for key, student in students.items():
            totals[key] += relative_errors(student(*batch).sample, replay.output, args.guidance_scale)
        for name, sums in errors.items():
            int8, weights = (students[key].get_submodule(name) for key in ("int8", "weights"))
            for key, layer in {"int8": int8, "input": InputOnly(int8), "weights": weights}.items():
                sums[key] += relative_errors(replay.changed(name, layer), replay.output, args.guidance_scale)

    def means(sums: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        return {key: dict(zip(("output", "guided"), (total / len(inputs)).tolist())) for key, total in sums.items()}

    macs = sum(replay.macs.values())
    rows = [
        {"layer": name, "default": layers[name], "macs_percent": 100 * replay.macs[name] / macs, **means(sums)}
        for name, sums in errors.items()
    ]
    rows.sort(key=lambda row: -row["int8"]["guided"])
    keys = ("images_num", "timesteps", "num_inference_steps", "guidance_scale", "resolution")
    model = Path(args.pretrained_model_name_or_path).name
    return {"model": model, **{key: getattr(args, key) for key in keys}, "all_layers": means(totals), "layers": rows}


def spend(rows: list[dict], percent: float) -> trainer.Int8Config:
    """The layers that err most for their arithmetic in float, as long as they fit into the budget."""
    config, left = trainer.Int8Config(), percent
    for row in sorted(rows, key=lambda row: -row["int8"]["guided"] / row["macs_percent"]):
        if row["macs_percent"] <= left:
            left -= row["macs_percent"]
            innocent = row["weights"]["guided"] < INNOCENT * row["int8"]["guided"]
            config.set_local(re.escape(row["layer"]) + "$", trainer.WEIGHT_ONLY if innocent else trainer.KEEP_FLOAT)
    return config


# ---------------------------------------------------------------- showing


def print_table(report: dict) -> None:
    total = sum(row["int8"]["guided"] for row in report["layers"])
    print("\n| layer | by default | MACs, % | int8 alone, guided | input only | weights only | % of the sum |")
    print("|---|---|---|---|---|---|---|")
    for row in report["layers"][:SHOWN]:
        errors = " | ".join(f"{row[key]['guided']:.2e}" for key in ("int8", "input", "weights"))
        share = 100 * row["int8"]["guided"] / total
        print(f"| {row['layer']} | {row['default']} | {row['macs_percent']:.2f} | {errors} | {share:.1f} |")
    together = ", ".join(f"{key} {errors['guided']:.2e}" for key, errors in report["all_layers"].items())
    print(f"\nsum of all {len(report['layers'])}: {total:.2e}; all layers at once: {together}")


def chart(report: dict) -> Image.Image:
    """The worst layers as bars, each divided into what its input and what its weights cause."""
    rows = report["layers"]
    total = sum(row["int8"]["guided"] for row in rows)
    bars = [(row["layer"], row["default"], row["macs_percent"], [row]) for row in rows[:SHOWN]]
    if rest := rows[SHOWN:]:
        bars.append((f"{len(rest)} others together", "", sum(row["macs_percent"] for row in rest), rest))
    longest = max(sum(row["int8"]["guided"] for row in group) for *_, group in bars)
    sheet = Image.new("RGB", (1180, 84 + 20 * len(bars)), "white")
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(16)
    title = (
        f"Error of the guided UNet output of {report['model']} when one layer alone is int8, in % of all layers' sum"
    )
    draw.text((12, 10), title, "black", bold)
    for left, text in ((12, "layer"), (430, "default"), (520, "MACs"), (580, "error caused by its")):
        draw.text((left, 48), text, "#666666", font)
    for left, key in ((700, "input"), (770, "weights")):
        draw.rectangle((left, 50, left + 12, 62), COLOURS[key])
        draw.text((left + 18, 48), key, "black", font)
    for number, (name, kind, macs, group) in enumerate(bars):
        top = 74 + 20 * number
        error, by_input, by_weights = (sum(row[key]["guided"] for row in group) for key in ("int8", "input", "weights"))
        for left, text in ((12, name), (430, kind), (520, f"{macs:.2f} %")):
            draw.text((left, top), text, "black", font)
        end = 580 + 520 * error / longest
        middle = 580 + (end - 580) * by_input / (by_input + by_weights)
        draw.rectangle((580, top + 1, end, top + 15), COLOURS["input"])
        if end - middle >= 1:
            draw.rectangle((middle, top + 1, end, top + 15), COLOURS["weights"])
        draw.text((end + 6, top), f"{100 * error / total:.1f}", "black", font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report = measure(args)
    print_table(report)
    image = args.output.with_suffix(".png")
    write_json(report, args.output)
    files = [args.output, image]
    if args.float_budget is not None:
        recipe = args.output.with_name(f"{args.output.stem}_float_{args.float_budget:g}.json")
        replace(recipe, spend(report["layers"], args.float_budget).to_dict())
        files.insert(1, recipe)
        print(f"next: python train_text_to_image_qat.py --quantization_config {recipe} ...")
    partial = image.with_name(image.name + ".partial")
    chart(report).save(partial, format="PNG", optimize=True)
    os.replace(partial, image)
    print(*files, sep=", ")


if __name__ == "__main__":
    try:
        main()
    except trainer.UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
