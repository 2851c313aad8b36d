#!/usr/bin/env python
"""Generate images with Stable Diffusion, with the int8 UNet of quant_model.pt or the full-precision one.

Reads a Stable Diffusion folder (or hub id, or one .safetensors file) and, with -qm, the file that
train_text_to_image_qat.py wrote. Writes one PNG per image, one grid per caption, and one row per
image to results.jsonl. The same seed gives both UNets the same initial latents.

    python text2images.py -m demo/tiny-stable-diffusion -qm qat/quant_model.pt \\
        -c "a photo of an astronaut riding a horse on mars"

Next: leave out -qm, generate images of the same captions in fp32, and compare them with evaluate.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
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
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

# Importing these libraries on a CPU prints notices about GPU parts that are not there; httpx, every request to the hub.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for library in ("torchao", "torch.utils._pytree", "httpx", "httpx2"):
    logging.getLogger(library).setLevel(logging.ERROR)
# What imports make stays: without this, Python would look for garbage in it then and at the end, for 3 s.
gc.disable()

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

gc.freeze()
gc.enable()

logger = logging.getLogger("text2images")
Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2.

    Everything below that reads, loads or checks raises it.
    """


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


# ---------------------------------------------------------------- arguments

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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an integer flag."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return int(text)

    return integer


def image_edge(text: str) -> int:
    """The type of --height and --width."""
    edge = int(text)
    if edge < 8 or edge % 8:
        raise argparse.ArgumentTypeError(f"{edge} must be a multiple of 8: {max(8, edge // 8 * 8)} would do")
    return edge


def lora_argument(text: str) -> tuple[Path, float]:
    """PATH[:WEIGHT] of --lora."""
    match = re.fullmatch(r"(.+\.safetensors)(?::([-+]?[\d.]+))?", text)
    if match is None:
        problem = "is no FILE.safetensors or FILE.safetensors:WEIGHT (other files that hold LoRAs could run code)"
        raise argparse.ArgumentTypeError(f"{text} {problem}")
    if not Path(match[1]).is_file():
        raise argparse.ArgumentTypeError(f"{match[1]}: no such file")
    return Path(match[1]), float(match[2] or 1)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    text = "Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a hub id, or one FILE.safetensors (required)"
    add("-m", "--pretrained_model_name_or_path", help=text)
    text = "folder or hub id with the settings and tokenizers for a single file; default: what its tensors' names imply"
    add("--config", metavar="FOLDER", help=text)
    text = "LoRAs (.safetensors of diffusers or kohya) to fuse into the model, each with its weight (default 1)"
    add("--lora", nargs="+", type=lora_argument, metavar="PATH[:WEIGHT]", help=text)
    add("--variant", help="file variant of the checkpoint's weights, such as fp16")
    add("--revision", help="git revision of the hub model")
    add("--cache_dir", help="where downloads are kept")
    text = "dtype of the float layers; auto: float32, but with -qm bfloat16 where the CPU has instructions for it"
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=text)
    add("--disable_safety_checker", action="store_true", help="keep images that the checkpoint's safety checker flags")


def add_int8_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """-qm and what needs it; returns the latter."""
    add = parser.add_argument_group("int8 UNet").add_argument
    add("-qm", "--quantized_model_name_or_path", type=Path, help="quant_model.pt, or the folder it is in")
    text = "print what the file of -qm contains and exit; needs no -m and no captions"
    needing_it = [add("--describe", action="store_true", help=text)]
    text = "what runs the UNet; torch: in float, slower than fp32; auto: OpenVINO, but torch where there is CUDA"
    needing_it += [add("--engine", choices=["auto", "openvino", "torch"], default="auto", help=text)]
    text = "device that runs the UNet, as OpenVINO names it: CPU, GPU, GPU.1, ..."
    needing_it += [add("--device", default="CPU", help=text)]
    text = "quantize the two inputs of classifier-free guidance independently, not the conditional one as the "
    text += "unconditional one plus a difference: slightly faster, farther from fp32"
    needing_it += [add("--no_paired_guidance", action="store_true", help=text)]
    text = "also write the pipeline as OpenVINO models, for OpenVINO GenAI and optimum-intel; needs no captions"
    needing_it += [add("--save_openvino", type=Path, metavar="FOLDER", help=text)]
    return needing_it


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add("-c", "--captions", nargs="+", default=[], help="what the images show")
    add("--captions_file", type=Path, help="more captions, one per line, UTF-8")
    add("-n", "--images_num", type=at_least(1), default=1, help="images per caption; image k has seed + k")
    add("-s", "--seed", type=at_least(0), default=42, help="seed of each caption's first image")
    add("--num_inference_steps", type=at_least(1), default=50, help="denoising steps")
    text = "sampler, with its usual settings for Stable Diffusion; default: the checkpoint's own, as it was saved"
    add("--scheduler", choices=SCHEDULERS, help=text)
    text = "how closely to follow the caption; guidance is off at 1 or less"
    add("--guidance_scale", type=float, default=7.5, help=text)
    add("--negative_prompt", help="what the images are not to show")
    text = "last layers of the text encoder to skip, as diffusers counts (its 1 is called clip skip 2 elsewhere)"
    add("--clip_skip", type=at_least(0), metavar="N", help=text)
    add("--height", type=image_edge, help="pixels, a multiple of 8; default: the size the checkpoint was trained for")
    add("--width", type=image_edge, help="likewise")
    add("--batch_size", type=at_least(1), default=1, help="images generated at once")
    add("--output_dir", type=Path, default=Path("images"), help="folder of the images and of results.jsonl")
    add("--debug", action="store_true", help="show the traceback of an error")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser)
    needing_int8 = add_int8_flags(parser)
    add_image_flags(parser)
    args = parser.parse_args(argv)

    if args.quantized_model_name_or_path is None:
        for action in needing_int8:
            if getattr(args, action.dest) != action.default:
                parser.error(f"--{action.dest} is for int8: give -qm FILE too, or leave it out")
    if args.describe:
        return args
    if args.pretrained_model_name_or_path is None:
        parser.error("no model: give -m, a diffusers folder or hub id of Stable Diffusion")
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
        parser.error("nothing to generate: give -c CAPTION or --captions_file FILE")
    if args.engine == "torch" and (args.device != "CPU" or args.save_openvino is not None):
        parser.error("--device and --save_openvino are for --engine openvino")
    if args.save_openvino is not None and args.save_openvino.exists():
        parser.error(f"--save_openvino {args.save_openvino} exists: delete it, or name another folder")
    if args.seed >= 2**63 - args.images_num:
        parser.error("--seed must be a 64-bit number")
    return args


# Flags that say which images are generated and where they go, not how.
NOT_RECORDED = ("captions", "captions_file", "images_num", "seed", "batch_size", "output_dir", "save_openvino", "debug")


def flags_given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """All other flags that were given, for results.jsonl: evaluate.py makes a command of them that repeats an image."""
    flags = []
    for name, value in vars(args).items():
        if name in NOT_RECORDED or value == parser.get_default(name):
            continue
        if isinstance(value, list):  # of words, or of (PATH, WEIGHT)
            parts = [part if isinstance(part, tuple) else (part,) for part in value]
            flags += [f"--{name}", *(":".join(map(str, part)) for part in parts)]
        else:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return flags


# ---------------------------------------------------------------- what follows from the flags


def choose_dtype(args: argparse.Namespace) -> torch.dtype:
    """dtype of the float layers."""
    if args.quantized_model_name_or_path is not None and args.save_openvino is not None:
        return torch.float32  # so that what is written loses nothing
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    capabilities = torch.cpu.get_capabilities()
    fast_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or torch.cuda.is_available()
    return torch.bfloat16 if args.quantized_model_name_or_path is not None and fast_bf16 else torch.float32


def choose_engine(args: argparse.Namespace) -> str:
    """What runs the UNet: openvino or torch."""
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


def uses_guidance(unet_config: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the batch has each image twice, without caption and with it, for classifier-free guidance.

    Not where the UNet takes the guidance scale as an input (LCM's).
    """
    return args.guidance_scale > 1 and unet_config.get("time_cond_proj_dim") is None


def pairs_guidance(unet_config: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether int8 layers quantize that batch's second half as its difference from the first."""
    return uses_guidance(unet_config, args) and not args.no_paired_guidance


# ---------------------------------------------------------------- reading quant_model.pt

# All that its pickle may name; torch.load(weights_only=True) would also allow, say, bytearray(10**12).
PICKLE_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
PICKLE_NAMES |= {f"torch {kind}Storage" for kind in ("Char", "Int", "Half", "BFloat16", "Float")}
MAX_INDEX_BYTES, MAX_OPCODES = 1 << 20, 200_000  # of the pickle; that of SDXL has 0.6 MiB and 127,000
TRAILER = struct.Struct("<4s 36x Q Q 4s 4x Q 4x 4s 18x")  # zip64 end record, its locator, end record
DAMAGED, FAILED = "; copy or train it again", "; the training failed: train again"
NOT_OURS = "not a quant_model.pt of train_text_to_image_qat.py (maybe of Intel's original example): train again with it"


def quant_model_file(path: Path) -> Path:
    """A folder stands for the quant_model.pt in it."""
    return path / "quant_model.pt" if path.is_dir() else path


def read_quant_model(path: Path) -> dict[str, Any]:
    """The checked contents of quant_model.pt; tensors stay on disk until they are used."""
    path = quant_model_file(path)
    try:
        if not path.is_file():
            raise UsageError("no such file; train_text_to_image_qat.py writes it into its --output_dir")
        check_pickle(path)
        payload = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        check_payload(payload, path.stat().st_size)
        return payload
    except UsageError as error:
        raise UsageError(f"-qm {path}: {error}") from error
    except PermissionError as error:
        raise UsageError(f"-qm {path}: {error.strerror}; change its rights") from error
    except Exception as error:  # the readers fail in many ways on a file that is cut short or not a zip archive
        problem = LFS_POINTER if is_lfs_pointer(path) else f"damaged or not a quant_model.pt{DAMAGED}"
        raise UsageError(f"-qm {path}: {problem}") from error


def check_pickle(path: Path) -> None:
    """Refuse a file whose pickle names more than PICKLE_NAMES, or from which torch.load would build more than it holds.

    So loading takes no more time and memory than the file's size calls for: records are not compressed, and the pickle
    is short and builds each container once.
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
        (pickled,) = (record for record in records if record.filename.lower().endswith("data.pkl"))
        compressed = any(record.compress_type or record.file_size != record.compress_size for record in records)
        if compressed or pickled.file_size > MAX_INDEX_BYTES:
            raise ValueError("compressed records, or too long a pickle")
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
            raise ValueError("too long a pickle")
        previous = opcode.name
    if "torch._utils _rebuild_qtensor" in names:
        raise UsageError(NOT_OURS)
    if names - PICKLE_NAMES:
        named = f"it names {shown(max(names - PICKLE_NAMES))}"
        raise UsageError(f"not loaded, as it is no plain file of tensors and could run code ({named}){DAMAGED}")


def check_payload(payload: Any, file_size: int) -> None:
    """Raise UsageError unless it has the right format and version, plain tensors, the right checksum, sound values."""
    if type(payload) is not dict or payload.get("format") != "sd-unet-int8":
        raise UsageError(NOT_OURS)
    version, state_dict = payload.get("format_version"), payload.get("state_dict")
    if type(version) is not int or version != 1:
        raise UsageError(f"format version {shown(version)}; this script reads 1: update it")
    if type(state_dict) is not dict or type(payload.get("unet_config")) is not dict:
        raise UsageError(f"damaged, it has no state_dict or no unet_config{DAMAGED}")
    for name, tensor in state_dict.items():
        plain = type(name) is str and re.fullmatch(r"[\w.]{1,200}", name, re.ASCII) and type(tensor) is torch.Tensor
        if not plain or tensor.requires_grad or not tensor.is_contiguous():
            raise UsageError(f"damaged, {shown(name)} is no plain tensor{DAMAGED}")
    if sum(tensor.nbytes for tensor in state_dict.values()) > file_size:
        raise UsageError(f"damaged, its tensors claim more than the file holds{DAMAGED}")
    if checksum(state_dict) != payload.get("checksum"):
        raise UsageError(f"damaged, its checksum does not match{DAMAGED}")
    for name, tensor in state_dict.items():
        if name.endswith(("_scale", "_factor")) and not (torch.isfinite(tensor) & (tensor > 0)).all():
            raise UsageError(f"{name} is not a positive number{FAILED}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(f"{name} holds values that are not finite{FAILED}")
        if name.endswith("_zero_point") and not ((tensor >= 0) & (tensor <= 255)).all():
            raise UsageError(f"{name} is not within 0..255{FAILED}")


def shown(value: Any) -> str:
    """A value out of a file, fit for one line of a terminal, whatever its size and nesting."""
    return ascii(value[:200]) if isinstance(value, str) else reprlib.repr(value)


def checksum(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, as the trainer computes it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(path: Path) -> str:
    """What is in a quant_model.pt: layers by kind and dtype, sizes, recipe, versions, training, checksum."""
    path, payload = quant_model_file(path), read_quant_model(path)
    tensors = payload["state_dict"]
    layers: dict[tuple[str, str], list[int]] = {}  # (kind, dtype) -> layers, parameters, bytes
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        weight = tensors.get(f"{layer}.weight", tensor)
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype == "int8" and f"{layer}.input_scale" not in tensors:
            dtype = "int8 weights"
        row = layers.setdefault(({4: "Conv2d", 2: "Linear", 1: "norm"}.get(weight.dim(), "other"), dtype), [0, 0, 0])
        row[0] += part == "weight"
        row[1] += tensor.numel() if part in ("weight", "bias") else 0
        row[2] += tensor.nbytes  # with the scales, factors and zero points that belong to it

    def said(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{said(key)} {said(part)}" for key, part in value.items() if not isinstance(part, dict))
        return shown(value).strip("'\"").replace("\\\\", "\\")

    fp32 = max(4, 4 * sum(parameters for _, parameters, _ in layers.values()))  # bytes
    size, recipe, loras = path.stat().st_size, payload.get("quantization"), payload.get("loras")
    lines = [
        f"{path}: {size / 1e6:.1f} MB, {size / fp32:.3f} of the same UNet in fp32 ({fp32 / 1e6:.1f} MB)",
        f"format {payload['format']}, version {payload['format_version']}",
        f"UNet of a {said(payload.get('pipeline', 'StableDiffusionPipeline'))}",
        f"trained from {said(payload.get('base_model'))}",
        *(f"with a LoRA: {said(lora)}" for lora in (loras if isinstance(loras, list) else [])),
        f"SHA-256 of its tensors (verified): {payload['checksum']}",
        "",
        f"{'layers':<8} {'dtype':<14} {'count':>6} {'parameters':>12} {'MB':>8}",
    ]
    for (kind, dtype), (count, parameters, octets) in sorted(layers.items()):
        lines.append(f"{kind:<8} {dtype:<14} {count:>6} {parameters:>12,} {octets / 1e6:>8.2f}")
    if isinstance(recipe, dict) and isinstance(recipe.get("local"), dict):
        recipe = {"all layers, but for": recipe.get("global"), **recipe["local"]}
    titles = {"recipe (dtypes of weights and inputs)": recipe, "training": payload.get("training")}
    for title, facts in {**titles, "made with": payload.get("versions")}.items():
        facts = facts if isinstance(facts, dict) else {"": facts}
        lines += ["", title, *(f"  {said(key):<24} {said(value)}" for key, value in facts.items())]
    return "\n".join(lines)


# ---------------------------------------------------------------- loading the checkpoint
# The same lines are in train_text_to_image_qat.py; tests/test_checkpoints.py holds them equal.

# Pipelines of the same parts; a checkpoint may have been saved by any of them.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline")
PIPELINES += ("StableDiffusionXLPipeline",)
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")  # the latter two of SDXL alone
WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor")  # names of parts begin so
# Settings of UNets that take more than a caption, and the value of each that is supported, if one is.
CONDITIONING: dict[str, str | None] = {"encoder_hid_dim_type": "text_proj", "addition_embed_type": "text_time"}
CONDITIONING |= dict.fromkeys("class_embed_type num_class_embeds class_embeddings_concat dual_cross_attention".split())
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE")
LFS_START = b"version https://git-lfs"
LFS_POINTER = "a pointer of Git LFS, not the file itself: git lfs pull brings it"
SINGLE_FILES = (".safetensors", ".ckpt")  # whole checkpoints; the latter are pickles, which are not read
SINGLE_FILE_KINDS = ("v1", "v2", "xl_base")  # as diffusers calls them
# A tokenizer gives some of these different ids, unless it has lost its vocabulary.
TEST_WORDS = ["cat", "house", "sky", "water", "кот", "небо", "家", "空", "水", "集"]


def checkpoint_name(args: argparse.Namespace) -> str:
    """Folder or hub id to load; the id that Intel's example names is gone, a copy of it is there."""
    name = args.pretrained_model_name_or_path
    gone = name == "runwayml/stable-diffusion-v1-5" and not Path(name).is_dir()
    return "stable-diffusion-v1-5/stable-diffusion-v1-5" if gone else name


def load_index(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """model_index.json, which names the class of the pipeline and of each part."""
    source = settings_source(name, args)
    folder, given = Path(source), f"--pretrained_model_name_or_path {name}"
    if source != name:
        given += f", --config {source}" if args.config else f", whose settings are those of {source}"
    if (folder.exists() or folder.suffix in SINGLE_FILES) and not (folder / "model_index.json").is_file():
        raise UsageError(f"{given}: {no_checkpoint(folder)}")
    try:
        index = dict(StableDiffusionPipeline.load_config(source, **hub_options(args)))
        kind = index["_class_name"]
    except Exception as error:  # the hub, JSON, ... fail in their own ways
        damaged = "model_index.json is damaged, copy it again"
        reason = damaged if folder.exists() else "no such folder, and no hub id that can be loaded"
        remedy = ": give --config FOLDER, a checkpoint of its kind, of which no weights are needed" * (source != name)
        raise UsageError(f"{given}: {reason} ({first_line(error)}){remedy}") from error
    if kind not in PIPELINES:
        raise UsageError(f"{source} is a {kind}; only Stable Diffusion 1.x, 2.x and XL are supported")
    if is_single_file(name) and is_xl(index) != ("xl" in single_file_kind(name)):
        raise UsageError(f"{name} is {'no ' * is_xl(index)}SDXL by its keys, but --config {source} is a {kind}")
    return index


def settings_source(name: str, args: argparse.Namespace) -> str:
    """Folder or hub id of the settings and tokenizers: the checkpoint itself, unless that is a single file."""
    if not is_single_file(name):
        if args.config:
            raise UsageError(f"--config is for a single .safetensors file, which {name} is not: leave it out")
        return name
    if args.variant:
        raise UsageError(f"--variant {args.variant} is for a folder, which {name} is not: leave it out")
    kind = single_file_kind(name)
    if args.config:
        return args.config
    if kind not in SINGLE_FILE_KINDS:
        raise UsageError(f"{name} is a checkpoint of kind {kind}; only {', '.join(SINGLE_FILE_KINDS)} are supported")
    return single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def is_single_file(name: str) -> bool:
    return name.endswith(SINGLE_FILES[0]) and Path(name).is_file()


@functools.cache  # each part asks
def single_file_kind(name: str) -> str:
    """v1, v2, xl_base, ..., as diffusers infers it from the tensors' names and shapes."""
    if is_lfs_pointer(name):
        raise UsageError(f"{name} is {LFS_POINTER}")
    try:
        tensors = load_file(name)  # maps them into memory, reads none
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{name} is damaged ({first_line(error)}): copy it again") from error
    if not any(key.startswith("model.diffusion_model.") for key in tensors):
        raise UsageError(f"{name} is no whole checkpoint of Stable Diffusion: it has no model.diffusion_model")
    kind = single_file_utils.infer_diffusers_model_type(tensors)  # knows SDXL by its tenth layer, which small ones lack
    return "xl_base" if kind == "v1" and any(key.startswith("conditioner.embedders.1.") for key in tensors) else kind


def no_checkpoint(path: Path) -> str:
    """Why there is no model_index.json at the path, and what to give instead."""
    nested = [file.parent for below in ("*", "snapshots/*") for file in path.glob(f"{below}/model_index.json")]
    if nested:
        return f"the checkpoint is one level down: give {nested[0]}"
    if (path.parent / "model_index.json").is_file():
        return f"a part of a checkpoint: give the whole, {path.parent}"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    single = next((file for file in files if file.suffix in SINGLE_FILES), None)
    if single is None:
        return "no model_index.json in it: give the folder of a diffusers checkpoint, or a hub id"
    if not single.is_file():
        return "no such file"
    if single.suffix == SINGLE_FILES[0]:
        return f"a folder without model_index.json: give the file in it, {single}"
    convert = f"StableDiffusionPipeline.from_single_file('{single}').save_pretrained('FOLDER')"
    return f"{single.name} is a pickle, which could run code; where you trust it, convert it by diffusers' {convert}"


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def is_xl(index: dict[str, Any]) -> bool:
    return "XL" in index["_class_name"]


def text_parts(index: dict[str, Any]) -> tuple[str, ...]:
    """Tokenizer and text encoder, or two of each."""
    return TEXT_PARTS if is_xl(index) else TEXT_PARTS[:2]


def load_unet_config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the checkpoint's UNet."""
    source = settings_source(name, args)
    try:
        config = dict(UNet2DConditionModel.load_config(source, subfolder="unet", **hub_options(args)))
    except Exception as error:  # the hub, JSON, ... fail in their own ways
        raise UsageError(f"{source}: {part_problem(Path(source), 'unet', args, error)}") from error
    for key in CONDITIONING:
        if config.get(key) not in (None, False, CONDITIONING[key]):
            raise UsageError(f"{name}: its UNet wants more than a caption ({key}), which is not supported")
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        raise UsageError(f"{name}: its UNet takes and gives other numbers of channels: only text-to-image models work")
    return config


def load_part(
    name: str, index: dict[str, Any], part: str, args: argparse.Namespace, dtype: torch.dtype = torch.float32
) -> Any:
    """A part of the checkpoint, by the class that model_index.json names."""
    named = index.get(part)
    library, kind = named if isinstance(named, (list, tuple)) and len(named) == 2 else (None, None)
    allowed = {"unet": ("UNet2DConditionModel",), "vae": VAES}.get(part, (kind,))
    libraries = {
        "diffusers": diffusers,
        "transformers": transformers,
        "stable_diffusion": diffusers.pipelines.stable_diffusion,
    }
    found = getattr(libraries.get(library), str(kind), None)
    if found is None or kind not in allowed:
        wanted = "" if kind in allowed else f", not {' or '.join(allowed)}"
        raise UsageError(f"{name}: its {part} is {kind and f'{library}.{kind}'}{wanted}: it cannot be used here")
    options: dict[str, Any] = {"subfolder": part, **hub_options(args)}
    try:
        if part.startswith(WITHOUT_WEIGHTS):
            return found.from_pretrained(settings_source(name, args), **options)
        if is_single_file(name):
            return aligned(from_single_file(name, index, part, args, dtype))
        options |= {"dtype": dtype, "output_loading_info": True}
        try:
            loaded, info = found.from_pretrained(name, variant=args.variant, **options)
        except OSError:
            if args.variant is None or args.variant in variants(Path(name, part)):
                raise
            loaded, info = found.from_pretrained(name, **options)
            logger.info(f"the {part} has no variant {args.variant}: its plain weights are used")
        missing = [key for key in info["missing_keys"] if "pooler" not in key]  # BERT's pooler is not used
        if missing:
            raise ValueError(f"it lacks {len(missing)} tensors, such as {min(missing)}")
        return aligned(loaded)
    except Exception as error:  # each library fails in ways of its own
        raise UsageError(f"{name}: {part_problem(Path(name), part, args, error)}") from error


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


def aligned(model: nn.Module) -> nn.Module:
    """Align weights to 64 bytes, whatever their place in the file.

    Products with a single row (a timestep's embedding) sum in another order where the weight is not aligned, so the
    same weights in two files would differ in their last bits. Weights above 16 MiB meet none, and are not copied.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.data_ptr() % 64 and tensor.nbytes <= 16 << 20:
            tensor.data = tensor.data.clone()
    return model


def variants(folder: Path) -> set[str | None]:
    """Variants of the weights in a part's folder; None stands for the plain ones."""
    pattern = r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    return {match[1] for file in folder.glob("*") if (match := re.fullmatch(pattern, file.name))}


def is_lfs_pointer(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(LFS_START)


def part_problem(checkpoint: Path, part: str, args: argparse.Namespace, error: BaseException) -> str:
    """Why a part could not be loaded, and what to do about it; libraries name neither the part nor the remedy."""
    folder = checkpoint / part
    if checkpoint.is_file():
        return f"its {part} could not be loaded: {first_line(error)}; is --config a checkpoint of the same kind?"
    if not checkpoint.is_dir():  # of the hub; without a network, what is in the cache
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


def check_parts(parts: dict[str, Any], unet_config: dict[str, Any], name: str) -> None:
    """The parts must fit each other; gives the tokenizers the length that the text encoders read."""
    vae, encoders, ids = parts["vae"].config, text_encoders(parts), []
    for part in filter(parts.get, TEXT_PARTS[::2]):
        check_tokenizer(parts[part], parts[part.replace("tokenizer", "text_encoder")], part, name)
        ids.append(parts[part]("a", padding="max_length", truncation=True, return_tensors="pt").input_ids)
    channels = unet_config.get("in_channels", 4)
    if channels != vae.latent_channels:
        made = f"its UNet takes {channels} channels, its VAE makes {vae.latent_channels}"
        raise UsageError(f"{name}: {made}: only text-to-image models are supported, with the VAE that belongs to them")
    if not vae.get("scaling_factor"):
        raise UsageError(f"{name}: its VAE names no scaling_factor, which vae/config.json must")
    if vae.get("latents_mean") is not None:
        raise UsageError(f"{name}: its VAE shifts its latents (latents_mean), which is not supported")
    if len({tensor.shape for tensor in ids}) > 1:
        raise UsageError(f"{name}: its tokenizers make {' and '.join(str(len(tensor[0])) for tensor in ids)} tokens")
    with torch.no_grad():
        encoded = encode_captions(encoders, torch.stack(ids, dim=1))
    width = unet_config.get("encoder_hid_dim") or unet_config.get("cross_attention_dim", 1280)
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    wanted = {"encoder_hidden_states": [1, ids[0].shape[1], *widths]}
    if unet_config.get("addition_embed_type") == "text_time":  # besides, it embeds six numbers: sizes and crop
        sizes = 6 * (unet_config.get("addition_time_embed_dim") or 0)
        wanted["text_embeds"] = [1, unet_config.get("projection_class_embeddings_input_dim", 0) - sizes]
    made = {key: list(tensor.shape) for key, tensor in encoded.items()}
    for key in wanted | made:
        if made.get(key) != wanted.get(key):
            kinds = " and ".join(type(encoder).__name__ for encoder in encoders)
            problem = f"{kinds}, makes {key} {made.get(key)} of a caption, its UNet reads {wanted.get(key)}"
            raise UsageError(f"{name}: its text encoder, {problem}")


def text_encoders(parts: dict[str, Any]) -> list[PreTrainedModel]:
    return [part for name, part in parts.items() if name.startswith("text_encoder")]


def encode_captions(encoders: list[PreTrainedModel], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Captions as the UNet reads them, from ids [B, encoders, L]: encoder_hidden_states [B, L, D].

    SDXL (arXiv 2307.01952) joins what the last layer but one of both encoders gives, and has text_embeds [B, P] of the
    second one besides.
    """
    if len(encoders) == 1:
        return {"encoder_hidden_states": encoders[0](input_ids[:, 0])[0]}
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(dim=1))]
    hidden_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": hidden_states, "text_embeds": outputs[-1][0]}


def check_tokenizer(tokenizer: Any, text_encoder: Any, part: str, name: str) -> None:
    """A tokenizer must have its vocabulary, and no ids that the text encoder does not know; see check_parts."""
    vocabulary, config = tokenizer.get_vocab(), text_encoder.config
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
    if getattr(config, "use_attention_mask", False):
        raise UsageError(f"{name}: its text encoder wants attention masks, which are not supported")
    positions = getattr(config, "max_position_embeddings", 77)
    if "roberta" in config.model_type:
        positions -= config.pad_token_id + 1  # its positions begin after the padding's
    if not 2 < tokenizer.model_max_length < positions:  # old tokenizers name no length, or 0
        tokenizer.model_max_length = positions


def make_pipeline(index: dict[str, Any], parts: dict[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline of the parts, without a safety checker unless that is one of them."""
    if is_xl(index):
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**(rest | parts))


def has_betas(scheduler: Any) -> bool:
    """Whether a checkpoint's scheduler says by which noise its UNet was trained, and not only its class's default."""
    config = scheduler.config
    given = config.get("beta_start") is not None and "beta_start" not in config.get("_use_default_values", [])
    return given or config.get("trained_betas") is not None


def size_made_for(unet_config: dict[str, Any]) -> int | list[int] | None:
    """Latent edge, or height and width, that a checkpoint's UNet was made for; None where its config does not say."""
    size = unet_config.get("sample_size")
    if isinstance(size, int):
        match = re.match(r"0\.([0-8])\.", str(unet_config.get("_diffusers_version")))
        return max(64, size) if match else size  # before 0.9 they said 32, and the pipelines correct it
    return list(size) if isinstance(size, (list, tuple)) else None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fuse_loras(pipeline: DiffusionPipeline, args: argparse.Namespace, with_unet: bool = True) -> list[dict[str, Any]]:
    """Add each --lora, times its weight, to the weights it is for; returns what quant_model.pt records of them.

    Without the UNet, as an int8 one holds its LoRAs already, only to those of the text encoders.
    """
    records, parts = [], [part for part in ("unet", *TEXT_PARTS[1::2]) if getattr(pipeline, part, None) is not None]
    for path, weight in args.lora or []:
        options = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
        options |= {"unet_config": pipeline.unet.config, "return_lora_metadata": True}
        try:
            tensors, alphas, metadata = pipeline.lora_state_dict(str(path.parent), **options)
        except Exception as error:  # of safetensors, of names that diffusers does not know, ...
            problem = LFS_POINTER if is_lfs_pointer(path) else f"no LoRA that can be read ({first_line(error)})"
            raise UsageError(f"--lora {path}: {problem}") from error
        # A layer is a pair of matrices, in diffusers' new names or old; the first of each pair is counted.
        firsts = [name for name in tensors if name.endswith(("lora_A.weight", "down.weight"))]
        layers = {part: sum(name.startswith(f"{part}.") for name in firsts) for part in parts}
        strange = {name.split(".")[0] for name in tensors} - set(parts)
        if strange or not firsts:
            reason = f"it is for a {min(strange)}" if strange else "it holds no layers"
            raise UsageError(f"--lora {path} does not fit {args.pretrained_model_name_or_path}: {reason}")
        fused = [part for part in parts if layers[part] and (with_unet or part != "unet")]
        for part in fused:
            load_lora(pipeline, part, layers[part], path, tensors, network_alphas=alphas, metadata=metadata)
        if fused:
            pipeline.fuse_lora(components=fused, lora_scale=weight)
            pipeline.unload_lora_weights()
        in_text = any(layers[part] for part in parts if part != "unet")
        records.append({"name": path.name, "weight": weight, "sha256": sha256(path), "text_encoder": in_text})
        counts = [f"{layers[part]} layers of the {part}" for part in fused]
        logger.info(f"fused {path.name}, weight {weight}: {', '.join(counts) or 'in the int8 UNet already'}")
    return records


def load_lora(
    pipeline: DiffusionPipeline, part: str, layers: int, path: Path, tensors: dict[str, torch.Tensor], **options: Any
) -> None:
    """Add the LoRA's layers, of which there are so many, to a part of the pipeline."""
    model = getattr(pipeline, part)
    try:
        if part == "unet":
            pipeline.load_lora_into_unet(tensors, unet=model, adapter_name="lora", **options)
        else:
            pipeline.load_lora_into_text_encoder(
                tensors, text_encoder=model, prefix=part, adapter_name="lora", **options
            )
        found = sum(hasattr(module, "lora_A") for module in model.modules())
        if found != layers:
            raise ValueError(f"{found} of its {layers} layers are there")
    except Exception as error:  # of peft, where no name or shape fits
        raise UsageError(f"--lora {path} does not fit the checkpoint's {part}: {first_line(error)[:200]}") from error


# ---------------------------------------------------------------- what must fit the checkpoint: quant_model.pt, sampler


def check_architecture(payload: dict[str, Any], base_config: dict[str, Any], name: str) -> None:
    """The file's UNet must be the checkpoint's: its text encoder and VAE fit no other, and no other gets built."""
    for key, default in unet_defaults().items():
        ours, theirs = payload["unet_config"].get(key, default), base_config.get(key, default)
        # sample_size is of images, not of weights; diffusers corrects that of old checkpoints
        if key != "sample_size" and not same_value(ours, theirs):
            base = shown(payload.get("base_model"))
            problem = f"whose UNet has {key} {shown(ours)}; that of -m {name} has {shown(theirs)}"
            raise UsageError(f"-qm was trained from {base}, {problem}")


def unet_defaults() -> dict[str, Any]:
    """Every setting of a UNet, with the value it has where a config.json does not say."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def same_value(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, (list, tuple)):  # JSON has no tuples
        return isinstance(ours, (list, tuple)) and len(ours) == len(theirs) and all(map(same_value, ours, theirs))
    return type(ours) in (type(None), bool, int, float, str) and ours == theirs


# What the UNet was trained with, which another sampler takes over from the checkpoint's ...
TRAINED_WITH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
TRAINED_WITH += ("rescale_betas_zero_snr", "original_inference_steps")
# ... and what all of Stable Diffusion's samplers are set to: diffusers' defaults are for models of pixels.
SAMPLER_SETTINGS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}


def choose_scheduler(saved: Any, args: argparse.Namespace) -> Any:
    """The sampler that is asked for, or the checkpoint's own.

    Another sampler takes over nothing but what the UNet was trained with: the rest are defaults of the sampler that the
    checkpoint was saved with, and would change the images (DDIM clips its samples unless told not to, and a checkpoint
    that was saved with Euler does not tell).
    """
    if args.scheduler is None:
        return checked_scheduler(saved, args)
    if not has_betas(saved):
        problem = f"the checkpoint's {type(saved).__name__} has no betas to go by"
        raise UsageError(f"--scheduler {args.scheduler}: {problem}; leave the flag out")
    kind = getattr(diffusers, SCHEDULERS[args.scheduler])
    settings = SAMPLER_SETTINGS | {key: saved.config[key] for key in TRAINED_WITH if key in saved.config}
    if saved.config.get("timestep_spacing") == "trailing":  # never a default: the model needs its last timestep
        settings["timestep_spacing"] = "trailing"
    known = inspect.signature(kind.__init__).parameters
    try:
        chosen = kind(**{key: value for key, value in settings.items() if key in known})
    except Exception as error:  # a schedule of betas that this sampler does not know, say
        raise UsageError(f"--scheduler {args.scheduler}: {first_line(error)}; choose another one") from error
    return checked_scheduler(chosen, args)


def checked_scheduler(scheduler: Any, args: argparse.Namespace) -> Any:
    """The same, after a copy of it has taken one step with zeros: what it cannot do shows only then."""
    kind, steps, tried = type(scheduler).__name__, args.num_inference_steps, copy.deepcopy(scheduler)
    try:
        tried.set_timesteps(steps)
        trained = tried.config.get("num_train_timesteps") or math.inf
        if max(tried.timesteps.tolist()) >= trained or steps >= trained:
            raise ValueError(f"it has {trained} timesteps")
        sample = tried.scale_model_input(torch.zeros(1, 4, 8, 8) * tried.init_noise_sigma, tried.timesteps[0])
        tried.step(sample, tried.timesteps[0], sample, return_dict=False)
    except Exception as error:
        problem = f"{kind} cannot take {steps} steps with this checkpoint ({first_line(error)})"
        raise UsageError(f"{problem}: give fewer --num_inference_steps, or another --scheduler") from error
    return scheduler


def check_clip_skip(encoders: list[PreTrainedModel], args: argparse.Namespace) -> None:
    if args.clip_skip is None:
        return
    for encoder in encoders:
        if not encoder.config.model_type.startswith("clip"):
            raise UsageError(f"--clip_skip is for CLIP: the checkpoint's text encoder is a {type(encoder).__name__}")
        layers = encoder.config.num_hidden_layers
        if args.clip_skip >= layers:
            raise UsageError(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers")
    # diffusers looks for the final layer norm there; transformers 5 has it one level up. Not registered as a module.
    if not hasattr(encoders[0], "text_model"):
        encoders[0].__dict__["text_model"] = encoders[0]


# ---------------------------------------------------------------- the int8 UNet in PyTorch
#
# The convention of quant_model.pt: a weight stands for q * weight_scale[out], q int8; an input for
# (q - zero_point) * input_scale, q = clamp(round(x / input_factor[in] / input_scale) + zero_point, 0, 255), uint8.
# input_factor is SmoothQuant's smoothing scale, which the weights are multiplied by. A layer with int8 weights but no
# input_scale computes in float.
#
# With guidance, the batch's second half is its first half with captions (paired). Guidance multiplies the difference of
# the two outputs, and with it the difference of their rounding errors. So of the second half only its difference from
# the first is quantized, whose scale is finer; as layers are linear, f(first + difference) = f(first) + f(difference).
# (Ditto, arXiv 2501.11211, does so from timestep to timestep.)


def build_int8_unet(
    payload: dict[str, Any], dtype: torch.dtype, device: torch.device, paired: bool = False
) -> UNet2DConditionModel:
    """A diffusers UNet with int8 layers, filled from the file; the full-precision UNet is never made."""
    state_dict, config = payload["state_dict"], payload["unet_config"]
    scales = (".weight_scale", ".input_scale")
    int8_names = sorted({name.rpartition(".")[0] for name in state_dict if name.endswith(scales)})
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config({key: config[key] for key in unet_defaults() if key in config})
            for name in int8_names:
                layer = unet.get_submodule(name)
                if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                    raise ValueError(f"{name} is neither Linear nor Conv2d")
                unet.set_submodule(name, Int8Layer(layer, quantize_input=f"{name}.input_scale" in state_dict))
        check_state_dict(state_dict, unet.state_dict(), set(int8_names))
        unet.load_state_dict(state_dict, assign=True)
    except Exception as error:  # a wrong config fails inside diffusers in its own ways
        raise UsageError(f"quant_model.pt does not fit its own architecture: {first_line(error)}") from error
    for name, module in unet.to(device).named_modules():
        if isinstance(module, Int8Layer):
            module.prepare()
            # paired queries, keys and values would cost time and gain 0.1 dB in latents
            module.paired = paired and module.quantize_input and not name.endswith(("to_q", "to_k", "to_v"))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter.to(dtype), requires_grad=False))
    for last in filter(None, (unet.conv_norm_out, unet.conv_out)):  # in fp32: guidance multiplies their rounding errors
        last.float().register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    return unet.eval()


def check_state_dict(
    state_dict: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], int8_names: set[str]
) -> None:
    """Raise ValueError unless each tensor of the UNet, and no other, is there with its shape and kind."""
    if not int8_names:
        raise ValueError("not one layer is int8")
    for name in sorted(wanted.keys() | state_dict.keys()):
        if name not in state_dict or name not in wanted:
            raise ValueError(f"{name} is {'missing' if name in wanted else 'not part of it'}")
        ours, theirs = state_dict[name], wanted[name]
        same_kind = ours.dtype == theirs.dtype
        if name.rpartition(".")[0] not in int8_names:  # of int8 layers, kernels read the bytes as they are
            same_kind |= ours.is_floating_point() and theirs.is_floating_point()
        if not same_kind or ours.shape != theirs.shape:
            stored, needed = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (ours, theirs))
            raise ValueError(f"{name} is {stored}, not {needed}")


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
        self.conv_args = (layer.stride, layer.padding, layer.dilation, layer.groups) if is_conv else None
        self.quantize_input, self.paired = quantize_input, False

    def prepare(self) -> None:
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
        # The zero point is not 0, as OpenVINO would then choose convolutions that keep weights of their own: 0.5 GiB.
        changes = torch.fake_quantize_per_tensor_affine(changes / scales, 1.0, 127, 0, 255)
        return torch.cat([output, output + self.compute(changes.to(x.dtype), None) * scales.to(x.dtype)])

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = (self.weight.float() * self.weight_scale).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias) if self.conv_args is None else F.conv2d(x, weight, bias, *self.conv_args)


# ---------------------------------------------------------------- the int8 UNet in OpenVINO

DEVICE_PROPERTIES = "FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"
GRAPH_VERSION = 5  # to be raised with every change of the graph that is made or compiled: older files are made anew


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

    if isinstance(unet.conv_norm_out, nn.GroupNorm):
        unet.conv_norm_out = DividedGroupNorm(unet.conv_norm_out)

    def predict(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        named = dict(zip(more, rest))
        cond = named.pop("timestep_cond", None)
        return unet(sample, timestep, text, timestep_cond=cond, added_cond_kwargs=named, return_dict=False)[0]

    model = trace(predict, examples, sizes, "out_sample")
    store_as_fp16(model)
    return model


class DividedGroupNorm(nn.Module):
    """A GroupNorm in parts, each of which OpenVINO can be told to compute in fp32."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = F.instance_norm(x.reshape(x.shape[0], self.norm.num_groups, -1), eps=self.norm.eps)
        weight, bias = self.norm.weight.view(-1, 1, 1), self.norm.bias.view(-1, 1, 1)
        return groups.reshape(x.shape) * weight + bias


def save_openvino_unet(model: Any, path: Path) -> None:
    """Write the model with a mark at its last layers, which makes OpenVINO compute them in fp32 in a model in bf16.

    They are conv_norm_out, its activation, conv_out, and the addition before them. OpenVINO 2026.4 reads the mark from
    files, but does not write it.
    """
    import_openvino().save_model(model, path, compress_to_fp16=False)
    last, node = [], model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() not in ("MVN", "FakeQuantize", "Parameter"):  # the second where conv_out is int8
        last, node = [*last, node], node.input_value(0).get_node()
    if node.get_type_name() == "MVN":
        groups = node.input_value(0).get_node()
        last += [node, groups, groups.input_value(0).get_node()]
        xml, names = ElementTree.parse(path), {node.get_friendly_name() for node in last}
        for layer in xml.iter("layer"):
            if layer.get("name") in names:
                info = layer.find("rt_info")
                info = ElementTree.SubElement(layer, "rt_info") if info is None else info
                ElementTree.SubElement(info, "attribute", name="precise", version="0", value="dynamic:dynamic")
        xml.write(path)


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
    folders, problems = [file.with_suffix(".openvino") / name, user_cache() / name], []
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
        f"-qm {file}: the OpenVINO model of it was not written to {' or '.join(problems)}: free space there, or set "
        "XDG_CACHE_HOME to a folder that has some"
    )


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-unet-int8"


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
        pixels = math.prod(shapes[0][2:])
        precision = self.settings.get("INFERENCE_PRECISION_HINT") if self.args.device == "CPU" else None
        may_be_long = precision is not None and pixels >= LONG_ATTENTION
        long_attention = long_attention_operation(precision) if may_be_long else None

        def write(folder: Path) -> None:
            logger.info(f"compiling for {shapes[0]} latents: this is done once for each size and batch")
            model = self.core.read_model(self.model_file())
            model.reshape(dict(enumerate(shapes)))
            if not self.quantize_inputs:
                leave_inputs_in_float(model)
            if long_attention is not None:
                replace_long_attention(model, long_attention, precision)
            compiled = self.core.compile_model(model, self.args.device, self.settings)
            (folder / "unet.blob").write_bytes(compiled.export_model().getbuffer())

        made_of = shapes, self.quantize_inputs, self.settings, self.about_device, long_attention is not None
        name = f"{self.name}-{digest(*made_of)}"
        blob = cached(file, name, write) / "unet.blob"
        with open(blob, "rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensor = import_openvino().Tensor(np.frombuffer(memory, np.uint8), shared_memory=True)
        compiled = self.core.import_model(tensor, self.args.device, self.settings)
        if hasattr(mmap, "MADV_DONTNEED"):  # the weights were packed: what was read from the file may leave memory
            memory.madvise(mmap.MADV_DONTNEED)
        self.compiled = [memory, tensor, compiled, compiled.create_infer_request()]

    def model_file(self) -> Path:
        """unet.xml (and unet.bin): the OpenVINO model of quant_model.pt, for any size; written at its first use."""
        file = quant_model_file(self.args.quantized_model_name_or_path)

        def write(folder: Path) -> None:
            logger.info("converting quant_model.pt to an OpenVINO model: this is done once")
            payload = read_quant_model(file)
            if graph_name(payload, self.args) != self.name:
                raise UsageError(f"-qm {file}: the file was replaced while it was in use; start again")
            paired = pairs_guidance(payload["unet_config"], self.args)
            unet = build_int8_unet(payload, torch.float32, torch.device("cpu"), paired)
            save_openvino_unet(unet_to_openvino(unet), folder / "unet.xml")

        return cached(file, self.name, write) / "unet.xml"


def graph_name(payload: dict[str, Any], args: argparse.Namespace) -> str:
    """Name of the OpenVINO model of a quant_model.pt, made of all that decides what is in it."""
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
    inputs = torch.randint(192, 256, (2, 64, 8, 8), generator=generator).float() - 7
    for layer, x in ((nn.Linear(64, 32, bias=False), inputs[:, :, 0, 0]), (nn.Conv2d(64, 32, 3, bias=False), inputs)):
        int8 = Int8Layer(layer, quantize_input=True)
        int8.weight = torch.randint(96, 128, layer.weight.shape, dtype=torch.int8, generator=generator)
        int8.weight_scale, int8.input_factor = torch.full((32,), 0.5), torch.ones(64)
        int8.input_scale, int8.input_zero_point = torch.tensor(1.0), torch.tensor(7)
        int8.prepare()
        model = trace(int8, {"x": x}, {"x": list(x.shape)}, "y")
        compiled = openvino_core().compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})
        if not np.allclose(compiled([x.numpy()])[0], int8(x)):
            return False
    return True


# ---------------------------------------------------------------- long attention


@dataclass
class AttentionKernel:
    """C++ for attention whose inputs and output are of this dtype, on CPUs that have one of these sets of flags."""

    source: Path
    dtype: torch.dtype
    flags: tuple[set[str], ...]
    needs: str  # the same in words
    largest_error: float  # of its output, relative, on the inputs by which it is tested

    def runs_here(self) -> bool:
        return any(needed.issubset(cpu_flags()) for needed in self.flags)


# By OpenVINO's names of what it computes in.
ATTENTION_KERNELS = {
    "bf16": AttentionKernel(
        source=Path(__file__).with_name("amx_attention.cpp"),  # uses amx_bf16, too
        dtype=torch.bfloat16,
        flags=({"avx512_bf16", "avx512vbmi"},),
        needs="AVX512-BF16 and AVX512-VBMI",
        largest_error=0.05,
    ),
    "f32": AttentionKernel(
        source=Path(__file__).with_name("vnni_attention.cpp"),
        dtype=torch.float32,
        flags=({"avx512_vnni"}, {"avx_vnni"}),
        needs="AVX512-VNNI or AVX-VNNI",
        largest_error=0.002,
    ),
}
# What ONEDNN_MAX_CPU_ISA, by which a CPU imitates another, withholds from OpenVINO: limits, and flags in /proc/cpuinfo.
WITHHELD_FLAGS = {"SSE.*|AVX|AVX2.*": "avx512|amx", "SSE.*|AVX|AVX2|AVX512_CORE": ".*vnni"}
WITHHELD_FLAGS |= {"AVX512_CORE(_VNNI)?": "avx512_bf16", "AVX512_CORE(_VNNI|_BF16|_FP16)?": "amx"}
ATTENTION_WIDTHS = (40, 64, 80, 160)  # of a head: those of SD 1.x, 2.x and SDXL
LONG_ATTENTION = 1024  # queries; with fewer, a step takes as long with OpenVINO's own attention


def replace_long_attention(model: Any, operation: type, precision: str) -> None:
    """Have ATTENTION_KERNELS compute attention, self or cross, of many queries in a model whose sizes are fixed.

    They take [B, L, heads, D] in this precision, bf16 or f32, as it is, where OpenVINO's own has all four transposed.
    """
    ops = import_openvino().opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() != 3:  # the latter has a mask
            continue
        queries, width = list(node.get_input_shape(0))[2:]
        transposed = [node.input_value(number).get_node() for number in range(3)]
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        if queries < LONG_ATTENTION or width not in ATTENTION_WIDTHS:
            continue
        if all(other.get_type_name() == "Transpose" for other in transposed + readers):
            inputs = [ops.convert(other.input_value(0), precision) for other in transposed]
            attention = ops.convert(operation(inputs), "f32")
            for reader in readers:
                reader.output(0).replace(attention.output(0))
    model.validate_nodes_and_infer_types()


@functools.cache
def long_attention_operation(precision: str) -> type | None:
    """OpenVINO's operation that calls the kernel; None where that cannot be used, and the log says why."""
    try:
        library = load_attention(precision)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        source = ATTENTION_KERNELS[precision].source.name
        logger.info(f"attention by OpenVINO's own kernel, not by {source}: {reason}")
        return None

    class LongAttention(import_openvino().Op):
        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self, inputs)

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return LongAttention(inputs)

        def visit_attributes(self, visitor: Any) -> bool:
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            outputs[0].shape = inputs[0].shape
            attend(library, *(tensor.data for tensor in [*inputs, outputs[0]]))
            return True

    LongAttention.__name__ += f"_{precision}"  # by which OpenVINO tells operations apart
    openvino_core().add_extension(LongAttention)  # by which compiled models, too, find it
    return LongAttention


def load_attention(precision: str) -> ctypes.CDLL:
    """The kernel, built for this CPU by the C++ compiler that is there, once for each version of all these.

    It is kept in the user's cache folder alone: it is code, and the folder of a quant_model.pt may be somebody else's.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be built or loaded here, or what it computes is wrong.
    """
    kernel = ATTENTION_KERNELS[precision]
    if not kernel.runs_here():
        raise OSError(f"this is no CPU with {kernel.needs} under Linux")
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    openvino = Path(import_openvino().__file__).parent  # comes with TBB, in whose threads both compute
    made_of = kernel.source.read_text(), compiler, version, str(openvino), cpu_flags()
    folder = user_cache() / f"attention-{digest(*made_of)}"
    if not is_whole(folder):
        logger.info(f"building {kernel.source.name} for this CPU: this is done once")
        write_folder(folder, lambda new: build_attention(kernel.source, compiler, openvino, new / "attention.so"))
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} is another user's")
    library = ctypes.CDLL(str(folder / "attention.so"))
    if not attention_is_right(library, precision):
        raise OSError("on this CPU, it computes something else")
    return library


def cpu_flags() -> list[str]:
    """The CPU's instruction sets that OpenVINO may use, by the names that Linux has for them."""
    info, limit = Path("/proc/cpuinfo"), os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    found = re.search(r"^flags\s*:(.*)", info.read_text(), re.M) if info.is_file() else None
    withheld = [flags for limits, flags in WITHHELD_FLAGS.items() if re.fullmatch(limits, limit)]
    return [flag for flag in found[1].split() if not any(re.match(flags, flag) for flags in withheld)] if found else []


def build_attention(source: Path, compiler: str, openvino: Path, output: Path) -> None:
    """Compile the source to a library for this CPU, or for the one that it imitates."""
    tbb = next((openvino / "libs").glob("libtbb.so.*"), None)
    if tbb is None:
        raise OSError(f"{openvino / 'libs'} has no libtbb.so")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{openvino / 'include'}"]
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        flags += [f"-mno-{name.replace('_', '-')}" for name in ("avx512f", "amx_bf16") if name not in cpu_flags()]
    libraries = [str(tbb), f"-Wl,-rpath,{tbb.parent}"]
    command = [compiler, *flags, str(source), "-o", str(output), *libraries]
    subprocess.run(command, capture_output=True, text=True, check=True)


def attend(library: ctypes.CDLL, q: np.ndarray, k: np.ndarray, v: np.ndarray, output: np.ndarray) -> None:
    """output = softmax(q kᵀ / √D) v; q and output [B, L, heads, D], k and v [B, L', heads, D], contiguous.

    All are in fp32 or in bf16, for which any type of two bytes is taken.
    """
    batch, queries, heads, width = q.shape
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (q, k, v, output)]
    sizes = [ctypes.c_int64(size) for size in (batch, queries, k.shape[1], heads, width)]
    if library.attention(*pointers, *sizes, torch.get_num_threads()) != 0:
        raise OSError(f"the system gives no tile registers, or heads of width {width} are not in it")


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory; that of bf16, which NumPy does not have, as integers of two bytes."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def attention_is_right(library: ctypes.CDLL, precision: str) -> bool:
    """Whether it computes softmax attention, for weights that are nearly equal, and for some that are nearly 1."""
    generator, kernel = torch.Generator().manual_seed(0), ATTENTION_KERNELS[precision]
    for width, size in itertools.product(ATTENTION_WIDTHS, (1, 20)):
        inputs = [torch.randn(2, length, 2, width, generator=generator) for length in (35, 300, 300)]
        inputs = [(tensor * factor).to(kernel.dtype) for tensor, factor in zip(inputs, (size, 1, 1))]
        output = torch.empty_like(inputs[0])
        attend(library, *map(as_array, [*inputs, output]))
        exact = F.scaled_dot_product_attention(*(tensor.double().transpose(1, 2) for tensor in inputs)).transpose(1, 2)
        if not torch.linalg.norm(output - exact) <= kernel.largest_error * torch.linalg.norm(exact):
            return False
    return True


# ---------------------------------------------------------------- the pipeline


def load_pipeline(args: argparse.Namespace) -> Pipeline:
    """The checkpoint's pipeline, with the int8 UNet in place of its own where -qm is given."""
    name, dtype, engine = checkpoint_name(args), choose_dtype(args), choose_engine(args)
    device = torch.device("cuda" if torch.cuda.is_available() and engine == "torch" else "cpu")
    if name != args.pretrained_model_name_or_path:
        logger.info(f"{args.pretrained_model_name_or_path} has left the hub; using its copy {name}")
    index, unet_config = load_index(name, args), load_unet_config(name, args)
    int8 = args.quantized_model_name_or_path is not None
    if int8:
        payload = read_quant_model(args.quantized_model_name_or_path)
        check_architecture(payload, unet_config, name)
    first_dtype = torch.float32 if args.lora else dtype  # LoRAs are fused in fp32, as in training
    parts = {part: load_part(name, index, part, args, first_dtype) for part in [*text_parts(index), "vae", "scheduler"]}
    check_parts(parts, unet_config, name)
    check_clip_skip(text_encoders(parts), args)
    parts["scheduler"] = choose_scheduler(parts["scheduler"], args)
    parts["vae"].to(memory_format=torch.channels_last)
    if int8:
        parts["unet"] = load_int8_unet(payload, dtype, device, engine, args)
        trained_with = payload.get("loras", [])
        del payload
    else:
        parts["unet"] = load_part(name, index, "unet", args, first_dtype).to(memory_format=torch.channels_last)
    pipeline = make_pipeline(index, parts | load_safety_checker(name, index, args, dtype))
    loras = fuse_loras(pipeline, args, with_unet=not int8)
    if int8:
        check_loras(trained_with, loras)
    if loras:
        for part in [*text_encoders(parts), parts["vae"], *([] if int8 else [parts["unet"]])]:
            part.to(dtype)
    pipeline.unet.register_to_config(sample_size=size_made_for(unet_config))  # int8 and fp32 alike
    if not isinstance(pipeline.unet, OpenVINOUNet):
        # The sampler works in fp32 whatever the UNet computes in: its many small steps would lose bits in bf16.
        pipeline.unet.register_forward_pre_hook(functools.partial(inputs_to, dtype), with_kwargs=True)
        pipeline.unet.register_forward_hook(lambda unet, args, output: tuple(value.float() for value in output))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_int8_unet(
    payload: dict[str, Any], dtype: torch.dtype, device: torch.device, engine: str, args: argparse.Namespace
) -> UNet2DConditionModel:
    """The file's UNet, to be run by `engine`; logs how many of its layers are int8."""
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


def load_safety_checker(
    name: str, index: dict[str, Any], args: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    """The checkpoint's safety checker and what prepares its inputs, unless it has none or it is disabled."""
    if args.disable_safety_checker or is_single_file(name) or not (index.get("safety_checker") or [None])[0]:
        return {}
    try:
        return {part: load_part(name, index, part, args, dtype) for part in ("safety_checker", "feature_extractor")}
    except UsageError as error:
        raise UsageError(f"{error}, or give --disable_safety_checker") from error


def check_loras(trained_with: Any, loras: list[dict[str, Any]]) -> None:
    """The file's UNet holds the LoRAs that it was trained with; the text encoders get theirs from --lora."""
    try:
        theirs = sorted((str(lora["sha256"]), float(lora["weight"])) for lora in trained_with)
        flags = shown(" ".join(f"{lora['name']}:{lora['weight']}" for lora in trained_with))
        in_text = any(lora["text_encoder"] for lora in trained_with)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("-qm is damaged, its loras are none; copy or train it again") from error
    if sorted((lora["sha256"], lora["weight"]) for lora in loras) == theirs:
        return
    if not theirs:
        raise UsageError("--lora: the int8 UNet of -qm was trained without; leave it out, or train with --lora")
    if loras or in_text:
        why = "which changes the text encoder, too" if in_text else "which its int8 UNet holds"
        raise UsageError(f"-qm was trained with --lora {flags}, {why}: give the same{', or none' * (not in_text)}")
    logger.info(f"the int8 UNet holds the LoRA {flags}")


def inputs_to(dtype: torch.dtype, unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}


def image_size(pipeline: Pipeline, args: argparse.Namespace) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else what the checkpoint was made for."""
    pixels, made_for = pipeline.vae_scale_factor, pipeline.unet.config.sample_size or 0
    default = made_for if isinstance(made_for, list) else [made_for, made_for]
    height, width = args.height or default[0] * pixels, args.width or default[1] * pixels
    if not height or not width:
        raise UsageError(f"-m {args.pretrained_model_name_or_path} names no size: give --height and --width")
    if height % pixels or width % pixels:
        raise UsageError(f"--height {height} --width {width}: the checkpoint's VAE needs multiples of {pixels}")
    return height, width


def warn_of_ignored_text(pipeline: Pipeline, args: argparse.Namespace) -> None:
    """Name the words that the text encoder does not read, and a negative prompt that nothing reads."""
    tokenizer, length = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    for prompt in filter(None, [*dict.fromkeys(args.captions), args.negative_prompt]):
        ids = tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1])
            read = f"the text encoder reads {length} of {len(ids)} tokens of {prompt[:60]!r}..."
            logger.warning(f"{read}; cut off: {cut[:1000]!r}")
    if args.negative_prompt is not None and not uses_guidance(pipeline.unet.config, args):
        logger.warning("--negative_prompt has no effect here: without guidance, or with a UNet that takes its scale")


# ---------------------------------------------------------------- exporting the pipeline to OpenVINO


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


def save_openvino(pipeline: Pipeline, args: argparse.Namespace) -> None:
    """Write the whole pipeline as OpenVINO models, in the layout that OpenVINO GenAI and optimum-intel load."""
    ov, vae = import_openvino(), pipeline.vae.requires_grad_(False)
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        needed = "pip install -r requirements-openvino-genai.txt"
        raise UsageError(f"--save_openvino: openvino-tokenizers does not import ({error}): {needed}") from error
    texts = {name: part for name, part in pipeline.components.items() if name in TEXT_PARTS}
    models, xl = {}, isinstance(pipeline, StableDiffusionXLPipeline)
    for name in filter(texts.get, TEXT_PARTS[1::2]):
        length = texts[name.replace("text_encoder", "tokenizer")].model_max_length
        models[name] = text_encoder_to_openvino(texts[name].requires_grad_(False), length, all_layers=xl)
    channels = vae.config.latent_channels
    inputs, sizes = {"latent_sample": torch.randn(1, channels, 16, 16)}, {"latent_sample": [-1, channels, -1, -1]}
    models["vae_decoder"] = trace(lambda latents: vae.decode(latents).sample, inputs, sizes, "sample")
    unet = ov.preprocess.PrePostProcessor(openvino_core().read_model(pipeline.unet.model_file()))
    unet.input("timestep").tensor().set_element_type(ov.Type.i64)  # as OpenVINO GenAI's samplers have it
    models["unet"] = unet.build()

    def write(folder: Path) -> None:
        for name, model in models.items():
            save = save_openvino_unet if name == "unet" else ov.save_model
            save(model, folder / name / "openvino_model.xml")
        for name, part in texts.items():
            if name in models:
                part.config.save_pretrained(folder / name)
            else:
                part.save_pretrained(folder / name)
                ov.save_model(convert_tokenizer(part), folder / name / "openvino_tokenizer.xml")
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
        write_folder(args.save_openvino, write)
        logger.info(f"wrote the pipeline as OpenVINO models to {args.save_openvino}, without a safety checker")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--save_openvino {args.save_openvino}: {str(error).strip().splitlines()[-1]}") from error


# ---------------------------------------------------------------- generating images


@dataclass
class ImageRequest:
    caption: str
    seed: int


@dataclass
class GeneratedImage:
    """status: ok, flagged (the safety checker blackened it) or non-finite (there is no image)."""

    request: ImageRequest
    image: Image.Image | None
    status: str
    seconds: float


def generate_all(
    pipeline: Pipeline, requests: list[ImageRequest], args: argparse.Namespace
) -> Iterator[GeneratedImage]:
    """All images in the order of the requests, in batches of --batch_size."""
    with tqdm(total=len(requests), desc="images", disable=len(requests) == 1) as progress:
        for first in range(0, len(requests), args.batch_size):
            for generated in generate(pipeline, requests[first : first + args.batch_size], args):
                progress.update()
                yield generated


@torch.no_grad()
def generate(pipeline: Pipeline, requests: list[ImageRequest], args: argparse.Namespace) -> list[GeneratedImage]:
    """Denoise, decode and check one batch of images."""
    began = time.perf_counter() - seconds_compiling(pipeline)
    height, width = image_size(pipeline, args)
    latents = pipeline(
        [request.caption for request in requests],
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=None if args.negative_prompt is None else [args.negative_prompt] * len(requests),
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],  # for samplers that add noise
        latents=initial_latents(pipeline, requests, height, width).to(pipeline.device),
        output_type="latent",
        clip_skip=args.clip_skip,
    ).images
    vae, flagged = pipeline.vae, None
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
    decoded = torch.nan_to_num(decoded)
    if hasattr(pipeline, "run_safety_checker"):  # SDXL has none
        decoded, flagged = pipeline.run_safety_checker(decoded, pipeline.device, vae.dtype)
    flagged = flagged or [False] * len(requests)
    from_minus_one = [not flag for flag in flagged]  # the safety checker's black is 0 of 0..1, the VAE's -1 of -1..1
    images = pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=from_minus_one)
    seconds = (time.perf_counter() - seconds_compiling(pipeline) - began) / len(requests)
    statuses = ["flagged" if flag else "ok" if is_finite else "non-finite" for flag, is_finite in zip(flagged, finite)]
    images = [image if is_finite else None for image, is_finite in zip(images, finite)]
    return [GeneratedImage(*row, seconds) for row in zip(requests, images, statuses)]


def initial_latents(pipeline: Pipeline, requests: list[ImageRequest], height: int, width: int) -> torch.Tensor:
    """fp32 noise [N, 4, H/8, W/8], each image's from its own seed: no batch, precision or device changes it."""
    shape = (pipeline.unet.config.in_channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(each.seed)) for each in requests])


def seconds_compiling(pipeline: Pipeline) -> float:
    """Time spent so far on compiling the UNet for OpenVINO or loading it, which no image's time includes."""
    return getattr(pipeline.unet, "seconds_compiling", 0.0)


# ---------------------------------------------------------------- saving images

MAX_NAME_BYTES = 150  # of the caption in a file name; file systems allow 255 for the whole
# Separators, what Windows forbids, control characters, and marks that turn the direction of the text around.
NOT_IN_NAMES = r"[\\/:*?\"<>|\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+"
WINDOWS_DEVICES = r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3])\s*(\.|$)"


def run_metadata(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What is true of every image of this run: what was done, which may not be what was asked."""
    height, width = image_size(pipeline, args)
    config, vae = pipeline.unet.config, pipeline.vae
    file = args.quantized_model_name_or_path and quant_model_file(args.quantized_model_name_or_path)
    float_dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[vae.dtype]
    size = file.stat().st_size if file else sum(weight.nbytes for weight in pipeline.unet.parameters())
    guided = uses_guidance(config, args)
    return {
        "steps": args.num_inference_steps,
        "height": height,
        "width": width,
        "guidance_scale": args.guidance_scale if guided or config.time_cond_proj_dim else 1.0,
        "negative_prompt": args.negative_prompt if guided else None,
        "scheduler": type(pipeline.scheduler).__name__,
        "clip_skip": args.clip_skip,
        "paired_guidance": bool(file) and pairs_guidance(config, args),
        "model": args.pretrained_model_name_or_path,
        "variant": args.variant,
        "lora": [f"{path}:{weight}" for path, weight in args.lora or []],
        "quant_model": str(file) if file else None,
        "precision": "int8" if file else float_dtype,
        "dtype": float_dtype,
        "unet_mb": round(size / 1e6, 1),
        "flags": args.flags,
    }


def save_image(generated: GeneratedImage, metadata: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the image and its row of results.jsonl."""
    caption, seed, status = generated.request.caption, generated.request.seed, generated.status
    row = {"caption": caption, "seed": seed, "status": status, **metadata, "seconds": round(generated.seconds, 3)}
    row |= {"peak_memory_gib": round(peak_memory_gib(), 3), "file": None}
    if generated.image is not None:
        path = free_path(args.output_dir, f"{safe_name(caption)} {metadata['precision']} seed {seed}")
        row["file"] = path.name
        save_png(generated.image, path, row)
    results = args.output_dir / "results.jsonl"
    try:
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{results} was not written to: {error.strerror}; {row['file']} is there") from error
    if status != "ok":
        meaning = {"flagged": "the safety checker blackened it", "non-finite": "numerical failure, no image"}
        logger.warning(f"{caption!r}, seed {seed}: {meaning[status]}")


def save_grid(of_caption: list[GeneratedImage], metadata: dict[str, Any], args: argparse.Namespace) -> None:
    """All images of a caption in one, in rows of equal length as far as it goes."""
    images = [generated.image for generated in of_caption if generated.image is not None]
    if not images:
        return
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = [Image.new("RGB", images[0].size)] * (rows * columns - len(images))
    grid = diffusers.utils.make_image_grid([*images, *blank], rows, columns)
    path = free_path(args.output_dir, f"{safe_name(of_caption[0].request.caption)} {metadata['precision']}")
    save_png(grid, path, metadata)
    logger.info(f"{path}: {len(images)} image(s), {of_caption[-1].seconds:.1f} s each")


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


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, str(value))
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path} was not written: {error.strerror or first_line(error)}") from error


def peak_memory_gib() -> float:
    """The most memory that this process has held so far."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------- main


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
    warn_of_ignored_text(pipeline, args)
    if args.save_openvino is not None:
        save_openvino(pipeline, args)
        if not args.captions:
            return
    metadata = run_metadata(pipeline, args)
    kind, size, threads = metadata["precision"], metadata["unet_mb"], torch.get_num_threads()
    logger.info(f"{kind} UNet ({size} MB), float layers in {metadata['dtype']}, {threads} thread{'s' * (threads > 1)}")

    seeds = range(args.seed, args.seed + args.images_num)
    requests = [ImageRequest(caption, seed) for caption in args.captions for seed in seeds]
    of_caption, made = [], 0
    for generated in generate_all(pipeline, requests, args):
        save_image(generated, metadata, args)
        made += generated.image is not None
        of_caption.append(generated)
        if len(of_caption) == args.images_num:
            save_grid(of_caption, metadata, args)
            of_caption = []
    summary = f"{made} of {len(requests)} images in {args.output_dir}"
    logger.info(f"{summary}, peak memory {peak_memory_gib():.2f} GiB")
    if made < len(requests):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        if "--debug" in sys.argv:
            logging.exception("the traceback of the error below")
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
