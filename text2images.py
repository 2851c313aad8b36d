#!/usr/bin/env python
"""Paint captions with Stable Diffusion, with the int8 UNet of quant_model.pt or the full-precision one.

Reads a Stable Diffusion folder (or hub id, or one .safetensors file) and, with -qm, the file that
train_text_to_image_qat.py wrote. Writes one PNG a picture, one grid a caption, and a row a
picture in results.jsonl. The same seed gives the same noise to both UNets.

    python text2images.py -m demo/tiny-stable-diffusion -qm qat/quant_model.pt \\
        -c "a photo of an astronaut riding a horse on mars"

Next: leave out -qm, paint the same captions in fp32, and look at both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import mmap
import os
import pickletools
import re
import reprlib
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Importing these libraries on a CPU prints notices about GPU parts that are not there.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import diffusers
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from huggingface_hub import try_to_load_from_cache
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

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
PIPELINES += ("StableDiffusionXLPipeline",)
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")  # the latter two of SDXL alone
WITHOUT_WEIGHTS = ("tokenizer", "scheduler")  # names of parts begin so
KNOWN_CONDITIONING = (("encoder_hid_dim_type", "text_proj"), ("addition_embed_type", "text_time"))  # of UNets
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE")
LFS_START = b"version https://git-lfs"
LFS_POINTER = "a pointer of Git LFS, not the file itself: git lfs pull brings it"
SINGLE_FILES = (".safetensors", ".ckpt")  # whole checkpoints; the latter are pickles, which are not read
SINGLE_FILE_KINDS = ("v1", "v2", "xl_base")  # as diffusers calls them
# A tokenizer gives some of these different ids, unless it has lost its vocabulary.
TEST_WORDS = ["cat", "house", "sky", "water", "кот", "небо", "家", "空", "水", "集"]
NOT_OF_THE_PICTURE = ("captions", "captions_file", "images_num", "seed", "batch_size", "output_dir", "debug")
NOT_OF_THE_PICTURE += ("save_openvino",)
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


def lora_argument(text: str) -> tuple[Path, float]:
    """PATH[:WEIGHT] of --lora."""
    path, _, weight = text.rpartition(":")
    try:
        file, strength = (Path(path), float(weight)) if path else (Path(text), 1.0)
    except ValueError:  # a colon in the path
        file, strength = Path(text), 1.0
    if file.suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"{file} is no .safetensors, and what else holds a LoRA could run code")
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"{file}: no such file")
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{text}: the weight must be a number, such as 0.8")
    return file, strength


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
    text = "Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a hub id, or one FILE.safetensors; needed to paint"
    add("-m", "--pretrained_model_name_or_path", help=text)
    text = "folder or hub id that a single file's settings and tokenizers come from; by default what its keys tell"
    add("--config", metavar="FOLDER", help=text)
    add("-qm", "--quantized_model_name_or_path", type=Path, help="quant_model.pt, or the folder it is in")
    add("--describe", action="store_true", help="print what is in the file of -qm and end; needs no -m and no captions")
    text = "LoRAs (.safetensors of diffusers or kohya) that are fused into the model first, by this weight, else 1"
    add("--lora", nargs="+", type=lora_argument, metavar="PATH[:WEIGHT]", help=text)
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
    text = "what runs the int8 UNet; torch: in float, slower than fp32; auto: OpenVINO, but torch where CUDA is there"
    add("--engine", choices=["auto", "openvino", "torch"], default="auto", help=text)
    add("--device", default="CPU", help="OpenVINO's name of the device that runs the int8 UNet: CPU, GPU, GPU.1, ...")
    text = "also write all as OpenVINO models, for OpenVINO GenAI (Python, C++) and optimum-intel; no captions needed"
    add("--save_openvino", type=Path, metavar="FOLDER", help=text)
    add("--disable_safety_checker", action="store_true", help="paint even what the checkpoint's own checker flags")
    add = parser.add_argument_group("pictures").add_argument
    add("-c", "--captions", nargs="+", default=[], help="what to paint")
    add("--captions_file", type=Path, help="more captions, one a line, UTF-8")
    add("-n", "--images_num", type=int, default=1, help="pictures of each caption; picture k has seed + k")
    add("-s", "--seed", type=int, default=42, help="of the first picture of each caption")
    add("--num_inference_steps", type=int, default=50, help="denoising steps")
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
    if not args.captions and args.save_openvino is None:
        parser.error("nothing to paint: give -c CAPTION or --captions_file FILE")
    for name in ("images_num", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("height", "width"):
        edge = getattr(args, name)
        if edge is not None and (edge < 8 or edge % 8):
            parser.error(f"--{name} {edge} must be a multiple of 8: {max(8, edge // 8 * 8)} would do")
    if (args.clip_skip or 0) < 0:
        parser.error("--clip_skip must not be negative")
    for name in ("engine", "device", "save_openvino", "no_paired_guidance"):
        if getattr(args, name) != parser.get_default(name) and args.quantized_model_name_or_path is None:
            parser.error(f"--{name} is for int8: give -qm too, or leave it out")
    if args.engine == "torch" and (args.device != "CPU" or args.save_openvino is not None):
        parser.error("--device and --save_openvino are for --engine openvino")
    if args.save_openvino is not None and args.save_openvino.exists():
        parser.error(f"--save_openvino {args.save_openvino} exists: delete it, or name another folder")
    if not 0 <= args.seed < 2**63 - args.images_num:
        parser.error("--seed must be a non-negative 64-bit number")
    return args


# ---------------------------------------------------------------- int8 layers
#
# The convention of quant_model.pt: a weight is worth q * weight_scale[out], q int8; an input is worth
# (q - zero_point) * input_scale, q = clamp(round(x / input_factor[in] / input_scale) + zero_point, 0, 255), uint8.
# The weights hold the input factors. A layer with int8 weights but no input_scale computes in float, without factors.
# Of an input with a caption, only what differs from the one without is quantized, in steps of its own: pair_guidance.


class Int8Layer(nn.Module):
    """A Linear or Conv2d of quant_model.pt in plain PyTorch: in float, the numbers that int8 kernels compute.

    OpenVINO's converter knows these very expressions, and makes int8 kernels of them.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, quantize_input: bool) -> None:
        super().__init__()
        is_conv = isinstance(layer, nn.Conv2d)
        out_channels, in_channels = layer.weight.shape[0], layer.weight.shape[1] * (layer.groups if is_conv else 1)
        self.register_buffer("weight", torch.empty(layer.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_channels))
        self.register_buffer("input_factor", torch.empty(in_channels))
        self.register_buffer("bias", None if layer.bias is None else torch.empty(out_channels))
        if quantize_input:
            self.register_buffer("input_scale", torch.empty(()))
            self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int32))
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups) if is_conv else None
        self.quantize_input, self.paired = quantize_input, False

    def make_ready(self) -> None:
        """Give the tensors of the file the shapes to broadcast, and have the quantizer's as plain numbers."""
        ones = [1] * (self.weight.dim() - 2)
        self.weight_scale = self.weight_scale.view(-1, 1, *ones)
        self.input_factor = self.input_factor.view(-1, *ones)
        if self.quantize_input:
            self.scale, self.zero_point = self.input_scale.item(), self.input_zero_point.item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2) if self.paired else (x.float(), None)
        values = first / self.input_factor
        if self.quantize_input:
            values = torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, 255)
        output = self.compute(values.to(x.dtype), self.bias)
        if second is None:
            return output
        changes = (second - first) / self.input_factor
        # The range is not known before, as the input's is: it depends on the caption and falls with the noise. So each
        # sample has its own, [B, 1, ...]; changes too small for a thousandth of the input's steps do not count.
        # (Four dimensions, as OpenVINO 2026.4 gives every sample the scale of the first where there are three.)
        largest = changes.abs().reshape(-1, *[1] * (4 - x.dim()), *x.shape[1:]).amax(dim=(1, 2, 3), keepdim=True)
        scales = (largest / 127).clamp(min=self.scale / 1000).view(-1, *[1] * (x.dim() - 1))
        changes = torch.fake_quantize_per_tensor_affine(changes / scales, 1.0, 0, -128, 127)
        return torch.cat([output, output + self.compute(changes.to(x.dtype), None) * scales.to(x.dtype)])

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = (self.weight.float() * self.weight_scale).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias) if self.geometry is None else F.conv2d(x, weight, bias, *self.geometry)


# ---------------------------------------------------------------- reading quant_model.pt

# All that the pickle inside may name; torch.load(weights_only=True) would also allow, say, bytearray(10**12).
PICKLE_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
PICKLE_NAMES |= {f"torch {kind}Storage" for kind in ("Char", "Int", "Half", "BFloat16", "Float")}
MAX_INDEX_BYTES, MAX_OPCODES = 1 << 20, 200_000  # of the pickle; that of SDXL has 0.6 MiB and 127,000
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
    loras = payload.get("loras") if isinstance(payload.get("loras"), list) else []
    lines = [
        f"{path}: {size / 1e6:.1f} MB, {size / fp32:.3f} of the same UNet in fp32 ({fp32 / 1e6:.1f} MB)",
        f"format {payload['format']}, version {payload['format_version']}",
        f"a UNet of {said(payload.get('pipeline', 'StableDiffusionPipeline'))}",
        f"trained from {said(payload.get('base_model'))}",
        *(f"with a LoRA: {said(lora)}" for lora in loras),
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


def build_int8_unet(
    payload: dict[str, Any], dtype: torch.dtype, device: torch.device, paired: bool = False
) -> UNet2DConditionModel:
    """A diffusers UNet with int8 layers, filled from the file; the full-precision UNet is never made.

    Raises:
        UsageError: the tensors do not fit the architecture that the file names.
    """
    state_dict, config = payload["state_dict"], payload["unet_config"]
    scales = (".weight_scale", ".input_scale")
    int8_names = sorted({name.rpartition(".")[0] for name in state_dict if name.endswith(scales)})
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config({key: config[key] for key in unet_defaults() if key in config})
            for name in int8_names:
                parent, _, child = name.rpartition(".")
                layer = unet.get_submodule(name)
                if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                    raise ValueError(f"{name} is neither Linear nor Conv2d")
                int8 = Int8Layer(layer, quantize_input=f"{name}.input_scale" in state_dict)
                setattr(unet.get_submodule(parent), child, int8)
        check_fit(state_dict, unet.state_dict(), set(int8_names))
        unet.load_state_dict(state_dict, assign=True)
    except Exception as error:  # a wrong config fails inside diffusers in its own ways
        raise UsageError(f"quant_model.pt does not fit its own architecture: {str(error).splitlines()[0]}") from error
    for module in unet.to(device).modules():
        if isinstance(module, Int8Layer):
            module.make_ready()
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    if paired:
        pair_guidance(unet)
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


def pairs_guidance(unet_config: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether int8 layers take the two halves of a batch together: where guidance doubles it, unless told not to."""
    return guidance_doubles(unet_config, args) and not args.no_paired_guidance


def guidance_doubles(unet_config: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the pipeline's batch has each picture twice, without caption and with it.

    Not where the UNet takes the guidance scale as an input (LCM's).
    """
    return args.guidance_scale > 1 and unet_config.get("time_cond_proj_dim") is None


def pair_guidance(unet: UNet2DConditionModel) -> None:
    """With guidance, the batch's second half is its first half with captions: quantize only what they change there.

    Guidance multiplies the difference of the two outputs, and with it the roundings in which the two inputs differ. A
    change is smaller than an input, and so are its steps; as every layer is linear, what it makes of the change is the
    difference of its outputs. (Ditto, arXiv 2501.11211, computes what changes from timestep to timestep.) Not so the
    layers that make attention's queries, keys and values: paired as well, they are worth 0.1 dB in latents.
    """
    for name, layer in unet.named_modules():
        if isinstance(layer, Int8Layer) and layer.quantize_input:
            layer.paired = not name.endswith(("to_q", "to_k", "to_v"))


# ---------------------------------------------------------------- the int8 UNet in OpenVINO

DEVICE_PROPERTIES = "FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"
GRAPH_VERSION = 1  # to be raised with every change of what unet_to_openvino makes: older files are then made anew


def import_openvino() -> Any:
    """OpenVINO, which runs int8 on Intel CPUs; nothing is sent anywhere.

    Importing its converter would report that over the network; without this package, a stub takes its place.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@functools.cache
def openvino_core() -> Any:
    """The process's only Core, which is never freed.

    OpenVINO 2026.4 gives the main thread a stack for signal handlers that belongs to the Core: where one of several is
    freed, the next signal, Ctrl-C say, kills the process.
    """
    return import_openvino().Core()


def trace(
    compute: Callable[..., Any], inputs: dict[str, torch.Tensor], sizes: dict[str, list[int]], *outputs: str
) -> Any:
    """An OpenVINO model of what `compute` makes of its inputs; -1 is a size that may be chosen later."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on sizes that diffusers asserts, and that are the same for all inputs
        # OpenVINO would trace by itself, and then once more to compare: minutes for SD v1.5
        traced = torch.jit.trace(compute, tuple(inputs.values()), check_trace=False, strict=False)
        model = import_openvino().convert_model(traced, input=list(sizes.values()))
    for port, name in zip([*model.inputs, *model.outputs], [*inputs, *outputs]):
        port.set_names({name})
    # By default OpenVINO quantizes the inputs of layers with int8 weights alone, too: 1 dB less.
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def input_sizes(config: Any) -> dict[str, list[int]]:
    """Sizes of the graph's inputs by name, -1 where any will do; from the fourth on, what not all UNets have."""
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else max(width)
    sizes = {"sample": [-1, config.in_channels, -1, -1], "timestep": [1], "encoder_hidden_states": [-1, -1, width]}
    if config.time_cond_proj_dim is not None:  # the guidance scale's embedding
        sizes["timestep_cond"] = [-1, config.time_cond_proj_dim]
    if config.addition_embed_type == "text_time":  # SDXL's sizes and crop; pooled text encoding
        sizes["time_ids"] = [-1, 6]
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes["text_embeds"] = [-1, pooled]
    return sizes


def unet_to_openvino(unet: UNet2DConditionModel) -> Any:
    """sample [B, 4, H/8, W/8], timestep [1], encoder_hidden_states [B, L, D] -> out_sample, as OpenVINO's model.

    Inputs that not all UNets have follow: timestep_cond [B, time_cond_proj_dim], the guidance scale's embedding; and
    SDXL's time_ids [B, 6] and text_embeds [B, D'].
    """
    sizes = input_sizes(unet.config)
    more = list(sizes)[3:]
    edges = 17, 19  # odd, as only then diffusers upsamples to the sizes it finds: so the graph fits all
    examples = {"sample": torch.randn(2, unet.config.in_channels, *edges), "timestep": torch.tensor([500.0])}
    examples["encoder_hidden_states"] = torch.randn(2, 77, sizes["encoder_hidden_states"][2])
    examples |= {name: torch.randn(2, sizes[name][1]) for name in more}

    def predict(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        named = dict(zip(more, rest))
        cond = named.pop("timestep_cond", None)
        return unet(sample, timestep, text, timestep_cond=cond, added_cond_kwargs=named, return_dict=False)[0]

    model = trace(predict, examples, sizes, "out_sample")
    store_as_fp16(model)
    return model


def store_as_fp16(model: Any) -> None:
    """Keep in fp16 what quant_model.pt has in fp16: OpenVINO compresses no quantized model by itself."""
    ov = import_openvino()
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.f32 and node.data.size > 1000:
            with np.errstate(over="ignore"):
                half = node.data.astype(np.float16)
            if np.array_equal(half, node.data):
                single = ov.opset13.convert(ov.opset13.constant(half), "f32").output(0)
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(single)


def cached(file: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder of that name beside quant_model.pt, or in the user's cache folder where that cannot be written.

    Where there is none, or a damaged one, `write` makes it, and those of earlier contents of the file go.

    Raises:
        UsageError: it cannot be written to either.
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-unet-int8"
    folders, problems = [file.with_suffix(".openvino") / name, user_cache / name], []
    for folder in folders:
        if is_whole(folder):
            return folder
    for folder in folders:
        try:
            write_folder(folder, write)
            size = sum(part.stat().st_size for part in folder.iterdir())
            logger.info(f"kept in {folder} ({size / 1e6:.1f} MB); it may be deleted at any time")
            for other in folders[0].parent.glob("*-*"):
                if other.name.partition("-")[0] != name.partition("-")[0]:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
        except (OSError, RuntimeError) as error:
            if is_whole(folder):  # another process was faster
                return folder
            problems.append(f"{folder.parent} ({str(error).strip().splitlines()[-1]})")
    raise UsageError(
        f"-qm {file}: OpenVINO's form of it was not made in {' or '.join(problems)}: free space there, or set "
        "XDG_CACHE_HOME to a folder that has some"
    )


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder, which gets its name when it is complete, and holds the checksums of its files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".openvino.*.partial"):  # by a run that was killed; others may be at work
        with contextlib.suppress(FileNotFoundError):  # whose run has just ended
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    name = {"prefix": ".openvino.", "suffix": ".partial", "dir": folder.parent}
    with tempfile.TemporaryDirectory(**name, ignore_cleanup_errors=True) as partial:
        inner = Path(partial) / folder.name
        inner.mkdir()
        write(inner)
        sums = {path.relative_to(inner).as_posix(): sha256(path) for path in inner.rglob("*") if path.is_file()}
        (inner / "SHA256SUMS.json").write_text(json.dumps(sums))
        if folder.exists():  # damaged, or it would have been used
            folder.rename(Path(partial) / "damaged")
        inner.rename(folder)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / "SHA256SUMS.json").read_text())
        return bool(sums) and all(sha256(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):  # not there, or damaged
        return False


class OpenVINOUNet(UNet2DConditionModel):
    """The pipeline's UNet, run by OpenVINO.

    It is compiled for the very sizes of its inputs, as int8 is 1.3 times faster so; one compiled model is kept, as each
    holds its own copy of the weights.
    """

    def __init__(
        self, payload: dict[str, Any], args: argparse.Namespace, more_settings: dict[str, Any] | None = None
    ) -> None:
        self.stand_in_for(settings_of_unet(payload))
        self.args, self.core = args, openvino_core()
        self.settings = openvino_settings(args) | (more_settings or {})
        try:
            self.quantize_inputs = kernels_are_exact(args.device)
            self.about_device = [self.core.get_property(args.device, name) for name in DEVICE_PROPERTIES]
        except RuntimeError as error:
            there = ", ".join(self.core.available_devices)
            raise UsageError(f"--device {args.device}: OpenVINO cannot use it; there is {there}") from error
        self.about_device.append(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        self.name = graph_name(payload, args)

    def stand_in_for(self, config: dict[str, Any]) -> None:
        """Have what the pipeline asks a UNet of these settings for, without its layers; nothing is compiled yet."""
        ModelMixin.__init__(self)
        self.register_to_config(**config)
        self.more_inputs = list(input_sizes(self.config))[3:]
        if "text_embeds" in self.more_inputs:  # the pipeline looks there for the width of its conditioning
            width = self.config.projection_class_embeddings_input_dim
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self.register_buffer("none", torch.empty(0))  # the pipeline asks for a device and a dtype
        self.shapes: list[list[int]] = []
        self.compiled: list[Any] = []
        self.seconds_compiling = 0.0

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor]:
        more = {"timestep_cond": timestep_cond, **(added_cond_kwargs or {})}
        inputs = [sample, torch.as_tensor(timestep).reshape(1), encoder_hidden_states]
        inputs += [more[name] for name in self.more_inputs]
        shapes = [list(tensor.shape) for tensor in inputs]
        if shapes != self.shapes:
            began = time.perf_counter()
            self.compile_for(shapes)
            self.seconds_compiling += time.perf_counter() - began
        return (torch.from_numpy(self.compiled[-1].infer([tensor.float().numpy() for tensor in inputs])[0]),)

    def compile_for(self, shapes: list[list[int]]) -> None:
        """Load what was compiled for these sizes before, or compile.

        OpenVINO's own CACHE_DIR would do so, too, but reads all weights of the model that is to be compiled, only to
        see that it is the same: 0.8 GiB more at the peak for SD v1.5.
        """
        self.shapes, self.compiled = shapes, []  # frees the memory of the one before
        file = quant_model_file(self.args.quantized_model_name_or_path)

        def write(folder: Path) -> None:
            logger.info(f"compiling for {shapes[0]} latents: this is done once for each size and batch")
            model = self.core.read_model(self.model_file())
            model.reshape(dict(enumerate(shapes)))
            if not self.quantize_inputs:
                leave_inputs_in_float(model)
            compiled = self.core.compile_model(model, self.args.device, self.settings)
            (folder / "unet.blob").write_bytes(compiled.export_model().getbuffer())

        name = f"{self.name}-{digest(shapes, self.quantize_inputs, self.settings, self.about_device)}"
        blob = cached(file, name, write) / "unet.blob"
        with open(blob, "rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensor = import_openvino().Tensor(np.frombuffer(memory, np.uint8), shared_memory=True)
        compiled = self.core.import_model(tensor, self.args.device, self.settings)
        if hasattr(mmap, "MADV_DONTNEED"):  # the weights were packed: what was read from the file may leave memory
            memory.madvise(mmap.MADV_DONTNEED)
        self.compiled = [memory, tensor, compiled, compiled.create_infer_request()]

    def model_file(self) -> Path:
        """unet.xml, with unet.bin beside it: OpenVINO's form of quant_model.pt, for any size; made at its first use."""
        file = quant_model_file(self.args.quantized_model_name_or_path)

        def write(folder: Path) -> None:
            logger.info("making OpenVINO's form of quant_model.pt: this is done once")
            payload = read_quant_model(file)
            if graph_name(payload, self.args) != self.name:
                raise UsageError(f"-qm {file}: the file was replaced while it was in use; start again")
            paired = pairs_guidance(payload["unet_config"], self.args)
            unet = build_int8_unet(payload, torch.float32, torch.device("cpu"), paired)
            import_openvino().save_model(unet_to_openvino(unet), folder / "unet.xml", compress_to_fp16=False)

        return cached(file, self.name, write) / "unet.xml"


def graph_name(payload: dict[str, Any], args: argparse.Namespace) -> str:
    """Of OpenVINO's form of a quant_model.pt, by all that decides what is in it."""
    versions = [GRAPH_VERSION, *(library.__version__ for library in (import_openvino(), torch, diffusers))]
    paired = pairs_guidance(payload["unet_config"], args)
    return f"{payload['checksum'][:16]}-{digest(settings_of_unet(payload), versions, paired)}"


def settings_of_unet(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: payload["unet_config"].get(key, default) for key, default in unet_defaults().items()}


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def leave_inputs_in_float(model: Any) -> None:
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize":
            node.output(0).replace(node.input_value(0))


def openvino_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How compile_model is to compile for --device."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if args.device == "CPU":  # unpinned, as what PyTorch does afterwards would inherit the cores
        precision = "bf16" if choose_dtype(args) == torch.bfloat16 else "f32"
        settings |= {"INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False}
        settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    elif args.dtype == "float32":
        settings |= {"INFERENCE_PRECISION_HINT": "f32"}
    return settings


def kernels_are_exact(device: str) -> bool:
    """Whether the device's int8 kernels compute what integers would.

    CPUs without VNNI add pairs of products in 16 bits, which saturates without a word; the largest values show it.
    """
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(192, 256, (2, 64, 8, 8), generator=generator).float() - 7
    for layer, x in ((nn.Linear(64, 32, bias=False), levels[:, :, 0, 0]), (nn.Conv2d(64, 32, 3, bias=False), levels)):
        int8 = Int8Layer(layer, quantize_input=True)
        int8.weight = torch.randint(96, 128, layer.weight.shape, dtype=torch.int8, generator=generator)
        int8.weight_scale, int8.input_factor = torch.full((32,), 0.5), torch.ones(64)
        int8.input_scale, int8.input_zero_point = torch.tensor(1.0), torch.tensor(7)
        int8.make_ready()
        model = trace(int8, {"x": x}, {"x": list(x.shape)}, "y")
        compiled = openvino_core().compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})
        if not np.allclose(compiled([x.numpy()])[0], int8(x)):
            return False
    return True


# ---------------------------------------------------------------- the pipeline


def choose_engine(args: argparse.Namespace) -> str:
    """What runs the UNet: openvino or torch.

    Raises:
        UsageError: OpenVINO is asked for, but does not import.
    """
    if args.quantized_model_name_or_path is None or args.engine == "torch":
        return "torch"
    needed = args.engine == "openvino" or args.device != "CPU" or args.save_openvino is not None
    if torch.cuda.is_available() and not needed:
        return "torch"
    try:
        import_openvino()
        return "openvino"
    except ImportError as error:
        remedy = f"OpenVINO does not import ({error}): pip install -r requirements.txt"
        if needed:
            raise UsageError(remedy) from error
        logger.warning(f"--engine torch, which computes in float and is slower, as {remedy}")
        return "torch"


def load_int8_unet(
    payload: dict[str, Any], dtype: torch.dtype, device: torch.device, engine: str, args: argparse.Namespace
) -> UNet2DConditionModel:
    """The file's UNet, to be run by `engine`; says how many of its layers are int8."""
    if engine == "openvino":
        unet = OpenVINOUNet(payload, args)
        how = f"OpenVINO on {args.device}"
        how += "" if unet.quantize_inputs else ", in float, as its int8 kernels saturate here (no VNNI)"
    else:
        unet = build_int8_unet(payload, dtype, device, pairs_guidance(payload["unet_config"], args))
        how = f"PyTorch in float on {device.type}"
    names = payload["state_dict"]
    layers = sum(name.endswith(".weight") and tensor.dim() > 1 for name, tensor in names.items())
    int8, scaled = (sum(name.endswith(part) for name in names) for part in (".input_scale", ".weight_scale"))
    rest = f"{scaled - int8} more with int8 weights and float arithmetic"
    logger.info(f"{int8} of {layers} Linear and Conv2d layers in int8 ({rest}), by {how}")
    return unet


def choose_dtype(args: argparse.Namespace) -> torch.dtype:
    if args.quantized_model_name_or_path is not None and args.save_openvino is not None:
        return torch.float32  # what is written loses nothing
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
        UsageError: no Stable Diffusion there, a part is damaged, or the file is for another architecture.
    """
    name, dtype, engine = checkpoint_name(args), choose_dtype(args), choose_engine(args)
    device = torch.device("cuda" if torch.cuda.is_available() and engine == "torch" else "cpu")
    if name != args.pretrained_model_name_or_path:
        logger.info(f"{args.pretrained_model_name_or_path} has left the hub; using its copy {name}")
    index = load_index(name, args)
    unet_config = load_unet_config(name, args)
    if args.quantized_model_name_or_path is not None:
        payload = read_quant_model(args.quantized_model_name_or_path)
        check_kind(payload, index, name)
        check_architecture(payload, unet_config, name)
        check_loras(payload, args)
    first_dtype = torch.float32 if args.lora else dtype  # fused as in training
    parts = {part: load_part(name, index, part, args, first_dtype) for part in [*text_parts(index), "vae", "scheduler"]}
    check_parts(parts, unet_config, name)
    check_clip_skip(text_encoders(parts), args)
    parts["scheduler"] = choose_scheduler(parts["scheduler"], args)
    if args.quantized_model_name_or_path is not None:
        parts["unet"] = load_int8_unet(payload, dtype, device, engine, args)
        del payload
    else:
        parts["unet"] = load_part(name, index, "unet", args, first_dtype).to(memory_format=torch.channels_last)
    parts["vae"].to(memory_format=torch.channels_last)
    pipeline, int8 = add_safety_checker(name, index, parts, dtype, args), args.quantized_model_name_or_path is not None
    if args.lora:
        fuse_loras(pipeline, args, with_unet=not int8)
        for part in [*text_encoders(parts), parts["vae"], *([] if int8 else [parts["unet"]])]:
            part.to(dtype)
    pipeline.unet.register_to_config(sample_size=size_made_for(unet_config))  # int8 and fp32 alike
    if not isinstance(pipeline.unet, OpenVINOUNet):
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
    source = settings_source(name, args)
    folder, given = Path(source), f"--pretrained_model_name_or_path {name}"
    if source != name:
        given += f", --config {source}" if args.config else f", whose settings are those of {source}"
    elif args.config:
        raise UsageError(f"--config is for a single .safetensors file, which {name} is not: leave it out")
    if "://" in source:
        raise UsageError(f"{given}: give a hub id such as owner/model, or a folder")
    if (folder.exists() or folder.suffix in SINGLE_FILES) and not (folder / "model_index.json").is_file():
        raise UsageError(f"{given}: {no_checkpoint(folder)}")
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UsageError(f"{given}: no such folder, and no hub id such as owner/model")
    try:
        index = dict(StableDiffusionPipeline.load_config(source, **hub_options(args)))
        kind = index["_class_name"]
    except Exception as error:  # of the hub, of JSON, ...
        damaged = f"model_index.json is damaged, copy it again ({first_line(error)})"
        reason = damaged if folder.exists() else f"no such folder, and not to be had from the hub: {first_line(error)}"
        remedy = ": give --config FOLDER, a checkpoint of its kind, of which no weights are needed" * (source != name)
        raise UsageError(f"{given}: {reason}{remedy}") from error
    if kind not in PIPELINES:
        raise UsageError(f"{source} is a {kind}; only Stable Diffusion 1.x, 2.x and XL are supported")
    if is_single_file(name) and is_xl(index) != is_xl_file(name):
        raise UsageError(f"{name} is {'no ' * is_xl(index)}SDXL by its keys, but --config {source} is a {kind}")
    return index


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def is_single_file(name: str) -> bool:
    return name.endswith(SINGLE_FILES[0]) and Path(name).is_file()


def settings_source(name: str, args: argparse.Namespace) -> str:
    """Folder or hub id with the settings and tokenizers: the checkpoint itself, unless that is a single file.

    Raises:
        UsageError: the file is no Stable Diffusion.
    """
    if not is_single_file(name):
        return name
    if args.variant:
        raise UsageError(f"--variant {args.variant} is for a folder, which {name} is not: leave it out")
    kind = single_file_kind(name)
    if args.config:
        return args.config
    if kind not in SINGLE_FILE_KINDS:
        raise UsageError(f"{name} is a checkpoint of kind {kind}; only {', '.join(SINGLE_FILE_KINDS)} are supported")
    return single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def is_xl_file(name: str) -> bool:
    return any(key.startswith("conditioner.embedders.1.") for key in load_file(name))


@functools.cache
def single_file_kind(name: str) -> str:
    """What diffusers makes of its tensors' names and shapes."""
    if is_lfs_pointer(name):
        raise UsageError(f"{name} is {LFS_POINTER}")
    try:
        tensors = load_file(name)  # which maps them, and reads none
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{name} is damaged ({first_line(error)}): copy it again") from error
    if not any(key.startswith("model.diffusion_model.") for key in tensors):
        raise UsageError(f"{name} is no whole checkpoint of Stable Diffusion: it has no model.diffusion_model")
    return single_file_utils.infer_diffusers_model_type(tensors)


def is_xl(index: dict[str, Any]) -> bool:
    return "XL" in index["_class_name"]


def pipeline_kind(index: dict[str, Any]) -> str:
    """Of which quant_model.pt is."""
    return "StableDiffusionXLPipeline" if is_xl(index) else "StableDiffusionPipeline"


def text_parts(index: dict[str, Any]) -> tuple[str, ...]:
    """Tokenizer and text encoder, or two of each."""
    return TEXT_PARTS if is_xl(index) else TEXT_PARTS[:2]


def text_encoders(parts: dict[str, Any]) -> list[PreTrainedModel]:
    return [part for name, part in parts.items() if name.startswith("text_encoder")]


def make_pipeline(index: dict[str, Any], parts: dict[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline of the parts, without a safety checker."""
    if is_xl(index):
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **rest)


def encode_captions(encoders: list[PreTrainedModel], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the UNet is told of captions, whose ids are [B, encoders, L]: encoder_hidden_states [B, L, D].

    SDXL (arXiv 2307.01952) joins what the last layer but one of both encoders gives, and has text_embeds [B, P] of the
    second one besides.
    """
    if len(encoders) == 1:
        return {"encoder_hidden_states": encoders[0](input_ids[:, 0])[0]}
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(dim=1))]
    hidden_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": hidden_states, "text_embeds": outputs[-1][0]}


def no_checkpoint(path: Path) -> str:
    """Why there is no model_index.json at the path, and what to give instead."""
    single = [file for file in (sorted(path.glob("*")) if path.is_dir() else [path]) if file.suffix in SINGLE_FILES]
    nested = [file.parent for below in ("*", "snapshots/*") for file in path.glob(f"{below}/model_index.json")]
    if nested:
        return f"the checkpoint is one level down: give {nested[0]}"
    if (path.parent / "model_index.json").is_file():
        return f"a part of a checkpoint: give the whole, {path.parent}"
    if single and single[0].suffix == SINGLE_FILES[0] and single[0].is_file():
        return f"a folder without model_index.json: give the file in it, {single[0]}"
    if single and single[0].is_file():
        convert = f"P.from_single_file('{single[0]}').save_pretrained('FOLDER')"
        return (
            f"{single[0].name} is a pickle, which could run code; where you trust it, make a diffusers folder of it: "
            f'python -c "from diffusers import StableDiffusionPipeline as P; {convert}"'
        )
    if single:
        return "no such file"
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
    options: dict[str, Any] = {"subfolder": part, **hub_options(args)}
    missing = []
    try:
        if part.startswith(WITHOUT_WEIGHTS):
            return getattr(found, kind).from_pretrained(settings_source(name, args), **options)
        if is_single_file(name):
            return aligned(from_single_file(name, index, part, args, dtype))
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
        raise UsageError(f"{name}: {part_problem(Path(name), part, args, error)}") from error
    if missing:
        raise UsageError(f"{name}: its {part} lacks {len(missing)} tensors, such as {min(missing)}: copy it again")
    return aligned(loaded)


def aligned(model: nn.Module) -> nn.Module:
    """With weights where vector instructions want them, whatever file they lie in.

    Products with a single row, such as a timestep's, sum in another order where the weight is not aligned (measured;
    those with more rows do not). Weights above 16 MiB meet none, and copies of them would count twice in memory.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.data_ptr() % 64 and tensor.nbytes <= 16 << 20:
            tensor.data = tensor.data.clone()
    return model


def from_single_file(name: str, index: dict[str, Any], part: str, args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A part with weights out of one file, in the original layout of Stable Diffusion, by diffusers."""
    others = [other for other, named in index.items() if isinstance(named, (list, tuple)) and other != part]
    whole = StableDiffusionXLPipeline if is_xl(index) else StableDiffusionPipeline
    options = {"config": settings_source(name, args), **hub_options(args), **dict.fromkeys(others)}
    try:
        loaded = getattr(whole.from_single_file(name, dtype=dtype, **options), part)
    except NotImplementedError as error:  # a tensor that the file lacks has no data to be moved
        raise ValueError("it lacks tensors") from error
    if any(tensor.is_meta for tensor in loaded.state_dict().values()):
        raise ValueError("it lacks tensors")
    return loaded


def variants(folder: Path) -> set[str | None]:
    """Of the weights in a part's folder; None stands for the plain ones."""
    pattern = r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    names = [file.name for file in folder.glob("*")]
    return {match[1] for match in (re.fullmatch(pattern, name) for name in names) if match}


def is_lfs_pointer(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(LFS_START)


def part_problem(checkpoint: Path, part: str, args: argparse.Namespace, error: BaseException) -> str:
    """Why a part could not be loaded, and what to do about it; libraries name neither the part nor the remedy."""
    folder = checkpoint / part
    if checkpoint.is_file():
        return f"its {part} could not be loaded: {first_line(error)}; is --config a checkpoint of the same kind?"
    if not checkpoint.is_dir():  # the hub's; without a network, what is in the cache
        index = try_to_load_from_cache(str(checkpoint), "model_index.json", args.cache_dir, args.revision)
        there = variants(Path(index).parent / part) if isinstance(index, str) else set()
        if there and not there & {args.variant, None}:
            return f"its {part} is in the cache only as the variant {max(there)}: give --variant {max(there)}"
        return f"its {part} could not be loaded: {first_line(error)}"
    if not folder.is_dir():
        return f"it has no folder {part}: copy the whole checkpoint"
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if is_lfs_pointer(file):
            return f"{part}/{file.name} is {LFS_POINTER}"
        if not file.stat().st_size:
            return f"{part}/{file.name} is empty: copy it again"
    there = variants(folder)
    if not part.startswith(WITHOUT_WEIGHTS) and (folder / "config.json").is_file() and not there & {args.variant, None}:
        found = f"only the variant {max(there)}: give --variant {max(there)}" if there else "no weights: copy them"
        return f"its {part} has {found}"
    if isinstance(error, ImportError):
        return f"its {part} needs a package that is not installed: {first_line(error)}"
    reason = "no plain file of tensors, it could run code" if "weights_only" in str(error) else first_line(error)
    return f"its {part} is damaged or incomplete ({reason}): copy the folder {part} again"


def load_unet_config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the checkpoint's UNet.

    Raises:
        UsageError: there are none, or its inputs are not those of Stable Diffusion.
    """
    try:
        source = settings_source(name, args)
        config = dict(UNet2DConditionModel.load_config(source, subfolder="unet", **hub_options(args)))
    except UsageError:
        raise
    except Exception as error:  # of the hub, of JSON, ...
        raise UsageError(f"{source}: {part_problem(Path(source), 'unet', args, error)}") from error
    more = "class_embed_type num_class_embeds addition_embed_type class_embeddings_concat dual_cross_attention"
    for key in [*more.split(), "encoder_hid_dim_type"]:
        if config.get(key) and (key, config[key]) not in KNOWN_CONDITIONING:
            raise UsageError(f"{name}: its UNet wants more than a caption ({key}), which is not supported")
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        raise UsageError(f"{name}: its UNet takes and gives other numbers of channels: only text-to-image models work")
    return config


def check_parts(parts: dict[str, Any], unet_config: dict[str, Any], name: str) -> None:
    """The parts must fit each other; gives the tokenizers the length that the text encoders read.

    Raises:
        UsageError: they do not, or a tokenizer has lost its vocabulary.
    """
    vae, encoders, ids = parts["vae"], text_encoders(parts), []
    for part in filter(parts.get, TEXT_PARTS[::2]):
        check_tokenizer(parts[part], parts[part.replace("tokenizer", "text_encoder")], part, name)
        ids.append(parts[part]("a", padding="max_length", truncation=True, return_tensors="pt").input_ids)
    channels = unet_config.get("in_channels", 4)
    if channels != vae.config.latent_channels:
        made = f"its UNet takes {channels} channels, its VAE makes {vae.config.latent_channels}"
        raise UsageError(f"{name}: {made}: only text-to-image models are supported, with the VAE that belongs to them")
    if not vae.config.get("scaling_factor"):
        raise UsageError(f"{name}: its VAE names no scaling_factor, which vae/config.json must")
    if vae.config.get("latents_mean") is not None:
        raise UsageError(f"{name}: its VAE shifts its latents (latents_mean), which is not supported")
    if len({tensor.shape for tensor in ids}) > 1:
        raise UsageError(f"{name}: its tokenizers make {' and '.join(str(len(tensor[0])) for tensor in ids)} tokens")
    width = unet_config.get("encoder_hid_dim") or unet_config.get("cross_attention_dim", 1280)
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    with torch.no_grad():
        told = encode_captions(encoders, torch.stack(ids, dim=1))
    made = list(told["encoder_hidden_states"].shape)
    if len(made) != 3 or widths != {made[2]}:
        kinds, wanted = " and ".join(type(encoder).__name__ for encoder in encoders), f"[1, {made[1]}, {max(widths)}]"
        raise UsageError(f"{name}: its text encoder, {kinds}, makes {made} of a caption, its UNet reads {wanted}")
    pooled, added = told.get("text_embeds"), unet_config.get("addition_embed_type")
    if (pooled is not None) != (added == "text_time"):
        raise UsageError(f"{name}: its UNet has addition_embed_type {added}: it belongs to another kind of pipeline")
    if pooled is not None:
        made = list(pooled.shape)
        wanted = unet_config.get("projection_class_embeddings_input_dim", 0)
        wanted -= 6 * (unet_config.get("addition_time_embed_dim") or 0)  # of sizes and crop
        if made != [1, wanted]:
            problem = f"{type(encoders[-1]).__name__}, pools a caption to {made}, its UNet reads [1, {wanted}]"
            raise UsageError(f"{name}: its second text encoder, {problem}")


def check_tokenizer(tokenizer: Any, text_encoder: Any, part: str, name: str) -> None:
    """Part of check_parts; `part` is what the checkpoint calls the tokenizer."""
    vocabulary = tokenizer.get_vocab()
    own = [token for token in list(vocabulary)[:1000] if token not in tokenizer.all_special_tokens]
    if tokenizer.pad_token is None:
        raise UsageError(f"{name}: its {part} has no pad_token, which {part}/tokenizer_config.json must name")
    if len({frozenset(ids) for ids in tokenizer(TEST_WORDS + own).input_ids}) == 1:
        raise UsageError(f"{name}: its {part} knows no words: copy the folder {part} with its vocabulary again")
    words = [token[:-4] for token in vocabulary if re.fullmatch("[a-z]{3,}</w>", token)][:1000]
    if words and sum(len(ids) > 1 for ids in tokenizer(words, add_special_tokens=False).input_ids) > len(words) / 2:
        raise UsageError(f"{name}: its {part} spells the words that it has: copy {part}/merges.txt again")
    highest, readable = max(vocabulary.values()), text_encoder.get_input_embeddings().num_embeddings
    if highest >= readable:
        raise UsageError(
            f"{name}: its {part} has ids up to {highest}, its text encoder reads {readable} of them: they are of "
            "different checkpoints, or tokens were added without resize_token_embeddings"
        )
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if positions is not None and "roberta" in text_encoder.config.model_type:
        positions -= text_encoder.config.pad_token_id + 1  # its positions begin after the padding's
    own_length = tokenizer.model_max_length
    tokenizer.model_max_length = min(own_length if own_length > 2 else math.inf, positions or 77)
    if getattr(text_encoder.config, "use_attention_mask", False):
        raise UsageError(f"{name}: its text encoder wants attention masks, which are not supported")


def add_safety_checker(
    name: str, index: dict[str, Any], parts: dict[str, Any], dtype: torch.dtype, args: argparse.Namespace
) -> StableDiffusionPipeline:
    """The pipeline of the parts, with the checkpoint's safety checker, if it has one and --disable_... is not given."""
    if args.disable_safety_checker or is_single_file(name) or not (index.get("safety_checker") or [None])[0]:
        return make_pipeline(index, parts)
    options = {**hub_options(args), "dtype": dtype}
    if args.variant in variants(Path(name, "safety_checker")):
        options["variant"] = args.variant
    try:
        return StableDiffusionPipeline.from_pretrained(name, **parts, image_encoder=None, **options)
    except Exception as error:  # each library fails in ways of its own
        part = "safety_checker"
        if Path(name, part).is_dir() and not Path(name, "feature_extractor/preprocessor_config.json").is_file():
            part = "feature_extractor"
        problem = part_problem(Path(name), part, args, error)
        raise UsageError(f"{name}: {problem}, or give --disable_safety_checker") from error


def fuse_loras(pipeline: DiffusionPipeline, args: argparse.Namespace, with_unet: bool = True) -> list[dict[str, Any]]:
    """Add each --lora, times its weight, to the weights it is for; returns what quant_model.pt records of them.

    Without the UNet, which has its own already where it is int8, only to those of the text encoders.

    Raises:
        UsageError: one is for another architecture, or in no format that diffusers reads.
    """
    records, parts = [], [part for part in ("unet", *TEXT_PARTS[1::2]) if getattr(pipeline, part, None) is not None]
    for path, weight in args.lora or []:
        options = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
        try:
            tensors, alphas, metadata = pipeline.lora_state_dict(
                str(path.parent), unet_config=pipeline.unet.config, return_lora_metadata=True, **options
            )
        except Exception as error:  # of safetensors, of names that diffusers does not know, ...
            problem = LFS_POINTER if is_lfs_pointer(path) else f"no LoRA that can be read ({first_line(error)})"
            raise UsageError(f"--lora {path}: {problem}") from error
        layers = {part: layers_of_lora(tensors, part) for part in parts}
        strange = [name for name in tensors if name.split(".")[0] not in parts]
        if strange or not any(layers.values()):
            reason = f"it is for a {strange[0].split('.')[0]}" if strange else "it holds no layers"
            raise UsageError(f"--lora {path} does not fit {args.pretrained_model_name_or_path}: {reason}")
        fused = [part for part in parts if layers[part] and (with_unet or part != "unet")]
        for part in fused:
            load_lora(pipeline, part, tensors, alphas, metadata, path, layers[part])
        if fused:
            pipeline.fuse_lora(components=fused, lora_scale=weight)
            pipeline.unload_lora_weights()
        in_text = any(count for part, count in layers.items() if part != "unet")
        records.append({"name": path.name, "weight": weight, "sha256": sha256(path), "text_encoder": in_text})
        counts = [f"{layers[part]} layers of the {part}" for part in fused]
        logger.info(f"fused {path.name}, weight {weight}: {', '.join(counts) or 'in the int8 UNet already'}")
    return records


def layers_of_lora(tensors: dict[str, torch.Tensor], part: str) -> int:
    """How many of a part's layers it changes, in the names that diffusers has for it, old and new."""
    return sum(name.startswith(f"{part}.") and name.endswith(("lora_A.weight", "down.weight")) for name in tensors)


def load_lora(
    pipeline: DiffusionPipeline, part: str, tensors: dict, alphas: Any, metadata: Any, path: Path, layers: int
) -> None:
    """Put the LoRA's layers beside those of a part.

    Raises:
        UsageError: the part has no such layers, or of other sizes.
    """
    model, options = getattr(pipeline, part), {"network_alphas": alphas, "metadata": metadata, "adapter_name": "lora"}
    try:
        if part == "unet":
            pipeline.load_lora_into_unet(tensors, unet=model, **options)
        else:
            pipeline.load_lora_into_text_encoder(tensors, text_encoder=model, prefix=part, **options)
        found = sum(hasattr(module, "lora_A") for module in model.modules())
        problem = f"{found} of its {layers} layers are there" if found != layers else None
    except Exception as error:  # of peft, where no name or shape fits
        problem = first_line(error)
    if problem:
        raise UsageError(f"--lora {path} does not fit the checkpoint's {part}: {problem[:200]}")


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


def check_clip_skip(encoders: list[PreTrainedModel], args: argparse.Namespace) -> None:
    if args.clip_skip is None:
        return
    for encoder in encoders:
        if not encoder.config.model_type.startswith("clip"):
            raise UsageError(f"--clip_skip is for CLIP: the checkpoint's text encoder is a {type(encoder).__name__}")
        layers = encoder.config.num_hidden_layers
        if args.clip_skip >= layers:
            raise UsageError(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers")
    # where diffusers looks for the layer norm, and transformers 5 no longer has it; as no module of its own, no part
    if not hasattr(encoders[0], "text_model"):
        encoders[0].__dict__["text_model"] = encoders[0]


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


def check_kind(payload: dict[str, Any], index: dict[str, Any], name: str) -> None:
    """The file's pipeline must be the checkpoint's."""
    kind = payload.get("pipeline", "StableDiffusionPipeline")
    if kind != pipeline_kind(index):
        made = f"-qm is for a {shown(kind)}, trained from {shown(payload.get('base_model'))}"
        raise UsageError(f"{made}; -m {name} is a {pipeline_kind(index)}")


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


def check_loras(payload: dict[str, Any], args: argparse.Namespace) -> None:
    """The file's UNet holds the LoRAs that it was trained with; the text encoders get theirs from --lora.

    Raises:
        UsageError: --lora names others than the file, or none where the text encoders need them.
    """
    try:
        theirs = sorted((str(lora["sha256"]), float(lora["weight"])) for lora in payload.get("loras", []))
        flags = shown(" ".join(f"{lora['name']}:{lora['weight']}" for lora in payload.get("loras", [])))
        in_text = any(lora["text_encoder"] for lora in payload.get("loras", []))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("-qm is damaged, its loras are none; copy or train it again") from error
    ours = sorted((sha256(path), weight) for path, weight in args.lora or [])
    if ours == theirs:
        return
    if not theirs:
        raise UsageError("--lora: the int8 UNet of -qm was trained without; leave it out, or train with --lora")
    if ours or in_text:
        why = "which changes the text encoder, too" if in_text else "which its int8 UNet holds"
        raise UsageError(f"-qm was trained with --lora {flags}, {why}: give the same{', or none' * (not in_text)}")
    logger.info(f"the int8 UNet holds the LoRA {flags}")


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


# ---------------------------------------------------------------- the whole pipeline for OpenVINO


def text_encoder_to_openvino(encoder: PreTrainedModel, length: int, all_layers: bool) -> Any:
    """input_ids [B, length] -> last_hidden_state [B, length, D], as OpenVINO's model.

    With all_layers, as SDXL reads the last but one: the text embedding (text_embeds or pooler_output) and the layers'
    hidden_states.K beside it, in the order in which optimum-intel has them and OpenVINO GenAI counts on them.
    """
    names, layers = ["last_hidden_state"], []
    if all_layers:
        projects = hasattr(encoder, "text_projection")
        names = ["text_embeds", "last_hidden_state"] if projects else ["last_hidden_state", "pooler_output"]
        layers = [f"hidden_states.{layer}" for layer in range(encoder.config.num_hidden_layers + 1)]

    def encode(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = encoder(ids, output_hidden_states=True)
        return (*(made[name] for name in names), *(made.hidden_states if all_layers else ()))

    ids = {"input_ids": torch.ones(1, length, dtype=torch.int64)}
    return trace(encode, ids, {"input_ids": [-1, length]}, *names, *layers)


def save_openvino(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, args: argparse.Namespace) -> None:
    """Write all that paints as OpenVINO models, in the layout that OpenVINO GenAI and optimum-intel load.

    Raises:
        UsageError: openvino-tokenizers is missing, the folder exists, or it cannot be written.
    """
    ov, folder, vae = import_openvino(), args.save_openvino, pipeline.vae
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        needed = "pip install -r requirements-openvino-genai.txt"
        raise UsageError(f"--save_openvino: openvino-tokenizers does not import ({error}): {needed}") from error
    numbers = ["", "_2"] if isinstance(pipeline, StableDiffusionXLPipeline) else [""]
    encoders = {f"text_encoder{number}": pipeline.components[f"text_encoder{number}"] for number in numbers}
    tokenizers = {f"tokenizer{number}": pipeline.components[f"tokenizer{number}"] for number in numbers}
    models = {}
    for (part, encoder), tokenizer in zip(encoders.items(), tokenizers.values()):
        encoder.requires_grad_(False)
        models[part] = text_encoder_to_openvino(encoder, tokenizer.model_max_length, all_layers=len(encoders) > 1)
    latents, sizes = torch.randn(1, vae.config.latent_channels, 16, 16), [-1, vae.config.latent_channels, -1, -1]
    decode = vae.requires_grad_(False).decode
    inputs = {"latent_sample": latents}
    models["vae_decoder"] = trace(lambda latents: decode(latents).sample, inputs, {"latent_sample": sizes}, "sample")
    unet = ov.preprocess.PrePostProcessor(openvino_core().read_model(pipeline.unet.model_file()))
    unet.input("timestep").tensor().set_element_type(ov.Type.i64)  # as OpenVINO GenAI's samplers have it
    models["unet"] = unet.build()

    def write(folder: Path) -> None:
        for part, model in models.items():
            ov.save_model(model, folder / part / "openvino_model.xml", compress_to_fp16=part != "unet")
        for part, encoder in encoders.items():
            encoder.config.save_pretrained(folder / part)
        for part, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(folder / part)
            ov.save_model(convert_tokenizer(tokenizer), folder / part / "openvino_tokenizer.xml")
        pipeline.unet.save_config(folder / "unet")
        vae.save_config(folder / "vae_decoder")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.register_to_config(unet=("diffusers", "UNet2DConditionModel"))
        pipeline.save_config(folder)
        for path in folder.rglob("*.json"):  # OpenVINO GenAI takes null for a value of the wrong kind
            text = path.read_text(encoding="utf-8").replace(OpenVINOUNet.__name__, UNet2DConditionModel.__name__)
            values = json.loads(text)
            values = {key: value for key, value in values.items() if value not in (None, [None, None])}
            path.write_text(json.dumps(values, indent=2), encoding="utf-8")

    try:
        write_folder(folder, write)
        logger.info(f"wrote the pipeline as OpenVINO models to {folder}, without a safety checker")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--save_openvino {folder}: {str(error).strip().splitlines()[-1]}") from error


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


def seconds_compiling(pipeline: StableDiffusionPipeline) -> float:
    """What went so far into the loading of compiled UNets, as a picture's time is without the loading of models."""
    return getattr(pipeline.unet, "seconds_compiling", 0.0)


@torch.no_grad()
def paint(pipeline: StableDiffusionPipeline, jobs: list[Job], args: argparse.Namespace) -> list[Painting]:
    """Denoise, decode and check one batch of pictures."""
    began = time.perf_counter() - seconds_compiling(pipeline)
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
    ).images
    vae = pipeline.vae
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
    decoded, flagged = torch.nan_to_num(decoded), None
    if hasattr(pipeline, "run_safety_checker"):  # SDXL has none
        decoded, flagged = pipeline.run_safety_checker(decoded, pipeline.device, vae.dtype)
    shown = [not flag for flag in flagged or [False] * len(jobs)]  # the checker's black is 0 of 0..1, not of -1..1
    images = pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=shown)
    seconds = (time.perf_counter() - seconds_compiling(pipeline) - began) / len(jobs)
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
    doubled = guidance_doubles(pipeline.unet.config, args)
    return {
        "steps": args.num_inference_steps,
        "height": height,
        "width": width,
        "guidance_scale": args.guidance_scale if doubled or pipeline.unet.config.time_cond_proj_dim else 1.0,
        "negative_prompt": args.negative_prompt if doubled else None,
        "scheduler": type(pipeline.scheduler).__name__,
        "clip_skip": args.clip_skip,
        "paired_guidance": bool(file) and pairs_guidance(pipeline.unet.config, args),
        "model": args.pretrained_model_name_or_path,
        "variant": args.variant,
        "lora": [f"{path}:{weight}" for path, weight in args.lora or []],
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
    if args.negative_prompt is not None and not guidance_doubles(pipeline.unet.config, args):
        logger.warning("--negative_prompt has no effect here: without guidance, or with a UNet that takes its scale")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.describe:
        print(describe(args.quantized_model_name_or_path))
        return
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
    if args.save_openvino is not None:
        save_openvino(pipeline, args)
        if not args.captions:
            return
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
