"""What several test files need: UNets and layers with known numbers, checkpoints, images of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from diffusers import StableDiffusionPipeline
from neural_compressor.torch.quantization import prepare
from PIL import Image

import text2images
import train_text_to_image_qat as trainer
from conftest import SIZE, tiny_pipeline, tiny_unet

BOTH = pytest.mark.parametrize("script", [trainer, text2images], ids=["train", "generate"])
STORED = {"linear": (24, 40), "conv": (24, 16, 3, 3), "strided": (24, 16, 3, 3), "grouped": (24, 8, 3, 3)}
STORED["no bias"] = STORED["conv"]
KINDS = list(STORED)

# ---------------------------------------------------------------- the trainer's UNet


def parse(*flags: str):
    return trainer.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y", *flags])


def prepared_unet(*flags: str) -> nn.Module:
    torch.manual_seed(1)
    unet = tiny_unet()
    return prepare(unet, trainer.quantization_config(parse(*flags), unet))


def unet_inputs(batch: int = 2, edge: int = SIZE // 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noisy_latents = torch.randn(batch, 4, edge, edge, generator=generator)
    return noisy_latents, torch.full((batch,), 500), torch.randn(batch, 77, 32, generator=generator)


def calibrated_unet() -> nn.Module:
    unet = prepared_unet()
    trainer.set_mode(unet, "observe")
    with torch.no_grad():
        unet(*unet_inputs())
    trainer.finish_calibration(unet)
    trainer.set_mode(unet, "quantize")
    return unet


# ---------------------------------------------------------------- int8 layers of text2images.py


def new_layer(kind: str, quantize_input: bool = True, paired: bool = False) -> text2images.Int8Layer:
    """A layer of the reference path, with random tensors as a quant_model.pt has them."""
    generator = torch.Generator().manual_seed(1)
    if kind == "linear":
        plain: nn.Module = nn.Linear(40, 24)
    else:
        stride, groups = (2 if kind == "strided" else 1), (2 if kind == "grouped" else 1)
        plain = nn.Conv2d(16, 24, 3, stride, 1, groups=groups, bias=kind != "no bias")
    layer = text2images.Int8Layer(plain, quantize_input)
    layer.weight = torch.randint(-127, 128, STORED[kind], dtype=torch.int8, generator=generator)
    layer.weight_scale = torch.rand(24, generator=generator) * 0.01 + 1e-4
    layer.bias = None if layer.bias is None else torch.randn(24, generator=generator)
    layer.input_factor = torch.rand(layer.input_factor.shape, generator=generator) + 0.5
    if quantize_input:
        layer.input_scale, layer.input_zero_point = torch.tensor(0.03), torch.tensor(77, dtype=torch.int32)
    layer.prepare()
    layer.paired = paired
    return layer


def some_input(kind: str, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 9, 40) if kind == "linear" else (batch, 16, 6 + 2 * batch, 10)
    return torch.randn(shape, generator=generator) * 3


def pair_of_inputs(kind: str, batch: int, change: float) -> torch.Tensor:
    """A batch without captions, and the same with: changed a little, each sample by as much as its number says."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 9, 40) if kind == "linear" else (batch, 16, 8, 10)
    first, changes = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return torch.cat([first, first + change * changes * torch.arange(1, batch + 1).view(-1, *[1] * (len(shape) - 1))])


# ---------------------------------------------------------------- checkpoints and images


def load(script: ModuleType, checkpoint: Path | str, *flags: str) -> Any:
    """The pipeline as a script loads it."""
    if script is trainer:
        command = ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_name", "x", "--resolution", str(SIZE)]
        cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
        return trainer.load_pipeline(trainer.parse_args([*command, *flags]), cpu)
    return text2images.load_pipeline(text2images.parse_args(["-m", str(checkpoint), "-c", "a", *flags]))


def refusal(script: ModuleType, checkpoint: Path | str, *flags: str) -> str:
    with pytest.raises(script.UsageError) as refused:
        load(script, checkpoint, *flags)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500
    return message


def generate_image(checkpoint: Path, output_dir: Path, *flags: str) -> np.ndarray:
    """The image, of seed 42 unless the flags have another; int8 by the path that needs no conversion."""
    command = ["-m", checkpoint, "-c", "a hill", "--num_inference_steps", "6", "--output_dir", output_dir]
    engine = ["--engine", "torch"] if "-qm" in flags else []
    text2images.main([*map(str, command), "--dtype", "float32", *engine, *flags])
    (file,) = output_dir.glob("*seed *.png")
    return np.asarray(Image.open(file), dtype=float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(a - b).mean()))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save(folder: Path, **parts: Any) -> Path:
    """The tiny pipeline with other parts."""
    whole = tiny_pipeline()
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    own = {name: getattr(whole, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    StableDiffusionPipeline(**(own | rest | parts)).save_pretrained(folder)
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def make_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")


def generate(model_dir: Path, output_dir: Path, *flags: str | Path) -> list[dict]:
    """The rows of results.jsonl."""
    short = ["--num_inference_steps", "4", "--output_dir", str(output_dir)]
    text2images.main(["-m", str(model_dir), *short, *map(str, flags)])
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)
