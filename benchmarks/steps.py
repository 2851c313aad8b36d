#!/usr/bin/env python
"""Which denoising steps err: the error of the final latents when only some of the steps run in int8.

The other steps run in fp32. Errors are squared, relative to the variance of the latents, and medians over the seeds:
for a few seeds the smallest change decides between two images. All steps come first, then all steps with int8 weights
only, then the groups. Writes the list as JSON.

    python benchmarks/steps.py -qm demo/output/sdv1-5-qat_kd --output benchmarks/results/steps.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import text2images as painter  # noqa: E402
from output import write_json  # noqa: E402

BATCH = 16  # images generated at once


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--pretrained_model_name_or_path", default=str(ROOT / "demo/tiny-stable-diffusion"))
    add("-qm", "--quantized_model_name_or_path", required=True, help="quant_model.pt, or the folder it is in")
    add("--captions_file", type=Path, default=ROOT / "demo/captions.txt", help="captions to generate")
    add("--starts", type=int, default=32, help="images, each of another caption [%(default)s]")
    add("--num_inference_steps", type=int, default=50, help="denoising steps [%(default)s]")
    add("--guidance_scale", type=float, default=3.0, help="[%(default)s]")
    groups = [0, 1, 2, 5, 10, 20, 30, 40, 45, 48, 49]
    add("--groups", type=int, nargs="+", default=groups, help="first step of each group, from 0 [%(default)s]")
    add("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.groups != sorted(set(args.groups)) or not 0 <= args.groups[0] <= args.groups[-1] < args.num_inference_steps:
        parser.error("--groups must ascend from 0 or more to less than --num_inference_steps")
    if args.starts < 1:
        parser.error("--starts must be at least 1")
    return args


def painter_settings(args: argparse.Namespace, *int8: str) -> argparse.Namespace:
    flags = ["-m", args.pretrained_model_name_or_path, "--captions_file", str(args.captions_file), "--dtype=float32"]
    flags += ["--num_inference_steps", str(args.num_inference_steps), "--guidance_scale", str(args.guidance_scale)]
    settings = painter.parse_args([*flags, *int8])
    settings.captions = settings.captions[: args.starts]
    return settings


@torch.no_grad()
def final_latents(
    pipeline: painter.StableDiffusionPipeline,
    unets: list[torch.nn.Module],
    int8_steps: range,
    settings: argparse.Namespace,
) -> torch.Tensor:
    """Final latents [N, 4, H/8, W/8]. unets: the fp32 one, and the int8 one, which runs the `int8_steps`."""

    def switch(pipeline: painter.StableDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipeline.unet = unets[step + 1 in int8_steps]
        return tensors

    height, width = painter.image_size(pipeline, settings)
    finished = []
    for first in range(0, len(settings.captions), BATCH):
        captions = settings.captions[first : first + BATCH]
        requests = [painter.ImageRequest(caption, settings.seed) for caption in captions]
        pipeline.unet = unets[0 in int8_steps]
        painted = pipeline(
            captions,
            height=height,
            width=width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=painter.initial_latents(pipeline, requests, height, width),
            output_type="latent",
            callback_on_step_end=switch,
        )
        finished.append(painted.images)
    return torch.cat(finished)


def measure(args: argparse.Namespace, settings: argparse.Namespace) -> list[dict]:
    """One row for all steps, one for all of them with int8 weights only, one for each group."""
    pipeline = painter.load_pipeline(settings)
    pipeline.set_progress_bar_config(disable=True)
    quantized = painter_settings(args, "-qm", args.quantized_model_name_or_path)
    unets = [pipeline.unet, painter.load_pipeline(quantized).unet]
    float_inputs = painter.load_pipeline(quantized).unet
    float_inputs.quantize_inputs = False
    every, ends = range(args.num_inference_steps), [*args.groups[1:], args.num_inference_steps]
    groups = [(range(*group), False) for group in zip(args.groups, ends)]
    expected = final_latents(pipeline, unets, range(0), settings)
    rows = []
    for steps, weights_alone in [(every, False), (every, True), *groups]:
        these = [unets[0], float_inputs] if weights_alone else unets
        errors = (final_latents(pipeline, these, steps, settings) - expected).square().flatten(1).mean(dim=1)
        error = (errors / expected.var()).median().item()
        rows.append({"first": steps.start, "last": steps.stop - 1, "weights_alone": weights_alone, "error": error})
        rows[-1]["percent"] = 100 * error / rows[0]["error"]
        what = "all, int8 weights only" if weights_alone else f"{steps.start + 1} to {steps.stop}"
        print(f"| {what} | {error:.2e} | {rows[-1]['percent']:.0f} |", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = painter_settings(args)
    model, starts = Path(args.pretrained_model_name_or_path).name, len(settings.captions)  # there may be fewer captions
    report = {"model": model, "starts": starts, "num_inference_steps": args.num_inference_steps}
    report["guidance_scale"] = args.guidance_scale
    print("| int8 steps | error | % |\n|---|---|---|")
    write_json({**report, "rows": measure(args, settings)}, args.output)


if __name__ == "__main__":
    try:
        main()
    except painter.UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
