"""Writes a random LoRA for a diffusers pipeline, in diffusers' format or kohya's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from single_file import original_unet

RANK, ALPHA = 4, 2.0
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def matrices(pipeline: DiffusionPipeline, parts: tuple[str, ...], size: float) -> dict[tuple[str, str], Any]:
    """(A [RANK, in], B [out, RANK]) by part and layer, for the layers of attention and for the text encoders' MLPs."""
    generator, made = torch.Generator().manual_seed(0), {}
    for part in parts:
        for name, layer in getattr(pipeline, part).named_modules():
            if isinstance(layer, nn.Linear) and re.search(r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj|fc1)$", name):
                shapes = (RANK, layer.in_features), (layer.out_features, RANK)
                made[part, name] = [size * torch.randn(shape, generator=generator) for shape in shapes]
    return made


def write_lora(
    pipeline: DiffusionPipeline, path: Path, style: str = "kohya", parts: tuple[str, ...] = ("unet",), size: float = 0.1
) -> dict[tuple[str, str], torch.Tensor]:
    """What it adds to each layer's weight at weight 1. For SDXL's UNet kohya has the names of the original code."""
    tensors, added, xl = {}, {}, hasattr(pipeline, "text_encoder_2")
    for (part, name), (down, up) in matrices(pipeline, parts, size).items():
        clip = "" if part == "unet" or name.startswith("text_model") else "text_model."
        if style == "diffusers":  # its alpha is the rank
            tensors[f"{part}.{clip}{name}.lora_A.weight"], tensors[f"{part}.{clip}{name}.lora_B.weight"] = down, up
        else:
            if xl and part == "unet":
                layers = pipeline.unet.config.layers_per_block
                ((name_there, _),) = original_unet({f"{name}.weight": down}, layers).items()
                name_there = name_there.removesuffix(".weight")
            else:
                name_there = clip + name
            prefix = "lora_te1" if xl and part == "text_encoder" else KOHYA[part]
            key = f"{prefix}_{name_there.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        added[part, name] = up @ down * (1 if style == "diffusers" else ALPHA / RANK)
    save_file(tensors, path)
    return added
