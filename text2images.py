#!/usr/bin/env python
"""Paint captions with Stable Diffusion, with the int8 UNet of quant_model.pt or the full-precision one.

Reads a Stable Diffusion folder (or hub id) and, with -qm, the file that
train_text_to_image_qat.py wrote. Writes one PNG a picture, one grid a caption, and a row a
picture in results.jsonl. The same seed gives the same noise to both UNets.

    python text2images.py -m demo/tiny-stable-diffusion -qm qat/quant_model.pt \\
        -c "a photo of an astronaut riding a horse on mars"

Next: leave out -qm, paint the same captions in fp32, and look at both.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import inspect
import json
import logging
import math
import os
import pickletools
import re
import reprlib
import shutil
import struct
import sys
import time
import warnings
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Importing these libraries on a CPU prints notices about GPU parts that are not there.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image, PngImagePlugin
from tqdm import tqdm

logger = logging.getLogger("text2images")

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
}
# What the UNet was trained with, whatever sampler the checkpoint was saved with ...
TRAINED_WITH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
TRAINED_WITH += ("rescale_betas_zero_snr", "original_inference_steps")
# ... and what all of Stable Diffusion's samplers are set to: their defaults are for models of pixels.
SAMPLER_SETTINGS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
# Pipelines of the same parts; a checkpoint may have been saved by any of them.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline")
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE")
LFS_START = b"version https://git-lfs"
LFS_POINTER = "a pointer of Git LFS, not the file itself: git lfs pull brings it"
SINGLE_FILES = (".safetensors", ".ckpt")  # whole checkpoints, which are not read
# A tokenizer gives some of these different ids, unless it has lost its vocabulary.
TEST_WORDS = ["cat", "house", "sky", "water", "кот", "небо", "家", "空", "水", "集"]
NOT_OF_THE_PICTURE = {"captions", "captions_file", "images_num", "seed", "batch_size", "output_dir", "debug"}
MAX_NAME_BYTES = 150  # of the caption in a file name; file systems allow 255 for the whole
# Separators, what Windows forbids, control characters, and marks that turn the direction of the text around.
NOT_IN_NAMES = r"[\\/:*?\"<>|\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+"
WINDOWS_DEVICES = r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3])\s*(\.|$)"


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


# ---------------------------------------------------------------- arguments


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag's default."""


def flags_given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """What was asked for beside captions and seeds: evaluate.py makes of it a command that paints a picture again."""
    flags = []
    for name, value in vars(args).items():
        if name in NOT_OF_THE_PICTURE or value == parser.get_default(name):
            continue
        if isinstance(value, list):  # its parts may be PATH:WEIGHT
            parts = [part if isinstance(part, tuple) else (part,) for part in value]
            flags += [f"--{name}", *(":".join(map(str, part)) for part in parts)]
        else:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("-m", "--pretrained_model_name_or_path", help="diffusers folder or hub id of Stable Diffusion, needed to paint")
    add("-qm", "--quantized_model_name_or_path", type=Path, help="quant_model.pt, or the folder it is in")
    add("--describe", action="store_true", help="print what is in the file of -qm and end; needs no -m and no captions")
    add("--variant", help="file variant of the checkpoint's weights, as in fp16")
    add("--revision", help="git revision of the hub model")
    add("--cache_dir", help="where downloads are kept")
    text = "sampler, with its usual settings for Stable Diffusion; by default the checkpoint's own, as it was saved"
    add("--scheduler", choices=SCHEDULERS, help=text)
    text = "layers of the text encoder to leave out at its end, as diffusers counts (1 is called clip skip 2 elsewhere)"
    add("--clip_skip", type=int, metavar="N", help=text)
    text = (
        "of all that is not int8; auto: float32 with the full-precision UNet, around int8 bfloat16 where the CPU has it"
    )
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=text)
    text = "compile the UNet first: minutes for each new size or batch, seconds once that is cached, then faster steps"
    add("--compile", action="store_true", help=text)
    add("--disable_safety_checker", action="store_true", help="paint even what the checkpoint's own checker flags")
    add = parser.add_argument_group("pictures").add_argument
    add("-c", "--captions", nargs="+", default=[], help="what to paint")
    add("--captions_file", type=Path, help="more captions, one a line, UTF-8")
    add("-n", "--images_num", type=int, default=1, help="pictures of each caption; picture k has seed + k")
    add("-s", "--seed", type=int, default=42, help="of the first picture of each caption")
    add("--num_inference_steps", type=int, default=50, help="denoising steps")
    text = "the first and last so many steps compute in float, with the int8 weights: slower, and closer to fp32"
    add("--high_precision_steps", type=int, default=0, metavar="K", help=text)
    text = "quantize inputs with captions by themselves, not what captions change: a little faster, farther from fp32"
    add("--no_paired_guidance", action="store_true", help=text)
    add(
        "--guidance_scale", type=float, default=7.5, help="how closely to follow the caption; at most 1 switches it off"
    )
    add("--negative_prompt", help="what not to paint")
    add("--height", type=int, help="pixels, a multiple of 8; by default what the checkpoint was trained for")
    add("--width", type=int, help="likewise")
    add("--batch_size", type=int, default=1, help="pictures painted at once")
    add("--output_dir", type=Path, default=Path("images"), help="gets the pictures and results.jsonl")
    add("--debug", action="store_true", help="show the traceback with an error")
    args = parser.parse_args(argv)

    if args.describe:
        if args.quantized_model_name_or_path is None:
            parser.error("--describe needs -qm FILE: the quant_model.pt to describe")
        return args
    if args.pretrained_model_name_or_path is None:
        parser.error("nothing to paint with: give -m, a diffusers folder or hub id of Stable Diffusion")
    args.flags = flags_given(args, parser)

    if args.captions_file is not None:
        try:
            lines = args.captions_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--captions_file {args.captions_file}: {error}")
        if args.captions_file.suffix in (".jsonl", ".json", ".csv", ".parquet"):
            parser.error(f"--captions_file {args.captions_file}: a text file is needed, with one caption a line")
        args.captions = [*args.captions, *(line.strip() for line in lines if line.strip())]
    if any("\ud800" <= letter <= "\udfff" for caption in args.captions for letter in caption):
        parser.error("--captions must be UTF-8")
    if not args.captions:
        parser.error("nothing to paint: give -c CAPTION or --captions_file FILE")
    for name in ("images_num", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("height", "width"):
        edge = getattr(args, name)
        if edge is not None and (edge < 8 or edge % 8):
            parser.error(f"--{name} {edge} must be a multiple of 8: {max(8, edge // 8 * 8)} would do")
    for name in ("high_precision_steps", "clip_skip"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name} must not be negative")
    for name in ("high_precision_steps", "no_paired_guidance"):
        if getattr(args, name) and args.quantized_model_name_or_path is None:
            parser.error(f"--{name} is for int8: give -qm too, or leave it out")
    if not 0 <= args.seed < 2**63 - args.images_num:
        parser.error("--seed must be a non-negative 64-bit number")
    return args


# ---------------------------------------------------------------- int8 layers
#
# The convention of quant_model.pt: a weight is worth q * weight_scale[out], q int8; an input is worth
# (q - zero_point) * input_scale, q = clamp(round(x / input_factor[in] / input_scale) + zero_point, 0, 255), uint8.
# The weights hold the input factors. A layer with int8 weights but no input_scale computes in float, without factors.
# Of an input with a caption, only what differs from the one without is quantized, in steps of its own: pair_guidance.


class InputQuantizer:
    """Turns a layer's input into uint8; layers that read the same tensor share one, and it works once for all."""

    def __init__(self, scale: float, zero_point: int, factor: torch.Tensor) -> None:
        self.scale, self.zero_point, self.factor = scale, zero_point, factor
        self.steps = scale * factor  # of each channel; [C] or [C, 1, 1], to broadcast over the input
        self.seen: Any = lambda: None  # weak reference to the latest input
        self.latest: tuple[torch.Tensor, ...] = ()
        self.paired = False  # the batch's second half is the first with captions: quantize what they change

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(levels,), or where `paired` (levels of the first half, levels of the changes, scales of the changes)."""
        if torch.compiler.is_compiling():  # the compiler sees for itself what is computed twice
            return self.quantize_anew(x)
        if self.seen() is not x:
            self.latest, self.seen = self.quantize_anew(x), weakref.ref(x)
        return self.latest

    def quantize_anew(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.paired:
            return (self.to_levels(x),)
        first, second = x.chunk(2)
        changes, scales = self.changes(first, second)
        return self.to_levels(first), to_uint8(changes, scales * self.factor, 128, out=changes), scales

    def to_levels(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        return to_uint8(values, self.steps, self.zero_point, out=None if values is x else values)

    def changes(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the captions change, and the size of the steps in which to quantize it: one per sample, [B, 1, ...].

        The change's range is not known before, as the input's is: it depends on the caption and falls with the noise.
        """
        changes = (second - first).float()
        rows = changes if self.factor.dim() == 1 else changes.movedim(1, -1)  # channels last
        rows = rows.reshape(len(rows), -1, rows.shape[-1])
        largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)) / self.factor.flatten()  # [B, C]
        scales = largest.amax(dim=1).div_(127).clamp_(min=1e-30)  # 0: nothing changes
        return changes, scales.to(first.dtype).view(-1, *[1] * (changes.dim() - 1))

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """What the levels of `x` are worth, divided by the factors."""
        first, second = x.chunk(2) if self.paired else (x, None)
        values = (quantized(first.float(), self.steps, self.zero_point) - self.zero_point) * self.scale
        if second is not None:
            changes, scales = self.changes(first, second)
            values = torch.cat([values, values + (quantized(changes, scales * self.factor, 128) - 128) * scales])
        return values.to(x.dtype)


def quantized(values: torch.Tensor, steps: torch.Tensor, zero_point: int) -> torch.Tensor:
    """Levels 0..255 of fp32 values, in fp32."""
    return torch.clamp(torch.round(values / steps) + zero_point, 0, 255)


ROUNDING = torch.tensor(1.5 * 2**23)  # added to an fp32 number, it leaves no bits for a fraction


def to_uint8(values: torch.Tensor, steps: torch.Tensor, zero_point: int, out: torch.Tensor | None) -> torch.Tensor:
    """The same in uint8, in four passes over memory rather than seven; overwrites `out`, which may be `values`.

    The sum with ROUNDING is rounded, half to even as by torch.round, and its lowest bits are the integer, of which the
    conversion keeps eight.
    """
    if torch.compiler.is_compiling():  # which makes one pass of them all
        return quantized(values, steps, zero_point).to(torch.uint8)
    lowest = ROUNDING.item() - zero_point
    sums = torch.addcdiv(ROUNDING, values, steps, out=out).clamp_(lowest, lowest + 255)
    return sums.view(torch.int32).to(torch.uint8).add_(zero_point)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """int8 weight [out, in, ...] and its scales [out] -> fp32, freed of the input factors [in] where they are given."""
    weight = weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))
    return weight if factor is None else weight / factor.view(1, -1, *[1] * (weight.dim() - 2))


class Int8Layer(nn.Module):
    """What Int8Linear and Int8Conv2d have in common: the tensors of the file, and how they are made ready to run."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(weight.shape, dtype=torch.int8, device="meta"))
        self.register_buffer("weight_scale", torch.empty(weight.shape[0], device="meta"))
        self.register_buffer("input_scale", torch.empty((), device="meta"))
        self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int32, device="meta"))
        self.register_buffer("input_factor", torch.empty(weight.shape[1] * groups, device="meta"))
        self.register_buffer("bias", None if bias is None else torch.empty(bias.shape, device="meta"))
        self.input_quantizer: InputQuantizer | None = None
        self.high_precision = False  # compute in float, with the int8 weights

    def make_ready(self, use_kernels: bool, dtype: torch.dtype, device: torch.device) -> None:
        """Pack the weight for the int8 kernel, or dequantize it for the reference path."""
        self.use_kernels, self.dtype = use_kernels, dtype
        factor = self.input_factor.view(-1, *[1] * (self.weight.dim() - 2)).to(device)
        self.input_quantizer = InputQuantizer(self.input_scale.item(), self.input_zero_point.item(), factor)
        if use_kernels:
            self.zero_points = torch.zeros(len(self.weight_scale), dtype=torch.int32)
            self.weight = self.pack()
        else:
            self.weight = dequantize(self.weight, self.weight_scale).to(device, dtype)
            self.bias = None if self.bias is None else self.bias.to(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantizer = self.input_quantizer
        if self.high_precision:
            return self.compute_float(*self.float_input_and_weights(x))
        if not self.use_kernels:
            return self.compute_float(quantizer.fake_quantize(x), self.weight, self.bias)
        levels, *changes = quantizer.quantize(x)
        output = self.compute_int8(levels, quantizer.scale, quantizer.zero_point, self.bias)
        if changes:
            levels, scales = changes
            output = torch.cat([output, output])
            # a kernel has one scale for all samples
            output.chunk(2)[1].addcmul_(self.compute_int8(levels, 1.0, 128, None), scales)
        return output

    def float_input_and_weights(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What a float layer of the same weights takes: dequantized here, as a float copy of all would fill memory."""
        weight = dequantize(self.unpack(), self.weight_scale).to(self.dtype) if self.use_kernels else self.weight
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return (x.float() / self.input_quantizer.factor).to(self.dtype), weight, bias


# The kernels, and the same as operators of their own, which torch.compile calls and leaves alone: its own int8
# patterns want constant weights, and then compile anew in every process. Such an operator costs 0.1 ms a call more.


def qlinear(
    levels: torch.Tensor,
    scale: float,
    zero_point: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """uint8 levels [..., in], packed weight [out, in] -> `dtype` [..., out]."""
    return torch.ops.onednn.qlinear_pointwise(
        levels, scale, zero_point, weight, weight_scale, zero_points, bias, 1.0, 0, dtype, "none", [], ""
    )


int8_linear = torch.library.custom_op("sd_unet_int8::linear", qlinear, mutates_args=())


@int8_linear.register_fake
def int8_linear_shape(levels, scale, zero_point, weight, weight_scale, zero_points, bias, dtype):
    return levels.new_empty((*levels.shape[:-1], len(weight_scale)), dtype=dtype)


def qconv2d(
    levels: torch.Tensor,
    scale: float,
    zero_point: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """uint8 levels [B, in, H, W] in channels_last, packed weight [out, in / groups, h, w] -> `dtype` [B, out, ...]."""
    return torch.ops.onednn.qconv_pointwise(
        levels, scale, zero_point, weight, weight_scale, zero_points, bias, stride, padding, dilation, groups,
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip


int8_conv2d = torch.library.custom_op("sd_unet_int8::conv2d", qconv2d, mutates_args=())


@int8_conv2d.register_fake
def int8_conv2d_shape(
    levels, scale, zero_point, weight, weight_scale, zero_points, bias, stride, padding, dilation, groups, dtype
):
    sizes = zip(levels.shape[2:], weight.shape[2:], stride, padding, dilation)
    edges = [(edge + 2 * pad - step * (kernel - 1) - 1) // by + 1 for edge, kernel, by, pad, step in sizes]
    shape = (levels.shape[0], len(weight_scale), *edges)
    return torch.empty(shape, dtype=dtype, device=levels.device, memory_format=torch.channels_last)


class Int8Linear(Int8Layer):
    def pack(self) -> torch.Tensor:
        return torch.ops.onednn.qlinear_prepack(self.weight, None)

    def unpack(self) -> torch.Tensor:
        return self.weight.to_dense().T

    def compute_float(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def compute_int8(
        self, levels: torch.Tensor, scale: float, zero_point: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        kernel = int8_linear if torch.compiler.is_compiling() else qlinear
        return kernel(levels, scale, zero_point, self.weight, self.weight_scale, self.zero_points, bias, self.dtype)


class Int8Conv2d(Int8Layer):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight, conv.bias, conv.groups)
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)

    def pack(self) -> torch.Tensor:
        quantizer = self.input_quantizer
        shape = [1, self.weight.shape[1] * self.geometry[3], 64, 64]  # a hint: other sizes run as well
        return torch.ops.onednn.qconv_prepack(
            self.weight, self.weight_scale, quantizer.scale, quantizer.zero_point, *self.geometry, shape
        )

    def unpack(self) -> torch.Tensor:
        return self.weight.to_dense()

    def compute_float(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, *self.geometry)

    def compute_int8(
        self, levels: torch.Tensor, scale: float, zero_point: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        kernel = int8_conv2d if torch.compiler.is_compiling() else qconv2d
        levels = levels.contiguous(memory_format=torch.channels_last)
        return kernel(
            levels, scale, zero_point, self.weight, self.weight_scale, self.zero_points, bias,
            *self.geometry, self.dtype,
        )  # fmt: skip


def kernels_are_exact() -> bool:
    """Whether this CPU's int8 kernels compute what integers would.

    Without VNNI they add pairs of products in 16 bits, which saturates without a word
    (pytorch/pytorch#103646); the largest values show it.
    """
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(192, 256, (2, 64, 8, 8), generator=generator)
    weight = torch.randint(96, 128, (32, 64, 3, 3), generator=generator)
    scales, zeros = torch.ones(32), torch.zeros(32, dtype=torch.int32)
    rows, matrix = levels[:, :, 0, 0], weight[:, :, 1, 1]
    linear_reference = F.linear((rows - 7).double(), matrix.double())
    conv_reference = F.conv2d((levels - 7).double(), weight.double(), padding=1)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    rest = (1.0, 0, torch.float32, "none", [], "")
    try:
        packed = torch.ops.onednn.qlinear_prepack(matrix.to(torch.int8), None)
        linear = torch.ops.onednn.qlinear_pointwise(rows.byte(), 1.0, 7, packed, scales, zeros, None, *rest)
        packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), scales, 1.0, 7, *geometry, [2, 64, 8, 8])
        nhwc = levels.byte().contiguous(memory_format=torch.channels_last)
        conv = torch.ops.onednn.qconv_pointwise(nhwc, 1.0, 7, packed, scales, zeros, None, *geometry, *rest)
    except (AttributeError, RuntimeError, NotImplementedError):  # a build or a machine without these kernels
        return False
    return torch.allclose(linear.double(), linear_reference) and torch.allclose(conv.double(), conv_reference)


# ---------------------------------------------------------------- reading quant_model.pt

# All that the pickle inside may name; torch.load(weights_only=True) would also allow, say, bytearray(10**12).
PICKLE_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
PICKLE_NAMES |= {f"torch {kind}Storage" for kind in ("Char", "Int", "Half", "BFloat16", "Float")}
MAX_INDEX_BYTES, MAX_OPCODES = 1 << 20, 100_000  # of the pickle; that of SD 1.5 has 0.2 MiB and 45,000
TRAILER = struct.Struct("<4s 36x Q Q 4s 4x Q 4x 4s 18x")  # zip64 end record, its locator, end record
NOT_OURS = (
    "a state dict or model such as Intel's original example wrote, which does not hold what an int8 UNet needs: "
    "train again with train_text_to_image_qat.py"
)


def quant_model_file(path: Path) -> Path:
    """A folder stands for the quant_model.pt in it."""
    return path / "quant_model.pt" if path.is_dir() else path


def read_quant_model(path: Path) -> dict[str, Any]:
    """The checked contents of quant_model.pt; tensors stay on disk until they are used.

    Raises:
        UsageError: the file is missing, damaged, unsafe, of another kind or of a newer version.
    """
    path = quant_model_file(path)
    if not path.is_file():
        raise UsageError(f"-qm {path}: no such file; train_text_to_image_qat.py writes it into its --output_dir")
    try:
        foreign = foreign_names(path)
        payload = None if foreign else torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except PermissionError as error:
        raise UsageError(f"-qm {path}: {error.strerror}; change its rights") from error
    except Exception as error:  # the readers fail in many ways on a file that is cut short or not a zip archive
        damaged = "damaged or not a quant_model.pt; copy or train it again"
        problem = LFS_POINTER if is_lfs_pointer(path) else damaged
        raise UsageError(f"-qm {path}: {problem}") from error
    if "torch._utils _rebuild_qtensor" in foreign:
        raise UsageError(f"-qm {path}: {NOT_OURS}")
    if foreign:
        raise UsageError(
            f"-qm {path}: not loaded, as it is no plain file of tensors and could run code (it names "
            f"{shown(max(foreign))}); train again with train_text_to_image_qat.py"
        )
    if type(payload) is not dict or payload.get("format") != "sd-unet-int8":
        if isinstance(payload, dict) and any(isinstance(key, str) and "." in key for key in payload):
            raise UsageError(f"-qm {path}: {NOT_OURS}")
        raise UsageError(f"-qm {path}: not a quant_model.pt of train_text_to_image_qat.py")
    version = payload.get("format_version")
    if type(version) is not int or version != 1:
        raise UsageError(f"-qm {path}: format version {shown(version)}; this script reads 1: update it")
    problem = problem_of_contents(payload, path.stat().st_size)
    if problem:
        raise UsageError(f"-qm {path}: {problem}")
    return payload


def foreign_names(path: Path) -> set[str]:
    """What the file's pickle names beyond PICKLE_NAMES; nothing of it is loaded.

    What torch.load makes of a file that passes takes no more time and memory than the file's size calls for:
    records are stored as they are, and the pickle is short and builds each container once.

    Raises:
        ValueError, zipfile.BadZipFile and others: no archive that torch.save wrote.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - TRAILER.size))
        end, directory_size, directory, locator, end_at, last = TRAILER.unpack(file.read())
    # Zip readers disagree on odd trailers; with this one they all see the same directory.
    if (end, locator, last, end_at) != (b"PK\6\6", b"PK\6\7", b"PK\5\6", size - TRAILER.size):
        raise ValueError("no trailer of torch.save")
    if directory + directory_size != end_at or directory_size > MAX_INDEX_BYTES:
        raise ValueError("no directory of torch.save")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type or record.file_size != record.compress_size for record in records):
            raise ValueError("compressed records")
        (pickled,) = (record for record in records if record.filename.lower().endswith("data.pkl"))
        if pickled.file_size > MAX_INDEX_BYTES:
            raise ValueError("pickle too long")
        data = archive.read(pickled)
    names, memo, previous = set(), {}, ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name == "GLOBAL":
            names.add(argument)
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = previous
        elif opcode.name in ("BINGET", "LONG_BINGET") and memo.get(argument) not in ("BINUNICODE", "GLOBAL"):
            raise ValueError("a container that is used twice: nested, it would take for ever")
        if count > MAX_OPCODES:
            raise ValueError("pickle too long")
        previous = opcode.name
    return names - PICKLE_NAMES


def problem_of_contents(payload: dict[str, Any], file_size: int) -> str | None:
    """What is wrong with the values of a file that has the right format, None if nothing is."""
    state_dict, config = payload.get("state_dict"), payload.get("unet_config")
    if type(state_dict) is not dict or type(config) is not dict:
        return "damaged, it has no state_dict or no unet_config; copy or train it again"
    for name, tensor in state_dict.items():
        plain = type(name) is str and re.fullmatch(r"[\w.]{1,200}", name, re.ASCII) and type(tensor) is torch.Tensor
        if not plain or tensor.requires_grad or not tensor.is_contiguous():
            return f"damaged, {shown(name)} is no plain tensor; copy or train it again"
    if sum(tensor.nbytes for tensor in state_dict.values()) > file_size:
        return "damaged, its tensors claim more than the file holds; copy or train it again"
    if checksum(state_dict) != payload.get("checksum"):
        return "damaged, its checksum does not match; copy or train it again"
    for name, tensor in state_dict.items():
        if name.endswith(("_scale", "_factor")) and not (torch.isfinite(tensor) & (tensor > 0)).all():
            return f"{name} is not a positive number; the training failed: train again"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"{name} holds values that are not finite; the training failed: train again"
        if name.endswith("_zero_point") and not ((tensor >= 0) & (tensor <= 255)).all():
            return f"{name} is not within 0..255; the training failed: train again"
    return None


def shown(value: Any) -> str:
    """A value out of a file, fit for one line, whatever its size and nesting."""
    return ascii(value[:200]) if isinstance(value, str) else reprlib.repr(value)


def checksum(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, as the trainer computes it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(path: Path) -> str:
    """The facts of a quant_model.pt as text: layers by kind and dtype, sizes, recipe, versions, training, checksum.

    Raises:
        UsageError: as read_quant_model, which has checked every tensor; all other values may be anything.
    """
    path, payload = quant_model_file(path), read_quant_model(path)
    tensors = payload["state_dict"]
    layers: dict[tuple[str, str], list[int]] = {}  # (kind, dtype) -> layers, parameters, bytes
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        weight = tensors.get(f"{layer}.weight", tensor)
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype == "int8":
            dtype = "int8" if f"{layer}.input_scale" in tensors else "int8 weights"
        row = layers.setdefault(({4: "Conv2d", 2: "Linear", 1: "norm"}.get(weight.dim(), "other"), dtype), [0, 0, 0])
        row[0] += part == "weight"
        row[1] += tensor.numel() if part in ("weight", "bias") else 0
        row[2] += tensor.nbytes  # with the scales, factors and zero points that belong to it

    def said(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{said(key)} {said(part)}" for key, part in value.items() if not isinstance(part, dict))
        return shown(value).strip("'\"").replace("\\\\", "\\")

    def listed(heading: str, facts: Any) -> list[str]:
        facts = facts if isinstance(facts, dict) else {"": facts}
        return ["", heading, *(f"  {said(key):<24} {said(value)}" for key, value in facts.items())]

    fp32 = max(4, 4 * sum(parameters for _, parameters, _ in layers.values()))  # bytes
    size, recipe = path.stat().st_size, payload.get("quantization")
    lines = [
        f"{path}: {size / 1e6:.1f} MB, {size / fp32:.3f} of the same UNet in fp32 ({fp32 / 1e6:.1f} MB)",
        f"format {payload['format']}, version {payload['format_version']}",
        f"trained from {said(payload.get('base_model'))}",
        f"SHA-256 of its tensors, as it should be: {payload['checksum']}",
        "",
        f"{'layers':<8} {'dtype':<14} {'count':>6} {'parameters':>12} {'MB':>8}",
    ]
    for (kind, dtype), (count, parameters, octets) in sorted(layers.items()):
        lines.append(f"{kind:<8} {dtype:<14} {count:>6} {parameters:>12,} {octets / 1e6:>8.2f}")
    if isinstance(recipe, dict) and isinstance(recipe.get("local"), dict):
        recipe = {"all layers, but for": recipe.get("global"), **recipe["local"]}
    lines += listed("recipe (dtypes of weights and inputs)", recipe)
    lines += listed("training", payload.get("training")) + listed("made with", payload.get("versions"))
    return "\n".join(lines)


def build_int8_unet(payload: dict[str, Any], dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """A diffusers UNet with int8 layers, filled from the file; the full-precision UNet is never made.

    Raises:
        UsageError: the tensors do not fit the architecture that the file names.
    """
    # int8 weights will be packed; with all else copied, nothing holds the file in memory once the payload is gone
    state_dict = {
        name: part if part.dtype == torch.int8 else part.clone() for name, part in payload["state_dict"].items()
    }
    config = payload["unet_config"]
    int8_names = [name.removesuffix(".input_scale") for name in state_dict if name.endswith(".input_scale")]
    weight_only = [name.removesuffix(".weight_scale") for name in state_dict if name.endswith(".weight_scale")]
    weight_only = [name for name in weight_only if name not in set(int8_names)]
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config({key: config[key] for key in unet_defaults() if key in config})
        for name in int8_names:
            parent, _, child = name.rpartition(".")
            layer = unet.get_submodule(name)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                raise ValueError(f"{name} is neither Linear nor Conv2d")
            int8 = Int8Conv2d(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer.weight, layer.bias)
            setattr(unet.get_submodule(parent), child, int8)
        for name in weight_only:
            weight, scale = state_dict[f"{name}.weight"], state_dict.pop(f"{name}.weight_scale")
            factor = state_dict.pop(f"{name}.input_factor")
            if weight.dtype != torch.int8 or scale.shape != weight.shape[:1] or factor.shape != weight.shape[1:2]:
                raise ValueError(f"{name}.weight_scale or input_factor does not fit its weight")
            state_dict[f"{name}.weight"] = dequantize(weight, scale, factor).to(dtype)
        check_fit(state_dict, unet.state_dict(), set(int8_names))
        unet.load_state_dict(state_dict, assign=True)
    except Exception as error:  # a wrong config fails inside diffusers in its own ways
        raise UsageError(f"quant_model.pt does not fit its own architecture: {str(error).splitlines()[0]}") from error
    use_kernels = device.type == "cpu" and kernels_are_exact()
    for module in unet.modules():
        if isinstance(module, Int8Layer):
            module.make_ready(use_kernels, dtype, device)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(device, dtype), requires_grad=False))
    share_input_quantizers(unet)
    keep_channels_last(unet)
    if use_kernels:
        speed_up_attention(unet)
    else:
        unet = unet.to(memory_format=torch.channels_last)
    path = "oneDNN int8 kernels" if use_kernels else "the reference path at float speed (no exact int8 kernels here)"
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d, Int8Layer)) for module in unet.modules())
    rest = f"{len(weight_only)} more with int8 weights and float arithmetic"
    logger.info(f"{len(int8_names)} of {layers} Linear and Conv2d layers in int8 ({rest}), by {path}")
    return unet.eval()


def check_fit(state_dict: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], int8_names: set[str]) -> None:
    """Raise ValueError unless each tensor of the UNet, and no other, is there with its shape and kind."""
    if not int8_names:
        raise ValueError("not one layer is int8")
    for name in sorted(wanted.keys() | state_dict.keys()):
        if name not in state_dict or name not in wanted:
            raise ValueError(f"{name} is {'missing' if name in wanted else 'not part of it'}")
        ours, theirs = state_dict[name], wanted[name]
        same_kind = ours.is_floating_point() and theirs.is_floating_point() or ours.dtype == theirs.dtype
        if name.rpartition(".")[0] in int8_names:  # the kernels read these bytes as they are
            same_kind = ours.dtype == theirs.dtype
        if not same_kind or ours.shape != theirs.shape:
            stored, needed = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (ours, theirs))
            raise ValueError(f"{name} is {stored}, not {needed}")


def unet_defaults() -> dict[str, Any]:
    """All that configures a UNet, with the values it has where a config.json does not say."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


# PyTorch's attention multiplies bf16 matrices at fp32 speed on CPUs that have AVX512-BF16 but no AMX; oneDNN does not.

QUERIES, KEYS = 4096, 512  # of the blocks that attention works in: oneDNN reorders each block of keys once, not often


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T / sqrt(D)) value, bf16 [B, heads, L, D], in blocks whose scores stay in the cache.

    Softmax does not mind a constant, so the greatest score of a row, as far as every 16th key tells, goes off inside
    the product, which adds in fp32: the scores that count are small then, and bf16 fine enough for them. So no pass
    over the scores has to look for the greatest, and a column of ones among the values adds them up. Measured errors
    are 1.1 to 1.4 times those of PyTorch's attention, 2 to 2.5 without the constant.
    """
    scale = query.shape[-1] ** -0.5
    top = torch.matmul(query, key[:, :, ::16].transpose(2, 3)).amax(dim=-1, keepdim=True)
    ones = torch.ones_like(key[..., :1])
    heads = (torch.cat(pair, dim=-1).flatten(0, 1) for pair in ((query, -top), (key, ones), (value, ones)))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    memory = query.new_empty(min(QUERIES, query.shape[2]) * min(KEYS, key.shape[2]))
    for q, k, v, out in zip(*heads, output.flatten(0, 1)):
        for q_rows, out_rows in zip(q.split(QUERIES), out.split(QUERIES)):
            sums = torch.zeros(len(q_rows), v.shape[1])
            for k_rows, v_rows in zip(k.split(KEYS), v.split(KEYS)):
                scores = memory[: len(q_rows) * len(k_rows)].view(len(q_rows), len(k_rows))
                torch.addmm(scores, q_rows, k_rows.T, beta=0, alpha=scale, out=scores)
                sums += torch.mm(scores.exp_(), v_rows)
            if not torch.isfinite(sums).all():  # a score far above what every 16th key told
                return F.scaled_dot_product_attention(query, key, value).contiguous()
            torch.div(sums[:, :-1], sums[:, -1:], out=out_rows)
    return output


fast_attend = torch.library.custom_op("sd_unet_int8::attend", attend, mutates_args=())
fast_attend.register_fake(lambda query, key, value: torch.empty_like(query, memory_format=torch.contiguous_format))


class LongSelfAttention(AttnProcessor2_0):
    """diffusers' attention processor, with `attend` where the sequence is long."""

    def __call__(self, attention: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        masked = kwargs.get("attention_mask") is not None
        if x.dim() != 3 or x.shape[1] < 1024 or x.dtype != torch.bfloat16 or masked:
            return super().__call__(attention, x, *args, **kwargs)
        projections = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = (layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in projections)
        kernel = fast_attend if torch.compiler.is_compiling() else attend
        return attention.to_out[0](kernel(query, key, value).transpose(1, 2).flatten(2))


def speed_up_attention(unet: UNet2DConditionModel) -> None:
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and not block.attn1.is_cross_attention:
            block.attn1.set_processor(LongSelfAttention())


def keep_channels_last(unet: UNet2DConditionModel) -> None:
    """Have float convolutions give it, and undo that diffusers makes the outputs of its transformers contiguous.

    All that follows would be, too, and each int8 convolution that reads it would have to turn it round: a quarter of a
    step's time on a CPU with AMX.
    """

    def turn(block: nn.Module, args: tuple, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (output[0].contiguous(memory_format=torch.channels_last),)

    for block in unet.modules():
        if isinstance(block, nn.Conv2d):
            block.to(memory_format=torch.channels_last)
        elif isinstance(block, Transformer2DModel):
            block.register_forward_hook(turn)


def share_input_quantizers(unet: UNet2DConditionModel) -> None:
    """Self-attention's q, k and v read one tensor, cross-attention's k and v another: quantize it once."""
    for attention in unet.modules():
        if not hasattr(attention, "to_q"):
            continue
        readers = [attention.to_k, attention.to_v] + ([] if attention.is_cross_attention else [attention.to_q])
        int8 = [layer for layer in readers if isinstance(layer, Int8Layer)]
        for layer in int8[1:]:
            first, other = int8[0].input_quantizer, layer.input_quantizer
            same_grid = (first.scale, first.zero_point) == (other.scale, other.zero_point)
            if same_grid and torch.equal(first.factor, other.factor):
                layer.input_quantizer = first


def pair_guidance(unet: UNet2DConditionModel) -> None:
    """With guidance, the batch's second half is its first half with captions: quantize only what they change there.

    Guidance multiplies the difference of the two outputs, and with it the roundings in which the two inputs differ. A
    change is smaller than an input, and so are its steps; as every layer is linear, what it makes of the change is the
    difference of its outputs. (Ditto, arXiv 2501.11211, computes what changes from timestep to timestep.) Not so the
    layers that make attention's queries, keys and values: paired as well, they are worth 0.1 dB in latents.
    """
    for name, layer in unet.named_modules():
        if isinstance(layer, Int8Layer) and not name.endswith(("to_q", "to_k", "to_v")):
            layer.input_quantizer.paired = True


# ---------------------------------------------------------------- the pipeline


def choose_dtype(args: argparse.Namespace) -> torch.dtype:
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    capabilities = torch.cpu.get_capabilities()
    fast_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or torch.cuda.is_available()
    return torch.bfloat16 if args.quantized_model_name_or_path is not None and fast_bf16 else torch.float32


def checkpoint_name(args: argparse.Namespace) -> str:
    """Folder or hub id to load; the id that Intel's example names is gone, a copy of it is there."""
    name = args.pretrained_model_name_or_path
    gone = name == "runwayml/stable-diffusion-v1-5" and not Path(name).is_dir()
    return "stable-diffusion-v1-5/stable-diffusion-v1-5" if gone else name


def load_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The checkpoint's pipeline, with the int8 UNet in place of its own where -qm is given.

    Raises:
        UsageError: no Stable Diffusion 1.x/2.x there, a part is damaged, or the file is for another architecture.
    """
    name, dtype = checkpoint_name(args), choose_dtype(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != args.pretrained_model_name_or_path:
        logger.info(f"{args.pretrained_model_name_or_path} has left the hub; using its copy {name}")
    index = load_index(name, args)
    unet_config = load_unet_config(name, args)
    if args.quantized_model_name_or_path is not None:
        payload = read_quant_model(args.quantized_model_name_or_path)
        check_architecture(payload, unet_config, name)
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    parts = {part: load_part(name, index, part, args, dtype) for part in names}
    check_parts(parts["tokenizer"], parts["text_encoder"], parts["vae"], unet_config, name)
    check_clip_skip(parts["text_encoder"], args)
    parts["scheduler"] = choose_scheduler(parts["scheduler"], args)
    if args.quantized_model_name_or_path is not None:
        parts["unet"] = build_int8_unet(payload, dtype, device)
        del payload
    else:
        parts["unet"] = load_part(name, index, "unet", args, dtype).to(memory_format=torch.channels_last)
    parts["vae"].to(memory_format=torch.channels_last)
    pipeline = add_safety_checker(name, index, parts, dtype, args)
    pipeline.unet.register_to_config(sample_size=size_made_for(unet_config))  # int8 and fp32 alike
    pipeline._guidance_scale = args.guidance_scale  # for guidance_doubles
    if pairs_guidance(pipeline, args):
        pair_guidance(pipeline.unet)
    if args.compile:
        compile_unet(pipeline.unet)
    pipeline.unet.register_forward_pre_hook(to_unet_dtype, with_kwargs=True)
    pipeline.unet.register_forward_hook(to_fp32)
    return pipeline.to(device)


def has_betas(scheduler: Any) -> bool:
    """Whether a checkpoint's scheduler says by which noise its UNet was trained, and not only its class's default."""
    config = scheduler.config
    given = config.get("beta_start") is not None and "beta_start" not in config.get("_use_default_values", [])
    return given or config.get("trained_betas") is not None


def load_index(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """model_index.json, which names the class of the pipeline and of each part."""
    folder = Path(name)
    if "://" in name:
        raise UsageError(f"--pretrained_model_name_or_path {name}: give a hub id such as owner/model, or a folder")
    if (folder.exists() or folder.suffix in SINGLE_FILES) and not (folder / "model_index.json").is_file():
        raise UsageError(f"--pretrained_model_name_or_path {name}: {no_checkpoint(folder)}")
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--pretrained_model_name_or_path {name}: no such folder, and no hub id such as owner/model")
    try:
        options = {"revision": args.revision, "cache_dir": args.cache_dir}
        index = dict(StableDiffusionPipeline.load_config(name, **options))
        kind = index["_class_name"]
    except Exception as error:  # of the hub, of JSON, ...
        damaged = f"model_index.json is damaged, copy it again ({first_line(error)})"
        reason = damaged if folder.exists() else f"no such folder, and not to be had from the hub: {first_line(error)}"
        raise UsageError(f"--pretrained_model_name_or_path {name}: {reason}") from error
    if kind not in PIPELINES:
        raise UsageError(f"{name} is a {kind}; only StableDiffusionPipeline checkpoints (1.x, 2.x) are supported")
    return index


def no_checkpoint(path: Path) -> str:
    """Why there is no model_index.json at the path, and what to give instead."""
    single = [file for file in (sorted(path.glob("*")) if path.is_dir() else [path]) if file.suffix in SINGLE_FILES]
    nested = [file.parent for below in ("*", "snapshots/*") for file in path.glob(f"{below}/model_index.json")]
    if nested:
        return f"the checkpoint is one level down: give {nested[0]}"
    if (path.parent / "model_index.json").is_file():
        return f"a part of a checkpoint: give the whole, {path.parent}"
    if single:
        convert = f"P.from_single_file('{single[0]}').save_pretrained('FOLDER')"
        return (
            "a single file is not read; make a diffusers folder of it, and give that: "
            f'python -c "from diffusers import StableDiffusionPipeline as P; {convert}"'
        )
    return "no model_index.json in it: give the folder of a diffusers checkpoint, or a hub id"


def load_part(
    name: str, index: dict[str, Any], part: str, args: argparse.Namespace, dtype: torch.dtype = torch.float32
) -> Any:
    """A part of the checkpoint, by the class that model_index.json names.

    Raises:
        UsageError: its class cannot work here, or its files are missing, cut short or damaged.
    """
    named = index.get(part)
    library, kind = named if isinstance(named, (list, tuple)) and len(named) == 2 else (None, None)
    allowed = {"unet": ("UNet2DConditionModel",), "vae": VAES}.get(part, (kind,))
    found = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if kind is None or kind not in allowed or not hasattr(found, kind):
        known = f"not {' or '.join(allowed)}" if kind not in allowed else "a class that diffusers does not have"
        raise UsageError(f"{name}: its {part} is {kind and f'{library}.{kind}'}, {known}: it cannot be used here")
    options: dict[str, Any] = {"subfolder": part, "revision": args.revision, "cache_dir": args.cache_dir}
    missing = []
    try:
        if part in ("tokenizer", "scheduler"):
            return getattr(found, kind).from_pretrained(name, **options)
        options |= {"dtype": dtype, "output_loading_info": True}
        try:
            loaded, info = getattr(found, kind).from_pretrained(name, variant=args.variant, **options)
        except OSError:
            if args.variant is None or args.variant in variants(Path(name, part)):
                raise
            loaded, info = getattr(found, kind).from_pretrained(name, **options)
            logger.info(f"the {part} has no variant {args.variant}: its plain weights are used")
        missing = [key for key in info["missing_keys"] if "pooler" not in key]  # BERT's, which nothing reads
    except Exception as error:  # each library fails in ways of its own
        raise UsageError(f"{name}: {part_problem(Path(name), part, args.variant, error)}") from error
    if missing:
        raise UsageError(f"{name}: its {part} lacks {len(missing)} tensors, such as {min(missing)}: copy it again")
    return loaded


def variants(folder: Path) -> set[str | None]:
    """Of the weights in a part's folder; None stands for the plain ones."""
    pattern = r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    names = [file.name for file in folder.glob("*")]
    return {match[1] for match in (re.fullmatch(pattern, name) for name in names) if match}


def is_lfs_pointer(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(LFS_START)


def part_problem(checkpoint: Path, part: str, variant: str | None, error: BaseException) -> str:
    """Why a part could not be loaded, and what to do about it; libraries name neither the part nor the remedy."""
    folder = checkpoint / part
    if not checkpoint.is_dir():  # the hub's
        return f"its {part} could not be loaded: {first_line(error)}"
    if not folder.is_dir():
        return f"it has no folder {part}: copy the whole checkpoint"
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if is_lfs_pointer(file):
            return f"{part}/{file.name} is {LFS_POINTER}"
        if not file.stat().st_size:
            return f"{part}/{file.name} is empty: copy it again"
    there = variants(folder)
    if part not in ("tokenizer", "scheduler") and (folder / "config.json").is_file() and not there & {variant, None}:
        found = f"only the variant {max(there)}: give --variant {max(there)}" if there else "no weights: copy them"
        return f"its {part} has {found}"
    if isinstance(error, ImportError):
        return f"its {part} needs a package that is not installed: {first_line(error)}"
    reason = "no plain file of tensors, it could run code" if "weights_only" in str(error) else first_line(error)
    return f"its {part} is damaged or incomplete ({reason}): copy the folder {part} again"


def load_unet_config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the checkpoint's UNet.

    Raises:
        UsageError: there are none, or its inputs are not those of Stable Diffusion 1.x/2.x.
    """
    try:
        options = {"revision": args.revision, "cache_dir": args.cache_dir}
        config = dict(UNet2DConditionModel.load_config(name, subfolder="unet", **options))
    except Exception as error:  # of the hub, of JSON, ...
        raise UsageError(f"{name}: {part_problem(Path(name), 'unet', args.variant, error)}") from error
    more = "class_embed_type num_class_embeds addition_embed_type class_embeddings_concat dual_cross_attention"
    for key in [*more.split(), "encoder_hid_dim_type"]:
        if config.get(key) and config[key] != "text_proj":
            raise UsageError(f"{name}: its UNet wants more than a caption ({key}), which is not supported")
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        raise UsageError(f"{name}: its UNet takes and gives other numbers of channels: only text-to-image models work")
    return config


def check_parts(tokenizer: Any, text_encoder: Any, vae: Any, unet_config: dict[str, Any], name: str) -> None:
    """The parts must fit each other; gives the tokenizer the length that the text encoder reads.

    Raises:
        UsageError: they do not, or the tokenizer has lost its vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    own = [token for token in list(vocabulary)[:1000] if token not in tokenizer.all_special_tokens]
    if tokenizer.pad_token is None:
        raise UsageError(f"{name}: its tokenizer has no pad_token, which tokenizer/tokenizer_config.json must name")
    if len({frozenset(ids) for ids in tokenizer(TEST_WORDS + own).input_ids}) == 1:
        raise UsageError(f"{name}: its tokenizer knows no words: copy the folder tokenizer with its vocabulary again")
    words = [token[:-4] for token in vocabulary if re.fullmatch("[a-z]{3,}</w>", token)][:1000]
    if words and sum(len(ids) > 1 for ids in tokenizer(words, add_special_tokens=False).input_ids) > len(words) / 2:
        raise UsageError(f"{name}: its tokenizer spells the words that it has: copy tokenizer/merges.txt again")
    highest, readable = max(vocabulary.values()), text_encoder.get_input_embeddings().num_embeddings
    if highest >= readable:
        raise UsageError(
            f"{name}: its tokenizer has ids up to {highest}, its text encoder reads {readable} of them: they are of "
            "different checkpoints, or tokens were added without resize_token_embeddings"
        )
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if positions is not None and "roberta" in text_encoder.config.model_type:
        positions -= text_encoder.config.pad_token_id + 1  # its positions begin after the padding's
    own_length = tokenizer.model_max_length
    tokenizer.model_max_length = min(own_length if own_length > 2 else math.inf, positions or 77)
    if getattr(text_encoder.config, "use_attention_mask", False):
        raise UsageError(f"{name}: its text encoder wants attention masks, which are not supported")
    channels = unet_config.get("in_channels", 4)
    if channels != vae.config.latent_channels:
        made = f"its UNet takes {channels} channels, its VAE makes {vae.config.latent_channels}"
        raise UsageError(f"{name}: {made}: only text-to-image models are supported, with the VAE that belongs to them")
    if not vae.config.get("scaling_factor"):
        raise UsageError(f"{name}: its VAE names no scaling_factor, which vae/config.json must")
    width = unet_config.get("encoder_hid_dim") or unet_config.get("cross_attention_dim", 1280)
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    ids = tokenizer("a", padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        made = list(text_encoder(ids)[0].shape)
    if len(made) != 3 or widths != {made[2]}:
        kind, wanted = type(text_encoder).__name__, f"[1, {made[1]}, {max(widths)}]"
        raise UsageError(f"{name}: its text encoder, {kind}, makes {made} of a caption, its UNet reads {wanted}")


def add_safety_checker(
    name: str, index: dict[str, Any], parts: dict[str, Any], dtype: torch.dtype, args: argparse.Namespace
) -> StableDiffusionPipeline:
    """The pipeline of the parts, with the checkpoint's safety checker, if it has one and --disable_... is not given."""
    if args.disable_safety_checker or not (index.get("safety_checker") or [None])[0]:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **rest)
    options = {"revision": args.revision, "cache_dir": args.cache_dir, "dtype": dtype}
    if args.variant in variants(Path(name, "safety_checker")):
        options["variant"] = args.variant
    try:
        return StableDiffusionPipeline.from_pretrained(name, **parts, image_encoder=None, **options)
    except Exception as error:  # each library fails in ways of its own
        part = "safety_checker"
        if Path(name, part).is_dir() and not Path(name, "feature_extractor/preprocessor_config.json").is_file():
            part = "feature_extractor"
        problem = part_problem(Path(name), part, args.variant, error)
        raise UsageError(f"{name}: {problem}, or give --disable_safety_checker") from error


def choose_scheduler(saved: Any, args: argparse.Namespace) -> Any:
    """The sampler that is asked for, or the checkpoint's own.

    Of the checkpoint's settings only what the UNet was trained with goes over to another sampler: what else stands
    there are the defaults of the sampler that it was saved with, and with them pictures would be others (DDIM clips
    its samples unless it is told not to, which a checkpoint saved with Euler does not say).
    """
    chosen = saved
    if args.scheduler is not None:
        kind = getattr(diffusers, SCHEDULERS[args.scheduler])
        settings = SAMPLER_SETTINGS | {key: saved.config[key] for key in TRAINED_WITH if key in saved.config}
        if not has_betas(saved):
            problem = f"the checkpoint's {type(saved).__name__} has no betas to go by"
            raise UsageError(f"--scheduler {args.scheduler}: {problem}; leave the flag out")
        # no sampler's default: the model wants its last timestep
        if saved.config.get("timestep_spacing") == "trailing":
            settings["timestep_spacing"] = "trailing"
        known = inspect.signature(kind.__init__).parameters
        settings = {key: value for key, value in settings.items() if key in known}
        try:
            chosen = kind(**settings)
        except Exception as error:  # a schedule of betas that this sampler does not know, say
            raise UsageError(f"--scheduler {args.scheduler}: {first_line(error)}; choose another one") from error
    try_scheduler(chosen, args)
    return chosen


def try_scheduler(scheduler: Any, args: argparse.Namespace) -> None:
    """Have it take one step with zeros, as what it cannot do shows only then.

    Raises:
        UsageError: it has not so many steps, or cannot paint with what the UNet predicts.
    """
    kind, steps, tried = type(scheduler).__name__, args.num_inference_steps, copy.deepcopy(scheduler)
    try:
        tried.set_timesteps(steps)
    except Exception as error:
        raise UsageError(f"--num_inference_steps {steps}: {kind} does not take them ({first_line(error)})") from error
    trained = tried.config.get("num_train_timesteps") or math.inf
    if max(tried.timesteps.tolist()) >= trained or steps >= trained:
        raise UsageError(f"--num_inference_steps {steps}: {kind} has {trained} timesteps, give fewer steps")
    try:
        sample = torch.zeros(1, 4, 8, 8) * tried.init_noise_sigma
        sample = tried.scale_model_input(sample, tried.timesteps[0])
        tried.step(sample, tried.timesteps[0], sample, return_dict=False)
    except Exception as error:
        raise UsageError(
            f"{kind} cannot be used with this checkpoint ({first_line(error)}): try --scheduler"
        ) from error


def check_clip_skip(text_encoder: Any, args: argparse.Namespace) -> None:
    if args.clip_skip is None:
        return
    if not hasattr(text_encoder, "final_layer_norm"):
        raise UsageError(f"--clip_skip is for CLIP: the checkpoint's text encoder is a {type(text_encoder).__name__}")
    layers = text_encoder.config.num_hidden_layers
    if args.clip_skip >= layers:
        raise UsageError(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers")
    # where diffusers looks for the layer norm, and transformers 5 no longer has it; as no module of its own, no part
    text_encoder.__dict__["text_model"] = text_encoder


def guidance_doubles(pipeline: StableDiffusionPipeline) -> bool:
    """Whether a batch has each picture twice, without and with its caption; not if the UNet takes the scale itself."""
    return pipeline.do_classifier_free_guidance


def pairs_guidance(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> bool:
    return bool(args.quantized_model_name_or_path) and guidance_doubles(pipeline) and not args.no_paired_guidance


def size_made_for(unet_config: dict[str, Any]) -> int | list[int] | None:
    """Latent edge, or height and width, that a checkpoint's UNet was made for; None where its config does not say."""
    size = unet_config.get("sample_size")
    if isinstance(size, int):
        match = re.match(r"0\.([0-8])\.", str(unet_config.get("_diffusers_version")))
        return max(64, size) if match else size  # before 0.9 they said 32, and the pipelines correct it
    return list(size) if isinstance(size, (list, tuple)) else None


def picture_size(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else what the checkpoint was made for.

    Raises:
        UsageError: the checkpoint does not say, or its VAE makes no such pictures.
    """
    pixels, made_for = pipeline.vae_scale_factor, pipeline.unet.config.sample_size or 0
    default = made_for if isinstance(made_for, list) else [made_for, made_for]
    height, width = args.height or default[0] * pixels, args.width or default[1] * pixels
    if not height or not width:
        raise UsageError(f"-m {args.pretrained_model_name_or_path} names no size: give --height and --width")
    if height % pixels or width % pixels:
        raise UsageError(f"--height {height} --width {width}: the checkpoint's VAE needs multiples of {pixels}")
    return height, width


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Have torch.compile make one program of it, where there is a C++ compiler; its cache outlives the process."""
    compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if unet.device.type == "cpu" and not any(map(shutil.which, compilers)):
        logger.warning("--compile: no C++ compiler (g++) here, so the UNet runs as it is")
        return
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    unet.forward = torch.compile(unet.forward)
    logger.info("compiling the UNet at the first step; this takes minutes unless it is cached")


def check_architecture(payload: dict[str, Any], base_config: dict[str, Any], name: str) -> None:
    """The file's UNet must be the checkpoint's: its text encoder and VAE fit no other, and no other gets built."""
    for key, default in unet_defaults().items():
        if key == "sample_size":  # of pictures, not of weights; diffusers corrects that of old checkpoints
            continue
        ours, theirs = payload["unet_config"].get(key, default), base_config.get(key, default)
        if not same_setting(ours, theirs):
            raise UsageError(
                f"-qm was trained from {shown(payload.get('base_model'))}, whose UNet has {key} {shown(ours)}; "
                f"that of -m {name} has {shown(theirs)}"
            )


def same_setting(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, (list, tuple)):  # JSON has no tuples
        return isinstance(ours, (list, tuple)) and len(ours) == len(theirs) and all(map(same_setting, ours, theirs))
    return type(ours) in (type(None), bool, int, float, str) and ours == theirs


# The sampler works in fp32 whatever the UNet computes in: its many small steps would lose bits in bf16.


def to_unet_dtype(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    dtype = unet.conv_norm_out.weight.dtype  # never int8, as conv_in may be

    def cast(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}


def to_fp32(unet: nn.Module, args: tuple, output: Any) -> Any:
    return tuple(value.float() for value in output)  # the pipeline asks for a tuple


# ---------------------------------------------------------------- painting


@dataclass
class Job:
    """One picture to paint."""

    caption: str
    number: int  # of the caption's pictures, from 0
    seed: int


@dataclass
class Painting:
    """What became of a job. status: ok, flagged (the safety checker blackened it) or non-finite (no picture)."""

    job: Job
    image: Image.Image | None
    status: str
    seconds: float


def initial_latents(pipeline: StableDiffusionPipeline, jobs: list[Job], height: int, width: int) -> torch.Tensor:
    """fp32 noise [N, 4, H/8, W/8], each picture's from its own seed: no batch, precision or device changes it."""
    shape = (pipeline.unet.config.in_channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(job.seed)) for job in jobs])


class PrecisionSwitch:
    """The pipeline's step callback: in the first and last K steps the int8 layers compute in float.

    These few run uncompiled under --compile, too: they would need a program of their own, and packed weights fit none.
    """

    def __init__(self, unet: UNet2DConditionModel, steps: int) -> None:
        self.layers, self.steps = [layer for layer in unet.modules() if isinstance(layer, Int8Layer)], steps
        self.set(steps > 0)

    def set(self, high_precision: bool) -> None:
        for layer in self.layers:
            layer.high_precision = high_precision
        torch.compiler.set_stance("force_eager" if high_precision else "default")

    def __call__(self, pipeline: StableDiffusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        coming = step + 1
        self.set(coming < self.steps or pipeline.num_timesteps - self.steps <= coming < pipeline.num_timesteps)
        return tensors


@torch.no_grad()
def paint(pipeline: StableDiffusionPipeline, jobs: list[Job], args: argparse.Namespace) -> list[Painting]:
    """Denoise, decode and check one batch of pictures."""
    began = time.perf_counter()
    height, width = picture_size(pipeline, args)
    latents = pipeline(
        [job.caption for job in jobs],
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=None if args.negative_prompt is None else [args.negative_prompt] * len(jobs),
        generator=[torch.Generator().manual_seed(job.seed) for job in jobs],  # for samplers that add noise
        latents=initial_latents(pipeline, jobs, height, width).to(pipeline.device),
        output_type="latent",
        clip_skip=args.clip_skip,
        callback_on_step_end=PrecisionSwitch(pipeline.unet, args.high_precision_steps),
    ).images
    vae = pipeline.vae
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
    decoded, flagged = pipeline.run_safety_checker(torch.nan_to_num(decoded), pipeline.device, vae.dtype)
    shown = [not flag for flag in flagged or [False] * len(jobs)]  # the checker's black is 0 of 0..1, not of -1..1
    images = pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=shown)
    seconds = (time.perf_counter() - began) / len(jobs)
    paintings = []
    for index, job in enumerate(jobs):
        status = "flagged" if flagged and flagged[index] else "ok" if finite[index] else "non-finite"
        paintings.append(Painting(job, images[index] if finite[index] else None, status, seconds))
    return paintings


# ---------------------------------------------------------------- saving


def peak_memory_gib() -> float:
    """The most memory that this process has held so far."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30


def safe_name(caption: str) -> str:
    """A caption as a file name on any system: one component that is not hidden, cut by bytes."""
    name = re.sub(NOT_IN_NAMES, " ", caption.encode("utf-8", "ignore").decode()).strip(" .")
    name = f"_{name}" if re.match(WINDOWS_DEVICES, name, re.IGNORECASE) else name
    name = name.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip(" .")
    return name or "untitled"


def free_path(folder: Path, name: str) -> Path:
    """folder/name.png, or with a number where that exists already."""
    path, count = folder / f"{name}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{name} ({count}).png"
    return path


def save_png(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        text.add_itxt(key, str(value))
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path} was not written: {error.strerror or first_line(error)}") from error


def save_painting(painting: Painting, facts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Write the picture and its row of results.jsonl; returns the row."""
    job = painting.job
    row = {"caption": job.caption, "seed": job.seed, "status": painting.status, **facts}
    row |= {"seconds": round(painting.seconds, 3), "peak_memory_gib": round(peak_memory_gib(), 3), "file": None}
    if painting.image is not None:
        path = free_path(args.output_dir, f"{safe_name(job.caption)} {facts['precision']} seed {job.seed}")
        row["file"] = path.name
        save_png(painting.image, path, row)
    results = args.output_dir / "results.jsonl"
    try:
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{results} was not written to: {error.strerror}; {row['file']} is there") from error
    if painting.status != "ok":
        meaning = {"flagged": "the safety checker blackened it", "non-finite": "numerical failure, no picture"}
        logger.warning(f"{job.caption!r}, seed {job.seed}: {meaning[painting.status]}")
    return row


def save_grid(images: list[Image.Image], name: str, facts: dict[str, Any], args: argparse.Namespace) -> Path:
    """All pictures of a caption in one, in rows of equal length as far as it goes."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    path = free_path(args.output_dir, f"{name} {facts['precision']}")
    save_png(grid, path, facts)
    return path


# ---------------------------------------------------------------- the flow


def run_facts(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What is true of every picture of this run: what was done, which may not be what was asked."""
    height, width = picture_size(pipeline, args)
    file = args.quantized_model_name_or_path and quant_model_file(args.quantized_model_name_or_path)
    around = {torch.float32: "fp32", torch.bfloat16: "bf16"}[pipeline.vae.dtype]
    weights = file.stat().st_size if file else sum(4 * weight.numel() for weight in pipeline.unet.parameters())
    doubled = guidance_doubles(pipeline)
    return {
        "steps": args.num_inference_steps,
        "height": height,
        "width": width,
        "guidance_scale": args.guidance_scale if doubled or pipeline.unet.config.time_cond_proj_dim else 1.0,
        "negative_prompt": args.negative_prompt if doubled else None,
        "scheduler": type(pipeline.scheduler).__name__,
        "clip_skip": args.clip_skip,
        "high_precision_steps": args.high_precision_steps,
        "paired_guidance": pairs_guidance(pipeline, args),
        "model": args.pretrained_model_name_or_path,
        "variant": args.variant,
        "quant_model": str(file) if file else None,
        "precision": "int8" if file else around,
        "dtype": around,
        "unet_mb": round(weights / 1e6, 1),
        "flags": args.flags,
    }


def say_what_is_cut(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> None:
    """Name the words that the text encoder does not read, and a negative prompt that nothing reads."""
    tokenizer, length = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    for prompt in filter(None, [*dict.fromkeys(args.captions), args.negative_prompt]):
        ids = tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1])
            logger.warning(
                f"the text encoder reads {length} of {len(ids)} tokens of {prompt[:60]!r}...; cut off: {cut[:1000]!r}"
            )
    if args.negative_prompt is not None and not guidance_doubles(pipeline):
        logger.warning("--negative_prompt has no effect here: without guidance, or with a UNet that takes its scale")


def keep_freed_memory() -> None:
    """Have glibc keep freed tensors for the next ones, whatever their size; other allocators have no such call.

    It gives those above 32 MiB back to the system, and the next one's every page is then a page fault, and cleared: a
    tenth of the time of a step at 512 pixels.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(parameter, value)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.describe:
        print(describe(args.quantized_model_name_or_path))
        return
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from error
    pipeline = load_pipeline(args)  # the checkpoint, with the int8 UNet where -qm is given
    pipeline.set_progress_bar_config(disable=True)
    say_what_is_cut(pipeline, args)
    facts = run_facts(pipeline, args)
    kind, weights, around = facts["precision"], facts["unet_mb"], facts["dtype"]
    logger.info(f"{kind} UNet ({weights} MB), {around} elsewhere, {torch.get_num_threads()} threads")
    jobs = [Job(caption, k, args.seed + k) for caption in args.captions for k in range(args.images_num)]
    waiting: list[Painting] = []  # pictures of the caption at hand, until its grid is complete
    failed = 0
    with tqdm(total=len(jobs), desc="pictures", disable=len(jobs) == 1) as progress:
        for start in range(0, len(jobs), args.batch_size):
            for painting in paint(pipeline, jobs[start : start + args.batch_size], args):
                save_painting(painting, facts, args)
                failed += painting.status == "non-finite"
                waiting.append(painting)
                if painting.job.number == args.images_num - 1:
                    images = [done.image for done in waiting if done.image is not None]
                    if images:
                        path = save_grid(images, safe_name(painting.job.caption), facts, args)
                        logger.info(f"{path}: {len(images)} picture(s), {painting.seconds:.1f} s each")
                    waiting.clear()
                progress.update()
    logger.info(
        f"{len(jobs) - failed} of {len(jobs)} pictures in {args.output_dir}, peak memory {peak_memory_gib():.2f} GiB"
    )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        if "--debug" in sys.argv:
            logging.exception("the traceback of the error below")
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
