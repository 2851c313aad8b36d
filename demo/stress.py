#!/usr/bin/env python
"""Write a variant of a Stable Diffusion folder that computes the same function with outlier channels.

Real checkpoints have a few channels far larger than the others (the keys' and values' input of SD 1.5 reaches 828 at
the first token, elsewhere 10 to 15), and one quantization scale for a whole tensor then loses the small ones. The
bundled model is kinder. Here some channels are multiplied by a power of two where they are made, and the weights that
read them divided by it: exact in floating point, so that only quantization can tell the two apart.

    python demo/stress.py --output_dir demo/work/stressed

Next: python benchmarks/fidelity.py --pretrained_model_name_or_path demo/work/stressed --work_dir ... --output ...
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel

ROOT = Path(__file__).resolve().parents[1]


def rescalable_pairs(pipeline: StableDiffusionPipeline) -> Iterator[tuple[list[torch.Tensor], list[nn.Module]]]:
    """(tensors whose rows make the channels, layers that read them) with nothing but linear steps between."""
    cross_attention = []
    for block in pipeline.unet.modules():
        if isinstance(block, Transformer2DModel):
            yield [block.norm.weight, block.norm.bias], [block.proj_in]
        elif isinstance(block, BasicTransformerBlock):
            own, cross, (gate, _, down) = block.attn1, block.attn2, block.ff.net
            yield [block.norm1.weight, block.norm1.bias], [own.to_q, own.to_k, own.to_v]
            yield [block.norm2.weight, block.norm2.bias], [cross.to_q]
            yield [block.norm3.weight, block.norm3.bias], [gate.proj]
            yield [own.to_v.weight], [own.to_out[0]]
            yield [cross.to_v.weight], [cross.to_out[0]]
            values = slice(down.in_features)  # GEGLU multiplies the first half by a gate of the second
            yield [gate.proj.weight[values], gate.proj.bias[values]], [down]
            cross_attention += [cross.to_k, cross.to_v]
    norm = pipeline.text_encoder.final_layer_norm
    yield [norm.weight, norm.bias], cross_attention


@torch.no_grad()
def add_outliers(pipeline: StableDiffusionPipeline, channels: int, factor: float, seed: int) -> int:
    """Rescale `channels` random channels of each pair by `factor`; returns the number of pairs."""
    generator = torch.Generator().manual_seed(seed)
    pairs = list(rescalable_pairs(pipeline))
    for makers, readers in pairs:
        scale = torch.ones(len(makers[0]))
        scale[torch.randperm(len(scale), generator=generator)[:channels]] = factor
        for rows in makers:
            rows.mul_(scale.view(-1, *[1] * (rows.dim() - 1)))
        for layer in readers:
            layer.weight.div_(scale.view(1, -1, *[1] * (layer.weight.dim() - 2)))
    return len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=Path, default=ROOT / "demo/tiny-stable-diffusion")
    add("--channels", type=int, default=2, help="outlier channels of each tensor [%(default)s]")
    add("--factor", type=int, default=64, help="how much larger they get, a power of two [%(default)s]")
    add("--seed", type=int, default=0, help="chooses the channels [%(default)s]")
    add("--output_dir", type=Path, required=True, help="for the variant, a folder that is not there yet")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists already")
    if args.factor < 2 or args.factor & (args.factor - 1) or args.channels < 1:
        parser.error("--factor must be a power of two above 1, --channels at least 1")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    except (OSError, ValueError) as error:
        parser.error(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {error}")
    pairs = add_outliers(pipeline, args.channels, args.factor, args.seed)
    pipeline.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {args.channels} channels of {pairs} tensors are {args.factor} times larger")


if __name__ == "__main__":
    main()
