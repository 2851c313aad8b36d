#!/usr/bin/env python
"""Quantization-aware training of Stable Diffusion's UNet, distilled from its full-precision self.

Reads a Stable Diffusion 1.x, 2.x or XL checkpoint (a diffusers folder, a hub id or one .safetensors
file) and an image folder with the metadata.jsonl that create_metadata.py wrote. Writes
OUTPUT_DIR/quant_model.pt: the UNet with int8 weights and activation ranges, about a quarter of its
fp32 size; and training.png, which shows how it went.

    accelerate launch train_text_to_image_qat.py \\
        --pretrained_model_name_or_path demo/tiny-stable-diffusion --train_data_dir demo/scenes \\
        --use_ema --resolution=128 --train_batch_size=4 --max_train_steps=300 \\
        --learning_rate=1e-05 --output_dir=qat --use_cpu

--max_train_steps 0 calibrates and converts without training (post-training quantization).
Next: python text2images.py -m MODEL -qm OUTPUT_DIR/quant_model.pt -c "a caption"
"""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import copy
import csv
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

# Importing these libraries on a CPU prints notices about GPU parts that are not there; httpx, every request to the hub.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("LOGLEVEL", "ERROR")  # of neural-compressor
# Large tensors in huge pages: they come and go with every step, and page faults would take a quarter of its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
for library in ("torchao", "torch.utils._pytree", "httpx", "httpx2"):
    logging.getLogger(library).setLevel(logging.ERROR)
# What imports make stays: without this, Python would look for garbage in it then and at the end, for 4 s.
gc.disable()

import accelerate
import diffusers
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import TextualInversionLoaderMixin, single_file_utils
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from huggingface_hub import try_to_load_from_cache
from neural_compressor.common.base_config import DEFAULT_WHITE_LIST, register_config
from neural_compressor.common.utils import Mode
from neural_compressor.torch.quantization import convert, prepare
from neural_compressor.torch.quantization.config import TorchBaseConfig
from neural_compressor.torch.utils.utility import register_algo
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm.auto import tqdm
from transformers import PreTrainedModel

gc.freeze()
gc.enable()

logger = logging.getLogger("train")

# Layers that cost little time and much quality when quantized: kept in float, and stored as fp16.
DEFAULT_KEEP_FLOAT = ["conv_in", "conv_out", "time_embedding", "add_embedding", r".*\.conv_shortcut"]
# Layers whose inputs, but not weights, lose quality when quantized: int8 weights, float arithmetic. GEGLU's products
# and the residual stream have the longest tails; quantizing them would cost about what int8 arithmetic gains there.
DEFAULT_WEIGHT_ONLY = [r".*\.time_emb_proj", r".*\.attn2\.to_[kv]", r".*\.proj_(in|out)", r".*\.ff\.net\.2"]
SMOOTHQUANT_ALPHA = 0.8  # share of an input channel's range that its weights take over
WEIGHT_ONLY_ALPHA = 0.5  # likewise, where the input is not quantized
# Training draws small timesteps more often: the UNet errs most there, and few denoising steps are left to correct it.
TIMESTEP_EXPONENT = 2
# Smoothing scales train at this ratio of the scales' learning rate, which decays to 0 over this fraction of the steps:
# each change of theirs rounds all weights anew, and the biases need the remaining steps to absorb the resulting error.
SMOOTHING_LR_RATIO, SMOOTHING_LR_FRACTION = 0.3, 1 / 3
COMPILE_MIN_PARAMS = 100_000_000  # smaller UNets train in the time that compiling takes
BF16_MIN_PARAMS = 100_000_000  # smaller UNets train in fp32 within minutes; bf16's rounding would hide small errors
MAX_BAD_STEPS = 5  # stop after so many non-finite losses in a row
MAX_BAD_SHARE = 0.1  # stop when more than this share of the images cannot be read
MAX_TRIES = 20  # images in a row that may be unreadable
VALIDATION_STEPS = 30  # denoising steps of a validation image
# Only these decoders are tried: Pillow would hand a file that starts with "%!PS" to Ghostscript, whatever its name.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"]
if importlib.util.find_spec("pillow_heif"):
    import pillow_heif

    pillow_heif.register_heif_opener()
    IMAGE_FORMATS.append("HEIF")
# Programs that make images write their whole workflow into a PNG; Pillow would refuse above 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20, 128 << 20
STREAM_BLOCK = 256  # pairs that --streaming reads and shuffles at a time, undecoded
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.tsv", "metadata.json")
TABLES = (".json", ".csv", ".tsv", ".parq", ".txt")  # how the suffixes of metadata files begin
TARS, ARCHIVES = (".tar", ".tar.gz", ".tgz"), (".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Column names that are looked for; in a webdataset, the extensions of a tar's members are the column names.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "avif", "heic", "img", "picture")
CAPTION_COLUMNS = ("text", "txt", "caption", "json")
# Parts of the datasets library's error messages, and the remedy that is added to each.
DATASET_REMEDIES = {
    "scripts are no longer supported": "; Parquet files of it work",
    "Config name is missing": " Give it by --dataset_config_name",
    "Couldn't cast": " one of its files to the columns of another: give a folder of files that are alike",
}
CAPTIONS_LOOKED_AT = 20_000  # of the first pairs, for the summary that is logged before training


# ---------------------------------------------------------------- arguments


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag's default."""


def at_least(minimum: int, kind: type = int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse


POSITIVE, NOT_NEGATIVE, NOT_NEGATIVE_FLOAT = at_least(1), at_least(0), at_least(0, float)


def add_model_and_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    text = "Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a hub id, or one FILE.safetensors"
    add("--pretrained_model_name_or_path", required=True, help=text)
    add("--config", metavar="FOLDER", help="folder or hub id with the configs and tokenizers of a single file")
    text = "LoRAs (.safetensors, diffusers' or kohya's format) to fuse into the model, by this weight, else 1"
    add("--lora", nargs="+", type=lora_argument, metavar="PATH[:WEIGHT]", help=text)
    add("--revision", help="git revision of the hub model")
    add("--variant", help="file variant of the model's weights, such as fp16")
    add("--cache_dir", help="where downloads are kept")
    add = parser.add_argument_group("data").add_argument
    text = "folder with metadata.jsonl, or that file, whatever its name; with --streaming, tars: their folder, or a "
    text += "pattern such as 'pairs/{00000..00009}.tar'"
    add("--train_data_dir", type=Path, help=text)
    add("--dataset_name", help="instead of a folder: a dataset that the datasets library loads, by name or path")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--streaming", action="store_true", help="read the data in order, shuffled in blocks, without keeping it")
    add("--image_column", help="column of the images; by default file_name in a folder, image or jpg in a dataset")
    add("--caption_column", default="text", help="column of the captions; in tars, txt takes the place of text")
    add("--max_train_samples", type=POSITIVE, help="use only the first so many pairs")
    text = "edge of the square training images in pixels, a multiple of 8; by default what the checkpoint was made for"
    add("--resolution", type=int, help=text)
    add("--center_crop", action="store_true", help="crop the center instead of a random square")
    add("--random_flip", action="store_true", help="flip half of the images horizontally")
    text = "share of captions replaced by the empty one: half, as under classifier-free guidance"
    add("--proportion_empty_prompts", type=float, default=0.5, help=text)
    text = "encode each pair once, before training, into --output_dir (0.5 MB at 512 pixels); needs --center_crop"
    add("--cache_latents", action="store_true", help=text)
    add("--dataloader_num_workers", type=NOT_NEGATIVE, default=0, help="processes that decode images; 0: the main one")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("quantization").add_argument
    text = "layers kept in float, by regexes from the start of the name; given alone, empties --weight_only"
    add("--keep_float", nargs="*", metavar="REGEX", default=DEFAULT_KEEP_FLOAT, help=text)
    text = "layers with int8 weights that compute in float, likewise; given alone, empties --keep_float"
    add("--weight_only", nargs="*", metavar="REGEX", default=DEFAULT_WEIGHT_ONLY, help=text)
    add("--quantization_config", type=Path, metavar="FILE.json", help="a complete one, as quant_model.pt has it")
    add("--calibration_steps", type=POSITIVE, default=200, help="batches that set the activations' ranges")
    add = parser.add_argument_group("losses").add_argument
    text = "weight of the distillation loss: log of the mean squared error to the teacher's output"
    add("--kd_weight", type=NOT_NEGATIVE_FLOAT, default=1.0, help=text)
    add("--feature_kd_weight", type=NOT_NEGATIVE_FLOAT, default=0.0, help="likewise, for the outputs of the blocks")
    text = "weight of the denoising loss on the data, which draws the student away from the teacher"
    add("--task_weight", type=NOT_NEGATIVE_FLOAT, default=0.0, help=text)
    add("--snr_gamma", type=float, help="min-SNR weights (arXiv 2303.09556) for the denoising loss; 5.0 is usual")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--max_train_steps", type=NOT_NEGATIVE, help="optimizer steps; 0: calibrate and convert only")
    add("--num_train_epochs", type=POSITIVE, default=1, help="passes over the data, without --max_train_steps")
    add("--train_batch_size", type=POSITIVE, default=4, help="images per process and forward pass")
    add("--gradient_accumulation_steps", type=POSITIVE, default=1, help="forward passes per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory for about a third more time")
    text = "peak learning rate of the weights, relative to the median magnitude of each weight tensor"
    add("--learning_rate", type=NOT_NEGATIVE_FLOAT, default=1e-5, help=text)
    add("--bias_learning_rate", type=NOT_NEGATIVE_FLOAT, default=1e-4, help="peak learning rate of biases and norms")
    text = "peak learning rate of the activation scales' logarithms; 0 freezes them as calibrated"
    add("--quantizer_learning_rate", type=NOT_NEGATIVE_FLOAT, default=1e-2, help=text)
    add("--scale_lr", action="store_true", help="multiply --learning_rate by processes x accumulation x batch size")
    schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", default="constant", choices=schedules, help="learning rate schedule")
    add("--lr_warmup_steps", type=NOT_NEGATIVE, default=0, help="optimizer steps of warm-up")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the gradient's average")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's decay of the squared gradient's average")
    add("--adam_weight_decay", type=float, default=0.0, help="AdamW's weight decay, away from the teacher's weights")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="norm that gradients are clipped to")
    add("--use_ema", action="store_true", help="save the average of the weights over the last two thirds of the steps")
    add("--seed", type=NOT_NEGATIVE, default=0, help="of data order, crops, noise and timesteps")
    add("--use_cpu", action="store_true", help="train on the CPU even where there is a GPU")
    text = "default: that of accelerate launch, else bf16 for large UNets on hardware that computes in it, else no"
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help=text)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("sd-qat-kd"), help="of quant_model.pt, training.png, checkpoints, logs")
    add("--checkpointing_steps", type=POSITIVE, default=100, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=POSITIVE, default=2, help="number of checkpoints that are kept")
    add("--resume_from_checkpoint", metavar="latest|PATH", help="continue, to the same bits as an unbroken run")
    add("--validation_prompts", nargs="+", help="captions to generate with teacher and student, side by side")
    add("--validation_steps", type=POSITIVE, default=100, help="optimizer steps between validations")
    text = "tracker of accelerate (tensorboard, wandb, ...), or none; by default tensorboard if it is installed"
    add("--report_to", help=text)
    add("--logging_dir", default="logs", help="the tracker's folder, inside --output_dir")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--push_to_hub", action="store_true", help="upload quant_model.pt and the validation images")
    add("--hub_token", help="token to push with, if not the one of `hf auth login`")
    add("--hub_model_id", help="repository to push to, if not the name of --output_dir")


def lora_argument(text: str) -> tuple[Path, float]:
    """PATH[:WEIGHT] of --lora."""
    match = re.fullmatch(r"(.+\.safetensors)(?::([-+]?[\d.]+))?", text)
    if match is None:
        problem = "is no FILE.safetensors or FILE.safetensors:WEIGHT (other files that hold LoRAs could run code)"
        raise argparse.ArgumentTypeError(f"{text} {problem}")
    if not Path(match[1]).is_file():
        raise argparse.ArgumentTypeError(f"{match[1]}: no such file")
    return Path(match[1]), float(match[2] or 1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_and_data_arguments(parser)
    add_quantization_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args(argv)

    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir FOLDER or --dataset_name NAME")
    if args.streaming and (args.max_train_steps is None or args.max_train_samples is not None):
        parser.error("--streaming does not know the number of pairs: give --max_train_steps, no --max_train_samples")
    if args.train_data_dir is not None and not args.streaming and not args.train_data_dir.exists():
        parser.error(f"--train_data_dir {args.train_data_dir}: no such folder (--dataset_name takes names of the hub)")
    if args.cache_latents and (args.streaming or not args.center_crop):
        parser.error("--cache_latents keeps one crop of each pair: give --center_crop, and no --streaming")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        parser.error(f"--resolution must be a multiple of 8: {max(8, args.resolution // 8 * 8)} would do")
    if args.quantization_config is not None:
        if args.keep_float is not DEFAULT_KEEP_FLOAT or args.weight_only is not DEFAULT_WEIGHT_ONLY:
            parser.error("--quantization_config is complete: give it without --keep_float and --weight_only")
        if not args.quantization_config.is_file():
            parser.error(f"--quantization_config {args.quantization_config}: no such file")
    if args.kd_weight + args.task_weight + args.feature_kd_weight == 0:
        parser.error("--kd_weight, --task_weight and --feature_kd_weight must not all be zero")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error("--proportion_empty_prompts must lie between 0 and 1")
    if args.mixed_precision == "fp16" and (args.use_cpu or not torch.cuda.is_available()):
        parser.error("--mixed_precision fp16 needs a CUDA device; CPUs have bf16: use --mixed_precision bf16, or no")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--hub_token would be shown in the wandb run: use `hf auth login` instead")
    return args


# ---------------------------------------------------------------- errors, files, random numbers


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


class TrainingError(Exception):
    """The run cannot go on: a full disk, a loss that is not finite. Exit code 1."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def root_os_error(error: BaseException) -> str:
    """What the system said: torch raises errors of its own about a full disk, before and after the system's."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return first_line(next((link for link in chain if isinstance(link, OSError)), error))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces the one at `path` once it is complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def generator_for(seed: int, *key: Any) -> torch.Generator:
    """A generator that is a function of (seed, key), so that no random state has to survive a restart."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- start: threads, precision, logging

# Process id of accelerate launch or torchrun. They forward no signals, and may be killed: their end counts as SIGTERM.
LAUNCHER = os.getppid() if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys() else None


def use_all_cores() -> None:
    """Undo the OMP_NUM_THREADS=1 that `accelerate launch` and torchrun set by default.

    The launcher's environment, unlike this process's, shows whether the user had set the variable.
    """
    if LAUNCHER is None or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    try:
        if "OMP_NUM_THREADS" in psutil.Process(LAUNCHER).environ():
            return
    except (psutil.Error, OSError):
        return
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def choose_precision(args: argparse.Namespace) -> str:
    """The flag, else that of `accelerate launch`, else bf16 for large UNets on hardware that computes in it."""
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is not None or launched_with != "no":
        return args.mixed_precision or launched_with
    if torch.cuda.is_available() and not args.use_cpu:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if fast and unet_size(args) > BF16_MIN_PARAMS else "no"


def unet_size(args: argparse.Namespace) -> int:
    """Number of parameters of the checkpoint's UNet, by its config; 0 where it has no UNet that can be read."""
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(load_unet_config(checkpoint_name(args), args))
    except Exception:  # load_pipeline will say what is wrong with it
        return 0
    return sum(parameter.numel() for parameter in unet.parameters())


def choose_tracker(args: argparse.Namespace) -> str | None:
    if args.report_to is None:
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    if args.report_to == "none":
        return None
    if importlib.util.find_spec(args.report_to) is None:
        raise UsageError(f"--report_to {args.report_to}: not installed; install it, or give --report_to none")
    return args.report_to


def start(args: argparse.Namespace) -> Accelerator:
    """Set up threads, logging, output folder, accelerator and seed; log what the run will use."""
    use_all_cores()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)  # it sets its own level when imported
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, in data parallelism
    for engine in ("DeepSpeed", "FSDP", "Megatron_LM"):  # before accelerate looks for their packages
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            raise UsageError(f"accelerate is set up for {engine}; this script supports plain data parallelism only")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from error
    args.mixed_precision = precision = choose_precision(args)  # a resumed run must have the same
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=choose_tracker(args),
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        # the other processes wait while one validates and saves
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        kind = accelerator.distributed_type.value
        raise UsageError(f"accelerate is set up for {kind}; this script supports plain data parallelism only")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("fp16 does not work on CPUs: accelerate launch --mixed_precision bf16, or no")
    torch.manual_seed(args.seed)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)  # one process speaks for all
    threads, processes = torch.get_num_threads(), accelerator.num_processes
    logger.info(f"{accelerator.device}, {threads} threads, {processes} process(es), mixed precision {precision}")
    return accelerator


# ---------------------------------------------------------------- the model

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


@dataclass
class Pipeline:
    """A Stable Diffusion checkpoint; only the UNet learns."""

    index: dict[str, Any]  # model_index.json
    parts: dict[str, Any]  # the tokenizer and the text encoder, or both of each, and the VAE, as the index calls them
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampler: SchedulerMixin  # the checkpoint's own, for validation
    loras: list[dict[str, Any]] = field(default_factory=list)  # that were fused into it, as quant_model.pt records them

    @property
    def tokenizers(self) -> list[Any]:
        return [part for name, part in self.parts.items() if name.startswith("tokenizer")]

    @property
    def vae(self) -> Any:
        return self.parts["vae"]

    def with_unet(self, unet: UNet2DConditionModel) -> DiffusionPipeline:
        """diffusers' pipeline, which generates images."""
        return make_pipeline(self.index, self.parts | {"unet": unet, "scheduler": copy.deepcopy(self.sampler)})


def checkpoint_name(args: argparse.Namespace) -> str:
    """Folder or hub id to load; the id that Intel's example names is gone, a copy of it is there."""
    name = args.pretrained_model_name_or_path
    gone = name == "runwayml/stable-diffusion-v1-5" and not Path(name).is_dir()
    return "stable-diffusion-v1-5/stable-diffusion-v1-5" if gone else name


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> Pipeline:
    """Load the parts one by one, by the classes that model_index.json names (the safety checker is not needed here).

    Sets --resolution where it was not given.

    Raises:
        UsageError: the folder or id holds no Stable Diffusion text-to-image model, or a part is damaged.
    """
    name = checkpoint_name(args)
    if name != args.pretrained_model_name_or_path:
        logger.info(f"{args.pretrained_model_name_or_path} has left the hub; using its copy {name}")
    index = load_index(name, args)
    unet_config = load_unet_config(name, args)
    sampler, noise_scheduler = load_schedulers(name, index, args)
    parts = {part: load_part(name, index, part, args) for part in [*text_parts(index), "vae"]}
    check_parts(parts, unet_config, name)
    vae = parts["vae"]
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution is None:
        made_for = size_made_for(unet_config) or 512 // pixels
        args.resolution = pixels * (made_for if isinstance(made_for, int) else min(made_for))
    if args.resolution % pixels:
        raise UsageError(f"--resolution {args.resolution}: the VAE of {name} needs a multiple of {pixels}")
    for encoder in text_encoders(parts):
        encoder.requires_grad_(False).to(accelerator.device)
    vae.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)
    vae.use_slicing = is_xl(index)  # a batch of 1024-pixel images would take more memory than the UNet
    if accelerator.mixed_precision == "fp16" and vae.config.get("force_upcast"):  # in fp16 it overflows
        for method in ("encode", "decode"):
            in_fp32 = torch.autocast(accelerator.device.type, enabled=False)(getattr(vae, method))
            setattr(vae, method, in_fp32)
    others = sum(parameter.numel() for part in [*text_encoders(parts), vae] for parameter in part.parameters())
    check_memory(others, accelerator, args)
    unet = load_part(name, index, "unet", args)  # the largest part: last, once it is known to fit
    pipeline = Pipeline(index, parts, unet, noise_scheduler, sampler)
    if args.lora:
        pipeline.loras = fuse_loras(pipeline.with_unet(unet), args)
        unet.requires_grad_(True)  # again, after peft
    return pipeline


def check_memory(other_parameters: int, accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Log what the run needs beside activations, before the UNet is loaded; `other_parameters` are all but the UNet's.

    In fp32: weights, gradients, two moments, the average; in the precision of the run: the teacher.

    Raises:
        UsageError: the machine has less.
    """
    parameters, teacher = unet_size(args), 1 if accelerator.mixed_precision == "no" else 0.5
    purpose, copies = "weights", {"with --max_train_steps 0": 1.0}
    if args.max_train_steps != 0:
        purpose = f"weights, gradients, two moments,{' average,' * args.use_ema} teacher"
        copies = {"without --use_ema": 4 + teacher} | copies
        copies = ({"as asked for": 5 + teacher} if args.use_ema else {}) | copies
    sizes = {flags: 4e-9 * (count * parameters + other_parameters) for flags, count in copies.items()}
    needed = max(sizes.values())
    if accelerator.device.type == "cuda":
        available = torch.cuda.get_device_properties(accelerator.device).total_memory / 1e9
    else:
        available = psutil.virtual_memory().total / 1e9
    logger.info(f"about {needed:.1f} GB for {purpose}, beside activations")
    if needed > available:
        fitting = [f"{flags} {size:.1f} GB" for flags, size in sizes.items() if size <= available]
        problem = f"{needed:.1f} GB for {purpose}, beside activations, and {accelerator.device} has {available:.1f} GB"
        raise UsageError(f"the run needs {problem}; {' or '.join(fitting) or 'nothing less'} would do")


def load_schedulers(name: str, index: dict[str, Any], args: argparse.Namespace) -> tuple[SchedulerMixin, DDPMScheduler]:
    """The checkpoint's own sampler, and a scheduler that adds noise by the same betas."""
    sampler = load_part(name, index, "scheduler", args)
    if args.validation_prompts:
        try:  # an LCM sampler, say, may not have as many
            copy.deepcopy(sampler).set_timesteps(VALIDATION_STEPS)
        except Exception as error:
            problem = f"the checkpoint's {type(sampler).__name__} cannot do {VALIDATION_STEPS} steps"
            raise UsageError(f"--validation_prompts: {problem} ({first_line(error)}); leave it out") from error
    if not has_betas(sampler):
        raise UsageError(f"{name}: its scheduler, {type(sampler).__name__}, has no betas to add noise by")
    noise_scheduler = DDPMScheduler.from_config(sampler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UsageError(f"{name}: unknown prediction type {noise_scheduler.config.prediction_type}")
    return sampler, noise_scheduler


def size_made_for(unet_config: dict[str, Any]) -> int | list[int] | None:
    """Latent edge, or height and width, that a checkpoint's UNet was made for; None where its config does not say."""
    size = unet_config.get("sample_size")
    if isinstance(size, int):
        match = re.match(r"0\.([0-8])\.", str(unet_config.get("_diffusers_version")))
        return max(64, size) if match else size  # before 0.9 they said 32, and the pipelines correct it
    return list(size) if isinstance(size, (list, tuple)) else None


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


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def is_single_file(name: str) -> bool:
    return name.endswith(SINGLE_FILES[0]) and Path(name).is_file()


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


def is_xl(index: dict[str, Any]) -> bool:
    return "XL" in index["_class_name"]


def text_parts(index: dict[str, Any]) -> tuple[str, ...]:
    """Tokenizer and text encoder, or two of each."""
    return TEXT_PARTS if is_xl(index) else TEXT_PARTS[:2]


def text_encoders(parts: dict[str, Any]) -> list[PreTrainedModel]:
    return [part for name, part in parts.items() if name.startswith("text_encoder")]


def make_pipeline(index: dict[str, Any], parts: dict[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline of the parts, without a safety checker unless that is one of them."""
    if is_xl(index):
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**(rest | parts))


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


def aligned(model: nn.Module) -> nn.Module:
    """Align weights to 64 bytes, whatever their place in the file.

    Products with a single row (a timestep's embedding) sum in another order where the weight is not aligned, so the
    same weights in two files would differ in their last bits. Weights above 16 MiB meet none, and are not copied.
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


# ---------------------------------------------------------------- data: captions


def kind_of(value: Any) -> str:
    """What a value is, for a message: its type, and of a dict the first keys, never the content."""
    return f"dict with the keys {listed(value)}" if isinstance(value, dict) else type(value).__name__


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Names in one line, the first of them where there are many."""
    names = [str(name)[:60] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def captions_of(value: Any, names: list[str] | None = None) -> list[str]:
    """The captions in a field of metadata, of a dataset or of a tar; none where it is missing or blank.

    Text is a caption, a number its digits or, where there are `names`, that class's name; a list holds several
    captions, a dict one under "caption" or "text".

    Raises:
        ValueError: anything else; says what it is.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if value is None or value != value:  # NaN marks missing values in tables
        return []
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        written = read_literal(value)
        return captions_of(written, names) if written is not None else [value] if value.strip() else []
    if names is not None and type(value) is int:
        return [names[value]] if 0 <= value < len(names) else []  # -1: no class is known
    if type(value) in (int, float):
        return [str(value)]
    if isinstance(value, dict) and not value.keys().isdisjoint(("caption", "text")):
        return captions_of(value["caption" if "caption" in value else "text"], names)
    if isinstance(value, (list, tuple)):
        if names is None and any(type(item) in (int, float) for item in value):
            raise ValueError("a caption cannot be a list of numbers")
        return [caption for item in value for caption in captions_of(item, names)]
    raise ValueError(f"a caption cannot be a {kind_of(value)}")


def decode(data: bytes) -> str:
    """Text in UTF-16 if it begins with a byte order mark, else in UTF-8, else in Windows-1252."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16" if utf16 else "utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")


def read_literal(text: str) -> list | dict | None:
    """A list of texts or a dict with a caption, where the text is its JSON or Python literal, as in exported tables."""
    if not re.match(r"\s*[\[{]\s*[\"']", text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        if isinstance(value, dict) and not value.keys().isdisjoint(("caption", "text")):
            return value
    return None


def read_json(data: bytes) -> Any:
    """JSON of a tar's member; None, which means a pair without a caption, where it is empty or damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return None if value == {} else value


@dataclass
class Columns:
    """Where a dataset has images and captions: the first column that has one counts. COLUMN.KEY is a dict's entry."""

    images: list[str]
    captions: list[str]
    class_names: list[str] | None = None  # of the captions, where they are class labels

    def names(self, columns: Iterable[str]) -> list[str]:
        """Those of `columns` that have to be read."""
        captions = [name if name in columns else name.partition(".")[0] for name in self.captions]
        return list(dict.fromkeys([*self.images, *captions]))

    def image(self, row: dict[str, Any]) -> Any:
        """The undecoded image of a row, or None."""
        return next((row[name] for name in self.images if row.get(name) is not None), None)

    def captions_in(self, row: dict[str, Any], where: str) -> list[str]:
        for name in self.captions:
            column, _, key = (name, "", "") if name in row else name.partition(".")
            value = row.get(column)
            if isinstance(value, bytes) and column.lower().endswith("json"):  # of a tar
                value = read_json(value)
            try:
                if key:
                    value = [item[key] for item in value] if isinstance(value, list) else (value or {})[key]
                found = captions_of(value, self.class_names)
            except (ValueError, TypeError, KeyError) as error:
                problem = f"no {key!r} in a {kind_of(value)}" if key else first_line(error)
                hint = f": give --caption_column {column}.KEY" if "with the keys" in problem else ""
                raise UsageError(f"{where}, {column}: {problem}{hint}") from error
            if found:
                return found
        return []


def named(names: Iterable[str], columns: Iterable[str]) -> list[str]:
    """The columns with these names, whatever their letter case, in the order of the names."""
    return [column for name in names for column in columns if str(column).lower() == name]


def caption_columns(asked_for: str, columns: Iterable[str]) -> list[str]:
    """The columns among these that --caption_column selects: several candidates by default, else the one it names."""
    if asked_for == "text":
        return named(CAPTION_COLUMNS, columns)
    return [asked_for] if asked_for in columns or asked_for.partition(".")[0] in columns else []


# ---------------------------------------------------------------- data: a folder and its metadata


def find_metadata(path: Path) -> Path:
    """The metadata file of an image folder, or the file itself if that is what was given.

    Raises:
        UsageError: there is none, or there are two; says what is there instead, and what to do.
    """
    if path.is_file():
        if not path.suffix.lower().startswith(TABLES):
            raise UsageError(f"{path} is neither a folder nor metadata: {instead_of_table(path)}")
        return path
    found = [path / name for name in METADATA_NAMES if (path / name).is_file()]
    if len(found) == 1 or [file.suffix for file in found[1:]] == [".json"]:  # another tool's
        return found[0]
    problem = f"no metadata.jsonl; {instead_of_metadata(path)}"
    if found:
        problem = f"both {found[0].name} and {found[1].name} are there: delete one"
    raise UsageError(f"--train_data_dir {path}: {problem}")


def instead_of_table(file: Path) -> str:
    """What to do with a file that is no metadata."""
    if file.name.lower().endswith(TARS):
        return f"train on it by --streaming --max_train_steps N --train_data_dir {shlex.quote(str(file))}"
    if file.suffix.lower() in ARCHIVES:
        return "unpack it, and give the folder that it makes"
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return "save it as .csv, and give that"
    return f"give the folder of the images, perhaps {file.parent}"


def instead_of_metadata(folder: Path) -> str:
    """What a folder without metadata holds, and what to do about it."""
    names = (*METADATA_NAMES, "state.json")  # the latter of `save_to_disk`
    nearby = [path for name in names for path in (*folder.glob(f"*/{name}"), folder.resolve().parent / name)]
    nearby = sorted({path.parent for path in nearby if path.is_file()})
    if nearby:
        return f"it is in {', '.join(map(str, nearby[:2]))}: give that folder"
    files = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    suffixes = {path.suffix.lower() for path in files}
    if ".tar" in suffixes:
        return "tars are read with --streaming: add it"
    endings = Image.registered_extensions() | {".heic": ""}
    images = {path.with_suffix("") for path in files if path.suffix.lower() in endings}
    tables = [path for path in files if path.suffix.lower().startswith(TABLES[:-1])]
    tables = [path for path in tables if path.with_suffix("") not in images]  # those are of one image
    named = [path for path in tables if path.stem == "metadata"]
    if named or tables and not suffixes & {".txt", ".caption"}:
        table = (named or tables)[0]
        if table.suffix == ".parquet" and not images:
            return f"{table.name} is damaged, or has no column of images: img2dataset downloads those of URLs"
        return f"are the captions in {table.name}? Then give that file: --train_data_dir {shlex.quote(str(table))}"
    archives = [path.name for path in files if path.suffix.lower() in ARCHIVES]
    if not images:
        return f"unpack {archives[0]} first" if archives else "and there are no images: is it the right folder?"
    return f"run python create_metadata.py --image_path {shlex.quote(str(folder))}"


def encoding_of(path: Path) -> str:
    """UTF-8 unless the file begins with UTF-16's byte order mark, as what Excel saves as Unicode text."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def metadata_rows(path: Path, image_column: str) -> Iterator[Any]:
    """Rows of Parquet, CSV (separated by commas, semicolons or tabs) or JSON: lines, an array, or see `json_rows`."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        yield from parquet.read_table(path).to_pylist()
        return
    with open(path, encoding=encoding_of(path), newline="") as file:
        first = file.readline()
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):
            first = file.readline() if first.startswith("sep=") else first  # Excel's first line
            options = {"delimiter": max(",;\t", key=first.count), "strict": True, "skipinitialspace": True}
            names = [name.strip() for name in next(csv.reader([first], **options), [])]
            yield from csv.DictReader(file, names, **options)
            return
        try:
            values = itertools.chain([json.loads(first)], (json.loads(line) for line in file if line.strip()))
        except ValueError:  # the first line is no whole value: an array, or objects of several lines
            values = json_values(first + file.read())
        for value in values:
            yield from [value] if isinstance(value, dict) and image_column in value else json_rows(value, image_column)


def json_values(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after another; there may be line breaks within and commas between them."""
    decoder, at = json.JSONDecoder(), 0
    while (at := re.compile(r"[\s,]*").match(text, at).end()) < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value


def json_rows(value: Any, image_column: str) -> list[Any]:
    """The rows in a JSON value that is no row: an array's, COCO's, kohya's, or those under a single key such as "data".

    COCO has {"images": [...], "annotations": [...]}; kohya's sd-scripts {"a.jpg": {"caption": ..., "tags": ...}, ...}.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    images, annotations = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        captions: dict[Any, list[Any]] = {}
        for annotation in annotations:
            captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
        return [{**image, "text": captions.get(image.get("id"))} for image in images]
    if value and all(isinstance(entry, dict) for entry in value.values()):
        captions = {
            name: entry.get("text") or entry.get("caption") or entry.get("tags") for name, entry in value.items()
        }
        return [{**entry, image_column: name, "text": captions[name]} for name, entry in value.items()]
    if value and all(os.path.splitext(name)[1].lower() in Image.registered_extensions() for name in value):
        return [{image_column: name, "text": caption} for name, caption in value.items()]
    tables = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return tables[0] if len(tables) == 1 else [value]


def read_metadata(folder: Path, image_column: str, caption_column: str) -> list[tuple[str, str | list[str]]]:
    """(path, caption) of every row of the folder's metadata; a list of captions where there are several.

    Raises:
        UsageError: there is no metadata, a row has no image or no caption that can be read, or leaves the folder.
    """
    path, rows, seen = find_metadata(folder), [], {}
    root, absolute, number = os.path.normpath(path.parent), os.path.abspath(path.parent), 0
    columns = Columns([image_column], [caption_column])
    try:
        for number, row in enumerate(metadata_rows(path, image_column), 1):
            where = f"{path}, row {number}"
            if not isinstance(row, dict):
                raise UsageError(f"{where} is a {kind_of(row)}, not an object with {image_column} and {caption_column}")
            if None in row:  # of csv's reader
                raise UsageError(f"{where} has more fields than the header: put captions that hold commas into quotes")
            if row and not any(row.values()):  # exported tables end with blank rows
                continue
            if row.keys() - seen.keys():
                seen |= dict.fromkeys(row)
                columns.captions = caption_columns(caption_column, seen)
            file = image_path(row, image_column, root, absolute, where)
            captions = columns.captions_in(row, where)
            rows.append((file, captions if captions[1:] else "".join(captions)))
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error, OSError) as error:
        written = (path.parent / ".create_metadata.sha256").is_file()
        remedy = "write it again with create_metadata.py --overwrite" if written else "mend that row"
        if is_lfs_pointer(path):
            raise UsageError(f"{path} is {LFS_POINTER}") from error
        if isinstance(error, UnicodeDecodeError):
            remedy = "save it as UTF-8"
        elif path.suffix.lower() == ".parquet":
            remedy = "copy it again"
        raise UsageError(f"{path}, after row {number}: {first_line(error)}; {remedy}") from error
    if not rows:
        raise UsageError(f"{path} has no rows: run create_metadata.py --image_path '{path.parent}' --overwrite")
    if not columns.captions:
        raise UsageError(f"{path}: no {caption_column!r} among {listed(seen)}; see --caption_column")
    return rows


def image_path(row: dict[str, Any], image_column: str, root: str, absolute: str, where: str) -> str:
    """The path of a row's image below `root`, whose absolute path is the other.

    Raises:
        UsageError: the row names none, or one outside.
    """
    name = row.get(image_column)
    if not isinstance(name, str) or not name:
        problem = f"no {image_column!r} among {listed(row)}" if not name else f"{image_column} is no text"
        problem += " (the first line of a csv must name the columns)" if ".csv, row 1" in where and not name else ""
        raise UsageError(f"{where}: {problem}; see --image_column")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        name = name.replace("\\", "/")  # as Windows writes them
    file = os.path.normpath(os.path.join(root, name))
    inside = os.path.abspath(file).startswith(os.path.join(absolute, ""))
    if not inside and not os.path.realpath(file).startswith(os.path.join(os.path.realpath(root), "")):
        raise UsageError(f"{where}: {name[:200]!r} lies outside the folder {root}: write paths that begin there")
    return file


def match_files(rows: list[tuple[str, Any]], folder: Path, remedy: str) -> list[tuple[str, Any]]:
    """The rows, with the paths on the disk where names differ in letter case or Unicode form, or lack the extension.

    Windows and macOS treat names that differ so as one file, and kohya's metadata leaves the extensions out.

    Raises:
        UsageError: so many images are missing that training would stop.
    """
    missing = [number for number, (file, _) in enumerate(rows) if not os.path.lexists(file)]
    if not missing:
        return rows
    spellings, endings = {}, Image.registered_extensions()
    for parent, _, names in os.walk(folder):
        for file in (os.path.normpath(os.path.join(parent, name)) for name in names):
            stem, ending = os.path.splitext(file)
            for key in {same_spelling(file), *([same_spelling(stem)] if ending.lower() in endings else [])}:
                spellings.setdefault(key, []).append(file)
    matched, gone = list(rows), []
    for number in missing:
        file, captions = rows[number]
        found = spellings.get(same_spelling(file), [])
        if len(found) == 1:
            matched[number] = found[0], captions
        else:
            gone.append(file)
    spelled = [(old, new) for (old, _), (new, _) in zip(rows, matched) if old != new]
    if spelled:
        logger.warning(
            f"{len(spelled)} file names of the metadata are spelled otherwise on the disk, such as "
            f"{spelled[0][0]!r}: {spelled[0][1]!r} is used"
        )
    if gone:
        problem = f"{len(gone)} of {len(rows)} images of the metadata are not there, first {gone[0]!r}"
        if len(gone) > MAX_BAD_SHARE * len(rows):
            raise UsageError(f"{problem}; {remedy}")
        logger.warning(problem)
    return matched


def same_spelling(name: str) -> str:
    """Equal for names that differ in letter case or Unicode form only."""
    return unicodedata.normalize("NFC", name).casefold()


# ---------------------------------------------------------------- data: images


def read_image(source: Any) -> Image.Image:
    """An image as folders and datasets have it (a path, bytes, a dict of both, or a PIL image), decoded to RGB."""
    if isinstance(source, dict):
        if source.get("bytes") is None and "://" in str(source.get("path")):  # on the hub, or inside of an archive
            import datasets

            return to_rgb(datasets.Image().decode_example(source))
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if not isinstance(source, (str, bytes)):
        raise ValueError("there is no image" if source is None else f"a {kind_of(source)} is no image")
    if isinstance(source, str) and (len(source) > 4000 or "://" in source):
        raise ValueError("a URL, not an image: download it, by img2dataset say" if "://" in source else "no path")
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                return to_rgb(image)
        except UnidentifiedImageError:
            file.seek(0)
            raise ValueError(unread_format(file.read(32))) from None


def unread_format(head: bytes) -> str:
    """What a file is that no decoder takes, by its first bytes."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "a HEIC image, which is read where pillow-heif is installed"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "a JPEG XL image, which is not read: convert it"
    if head.startswith(LFS_START):
        return LFS_POINTER
    return "no image in a format that is read" if head else "an empty file"


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: turned as its EXIF says, 16-bit grey rescaled, transparency on white."""
    image.load()
    with contextlib.suppress(Exception):  # of damaged EXIF data; transposed in place, the image itself is kept
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16-bit grey; 32-bit images do not say which value is white
        values = np.asarray(image, dtype=np.float32)
        white = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        image = Image.fromarray((values * (255 / white)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class CaptionedImages(Dataset):
    """Pairs as tensors: pixel_values [3, H, W] in -1..1, input_ids [tokenizers, L], time_ids [6] (see crop_to_square).

    A key is (epoch, row); crop, flip, emptied caption and which of several captions are functions of it and the seed.
    `rows` are (path, caption or captions), or a dataset's, of which `columns` says what is where.
    """

    remedy = "mend them, or take them out of the data"  # where too many images cannot be read

    def __init__(
        self, rows: Any, tokenizers: list[Any], args: argparse.Namespace, columns: Columns | None = None
    ) -> None:
        self.rows, self.tokenizers, self.columns = rows, tokenizers, columns
        self.resolution, self.center_crop, self.random_flip = args.resolution, args.center_crop, args.random_flip
        self.proportion_empty_prompts, self.seed = args.proportion_empty_prompts, args.seed

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, row: int) -> tuple[Any, list[str]]:
        """The undecoded image, and its captions."""
        found = self.rows[row]
        if isinstance(found, tuple):
            return found[0], captions_of(found[1])
        return self.columns.image(found), self.columns.captions_in(found, f"row {row}")

    def micro_batches(self, numbers: range, args: argparse.Namespace) -> Iterable[list[tuple[int, int]]]:
        """Keys (epoch, row) of the micro-batches that one process works on."""
        return ResumableBatchSampler(len(self), args.train_batch_size, args.seed, numbers)

    def all_captions(self) -> Iterator[list[str]]:
        """Captions of each pair, in the order of the rows, without reading the images."""
        if self.columns is None:
            return (captions_of(captions) for _, captions in self.rows)
        rows = self.rows.select_columns([name for name in self.rows.column_names if name not in self.columns.images])
        return (self.columns.captions_in(found, f"row {row}") for row, found in enumerate(rows))

    def replacement_index(self, row: int, draw: float, attempt: int) -> int:
        """Another row, in place of one that cannot be read."""
        return int(draw * len(self) + attempt * 7919) % len(self)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """[N, tokenizers, L], as the pipeline does it: a textual inversion of several vectors has several tokens."""
        ids = []
        for tokenizer in self.tokenizers:
            converted = TextualInversionLoaderMixin().maybe_convert_prompt(captions, tokenizer)
            ids.append(tokenizer(converted, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        return torch.stack(ids, dim=1)

    def augmentation_params(self, epoch: int, row: int) -> list[float]:
        """Between 0 and 1: for crop (x, y), flip, emptied caption, replacement, which of several captions."""
        return torch.rand(6, generator=generator_for(self.seed, "sample", epoch, row)).tolist()

    def choose(self, captions: list[str], draws: list[float]) -> str:
        """One of the captions of a pair, another one in another epoch."""
        return captions[int(draws[5] * len(captions))] if captions else ""

    def mirrored_and_emptied(self, draws: list[float]) -> tuple[bool, bool]:
        """Whether the image is flipped horizontally, and whether its caption is replaced by the empty one."""
        return self.random_flip and draws[2] < 0.5, draws[3] < self.proportion_empty_prompts

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, row = key
        draws = self.augmentation_params(*key)
        mirrored, emptied = self.mirrored_and_emptied(draws)
        image, captions, replaced, failure = None, [], 0, ""
        while image is None and replaced < MAX_TRIES:
            source = None
            try:
                source, captions = self.pair(row)
                image = read_image(source)
            except UsageError:  # an unusable caption, or a stream without a readable pair
                raise
            except Exception as error:  # Pillow's decoders raise about ten kinds; it costs one sample, not the run
                reason = getattr(error, "strerror", None) or first_line(error)
                failure = failure or f"{image_name(source, row)}: {reason}"
                replaced += 1
                row = self.replacement_index(row, draws[4], replaced)
        image = image or Image.new("RGB", (1, 1))  # a placeholder: RunMonitor ends the run before it is trained with
        position = (0.5, 0.5) if self.center_crop else (draws[0], draws[1])
        pixels, time_ids = crop_to_square(image, self.resolution, position, mirrored)
        caption = "" if emptied else self.choose(captions, draws)
        pixel_values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1.0
        return {
            "pixel_values": pixel_values,
            "input_ids": self.tokenize([caption])[0],
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),
            "emptied": torch.tensor(not caption),
            "replaced": torch.tensor(replaced),
            "failure": failure,
            "captioned": torch.tensor(bool(captions)),
        }


def image_name(source: Any, row: int) -> str:
    name = source.get("path") if isinstance(source, dict) else source
    return name if isinstance(name, str) and len(name) < 1000 else f"row {row}"


def crop_to_square(
    image: Image.Image, size: int, position: tuple[float, float], mirrored: bool = False
) -> tuple[Image.Image, list[int]]:
    """Scale the shorter edge to `size`, and cut a square at `position` (0..1 of the room there is).

    Also SDXL's size and crop conditioning (arXiv 2307.01952, section 2.2): height and width of the original image; top
    and left of the square in the scaled image, or in its mirror image; height and width of the square.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(edge * scale)) for edge in image.size)
    left, top = (round((edge - size) * at) for edge, at in zip((width, height), position))
    box = (left / scale, top / scale, min(image.width, (left + size) / scale), min(image.height, (top + size) / scale))
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    if mirrored:
        square, left = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT), width - size - left
    return square, [image.height, image.width, top, left, size, size]


class StreamedImages(CaptionedImages):
    """Pairs of a stream (`rows`), which is read in order and without end.

    There are R readers, one for each data worker of each process. Each epoch has a permutation of the files, drawn from
    the seed; of these permutations, joined end to end, reader r visits files r, r + R, r + 2R, ... Micro-batch m comes
    from reader m % R, so that the position of a sample is a function of m alone, and a resumed run skips ahead without
    decoding. A row is the position in a reader's pairs, times R, plus the reader.
    """

    def __init__(self, rows: Any, tokenizers: list[Any], args: argparse.Namespace, columns: Columns) -> None:
        super().__init__(rows, tokenizers, args, columns)
        self.readers = self.parts = 1  # where readers outnumber files, part p of a file is its pairs p, p + parts, ...
        first = itertools.islice(self.pairs(0, passes=1), STREAM_BLOCK)
        self.first_captions = [captions for _, captions in first]
        if not any(self.first_captions):
            where = f"the first {len(self.first_captions)} pairs have no {' or '.join(columns.captions)}"
            remedy = "see --caption_column"
            if isinstance(rows, Tars):
                remedy += ", or put both next to each other, under one name: tar --sort=name -cf NEW.tar FOLDER"
            raise UsageError(f"{where}: {remedy}")
        self.reading: dict[int, tuple[Iterator, deque]] = {}

    def all_captions(self) -> Iterator[list[str]]:
        """Captions of the first pairs, as the length of a stream is not known."""
        return iter(self.first_captions)

    def pairs(self, reader: int, passes: float = math.inf) -> Iterator[tuple[Any, list[str]]]:
        """The reader's (undecoded image, captions) pairs, without end; the rest of a damaged file is left out."""
        files, visit, empty_files = self.rows.num_shards, reader, set()
        while len(empty_files) < files * self.parts and visit < passes * files * self.parts:
            epoch, at = divmod(visit, files * self.parts)
            order = torch.randperm(files * self.parts, generator=generator_for(self.seed, "files", epoch))
            file, part = divmod(int(order[at]), self.parts)
            visit += self.readers
            empty_files.add((file, part))  # until a pair is found in it
            name = self.rows.files[file] if isinstance(self.rows, Tars) else f"file {file} of the stream"
            shard, without = self.rows.shard(num_shards=files, index=file), 0
            try:
                for number, block in enumerate(shard.iter(batch_size=STREAM_BLOCK)):
                    pairs = [dict(zip(block, values)) for values in zip(*block.values())][part :: self.parts]
                    generator = generator_for(self.seed, "block", epoch, file, part, number)
                    for index in torch.randperm(len(pairs), generator=generator).tolist():
                        pair, where = pairs[index], f"{name}, pair {number * STREAM_BLOCK + part + index * self.parts}"
                        image = self.columns.image(pair)
                        if image is not None:
                            empty_files.discard((file, part))
                            yield image, self.columns.captions_in(pair, where)
                        without += image is None
            except UsageError:
                raise
            except Exception as error:  # a damaged file fails in many ways
                logger.error(f"left out the rest of {name}: {first_line(error)}")
            if without:
                logger.warning(f"left out {without} rows of {name} that have no image")
        if len(empty_files) == files * self.parts:
            raise UsageError("no file of the stream holds a pair that can be read")

    def pair(self, row: int) -> tuple[Any, list[str]]:
        position, reader = divmod(row, self.readers)
        # The latest pairs are kept, as up to MAX_TRIES replacements of an unreadable image read ahead.
        pairs, latest = self.reading.setdefault(reader, (enumerate(self.pairs(reader)), deque(maxlen=32)))
        while not latest or latest[-1][0] < position:
            latest.append(next(pairs))
        return latest[position - latest[-1][0] - 1][1]

    def micro_batches(self, numbers: range, args: argparse.Namespace) -> Iterable[list[tuple[int, int]]]:
        self.reading.clear()  # there may be another number of readers, and earlier positions
        self.readers = numbers.step * max(1, args.dataloader_num_workers)  # the step is the number of processes
        self.parts = math.ceil(self.readers / self.rows.num_shards)
        size = args.train_batch_size
        starts = ((number // self.readers * size, number % self.readers) for number in numbers)
        return ([(0, (start + at) * self.readers + reader) for at in range(size)] for start, reader in starts)

    def replacement_index(self, row: int, draw: float, attempt: int) -> int:
        return row + self.readers  # the reader's next pair, which is also used at its own position


def tar_files(path: Path) -> list[str]:
    """The .tar files of a folder, or of a pattern with {00000..00009} in it."""
    pattern = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        files = sorted(str(file) for ending in TARS for file in path.glob(f"*{ending}"))
    elif pattern:
        before, first, last, after = pattern.groups()
        files = [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    else:
        files = [str(path)] if path.exists() else sorted(glob.glob(str(path))) or [str(path)]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        problem = f"no {missing[0]}" if missing else "holds no .tar; an image folder needs no --streaming"
        below = sorted(file.parent for file in path.glob("*/*.tar")) if not missing else []
        raise UsageError(f"--train_data_dir {path}: {f'the tars are in {below[0]}: give that' if below else problem}")
    other = next((file for file in files if not file.lower().endswith(TARS)), None)
    if other:
        raise UsageError(f"--streaming reads {', '.join(TARS)}, which {other} is not")
    pointer = next(filter(is_lfs_pointer, files), None)
    if pointer:
        raise UsageError(f"{pointer} is {LFS_POINTER}")
    return files


@dataclass
class Tars:
    """Rows of tars in webdataset's format: consecutive members of one name are a row, their extensions the columns.

    As in the datasets library, each file is a shard. A name ends at its first dot or, `dotted`, at its last.
    """

    files: list[str]
    columns: list[str]
    images: list[str]  # those of the columns that hold images
    dotted: bool

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> Tars:
        return Tars(self.files[index::num_shards], self.columns, self.images, self.dotted)

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Blocks of rows, by column. A damaged file raises after the rows before the damage."""
        for file in self.files:
            rows, latest, damage = [], "", None
            try:
                with tarfile.open(file) as tar:
                    for member in tar:
                        tar.members = []  # tarfile would keep every member's header in memory
                        key, column = split_name(member.name, self.dotted)
                        if column not in self.columns or not member.isfile():
                            continue
                        if not rows or key != latest or column in rows[-1]:
                            if len(rows) == batch_size:
                                yield self.block(rows)
                                rows = []
                            rows.append({})
                        data = tar.extractfile(member).read()
                        rows[-1][column] = {"path": member.name, "bytes": data} if column in self.images else data
                        latest = key
            except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
                rows, damage = rows[:-1], error  # the last one may lack members
            if rows:
                yield self.block(rows)
            if damage is not None:
                raise damage

    def block(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {column: [row.get(column) for row in rows] for column in self.columns}


def split_name(name: str, dotted: bool) -> tuple[str, str]:
    """A member's key and column; no column for hidden members, such as macOS puts beside each file."""
    folder, slash, base = name.rpartition("/")
    stem, _, column = base.rpartition(".") if dotted else base.partition(".")
    return folder + slash + stem, "" if base.startswith(".") else column


def open_tars(args: argparse.Namespace) -> tuple[Tars, Columns]:
    """The tars that --train_data_dir names, and their columns by the first members of the first that can be read."""
    files, names = tar_files(args.train_data_dir), []
    for file in files:
        if names := first_members(file):
            break
    dotted = count_pairs(names, True, args) > count_pairs(names, False, args)
    found = list(dict.fromkeys(column for name in names if (column := split_name(name, dotted)[1])))
    try:
        # if no tar can be read, any columns do: the errors are logged when the stream is read
        columns = find_columns(dict.fromkeys(found), args) if names else Columns(["jpg"], ["txt"])
    except UsageError as error:
        where = f", the columns of the first {len(names)} members of {file}"
        raise UsageError(f"{error}{where}: each caption must be next to its image") from error
    if args.image_column is None:  # other tars may have other extensions
        columns.images = list(dict.fromkeys([*columns.images, *IMAGE_COLUMNS]))
    return Tars(files, columns.names(found), columns.images, dotted), columns


def first_members(file: str) -> list[str]:
    """Names of the first 1000 members of a tar; fewer if it is damaged, which is logged when it is read."""
    names: list[str] = []
    with contextlib.suppress(OSError, EOFError, zlib.error, tarfile.TarError), tarfile.open(file) as tar:
        for member in itertools.islice(tar, 1000):
            names.append(member.name)
    return names


def count_pairs(names: list[str], dotted: bool, args: argparse.Namespace) -> int:
    """How many keys (samples) have an image and a caption."""
    columns: dict[str, list[str]] = {}
    for name in names:
        key, column = split_name(name, dotted)
        columns.setdefault(key, []).append(column)
    images = [args.image_column] if args.image_column else IMAGE_COLUMNS
    return sum(bool(named(images, found) and caption_columns(args.caption_column, found)) for found in columns.values())


def load_dataset(args: argparse.Namespace, tokenizers: list[Any]) -> CaptionedImages:
    """The pairs of a folder, of tars or of a dataset."""
    path = Path(args.dataset_name) if args.train_data_dir is None else args.train_data_dir
    if (args.train_data_dir is not None or path.is_file()) and not args.streaming and not is_saved_dataset(path):
        rows = read_metadata(path, args.image_column or "file_name", args.caption_column)[: args.max_train_samples]
        folder, remedy = path.parent if path.is_file() else path, None
        if (folder / ".create_metadata.sha256").is_file():
            remedy = f"run create_metadata.py --image_path {folder} --overwrite, which leaves such images out"
        rows = match_files(rows, folder, remedy or f"names are looked for from {folder}: move the metadata or mend it")
        dataset = CaptionedImages(rows, tokenizers, args)
        dataset.remedy = remedy or dataset.remedy
    else:
        rows, columns = load_rows(args)
        kind = StreamedImages if args.streaming else CaptionedImages
        dataset = kind(rows, tokenizers, args, columns)
    size = f"streaming from {dataset.rows.num_shards} files" if args.streaming else f"{len(dataset)} captioned images"
    logger.info(size)
    return dataset


def is_saved_dataset(path: Path) -> bool:
    """Whether it is a dataset of the datasets library: `save_to_disk`, or Parquet files with images, or one file."""
    if path.suffix == ".arrow" or (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    files = sorted(file for pattern in ("*.parquet", "data/*.parquet") for file in path.glob(pattern))
    files = [path] if path.suffix == ".parquet" and path.is_file() else files
    if not files or any((path / name).is_file() for name in METADATA_NAMES):
        return False
    from pyarrow import parquet

    if is_lfs_pointer(files[0]):
        raise UsageError(f"{files[0]} is {LFS_POINTER}")
    try:  # img2dataset leaves Parquet files without images beside those that it has downloaded
        return not set(IMAGE_COLUMNS).isdisjoint(parquet.read_schema(files[0]).names)
    except (OSError, ValueError):
        return False


def load_rows(args: argparse.Namespace) -> tuple[Any, Columns]:
    """Rows of tars or of a dataset of the datasets library, images unread; and which columns hold what."""
    given = args.train_data_dir if args.dataset_name is None else args.dataset_name
    if args.dataset_name is None and not is_saved_dataset(given):
        return open_tars(args)
    import datasets  # only here: a folder with metadata does not need it

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # the error below says what it would log of files
    path, given = Path(given), f"--{'train_data_dir' if args.dataset_name is None else 'dataset_name'} {given}"
    check_data_files(path, given)
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "streaming": args.streaming}
    source = str(path if args.dataset_name is None else args.dataset_name)
    if path.is_file():
        source, options["data_files"] = path.suffix[1:], {"train": [glob.escape(str(path))]}
    try:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(source)
        else:
            splits = datasets.load_dataset(source, args.dataset_config_name, **options)
    except Exception as error:  # the library fails in ways of its own, and of every format that it reads
        remedy = next(
            (remedy for text, remedy in DATASET_REMEDIES.items() if text in str(error.__cause__ or error)), ""
        )
        raise UsageError(f"{given}: {first_line(error.__cause__ or error)}{remedy}") from error
    rows = splits[choose_split(splits, given)] if isinstance(splits, dict) else splits
    features = rows.features or dict.fromkeys(next(iter(rows)))
    columns = find_columns(features, args)
    for name in columns.images:
        if isinstance(features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = rows.select_columns(columns.names(features))
    if not args.streaming:
        rows = with_images(rows, columns)
        return rows.select(range(min(len(rows), args.max_train_samples or len(rows)))), columns
    return rows if hasattr(rows, "num_shards") else rows.to_iterable_dataset(num_shards=len(rows.cache_files)), columns


def with_images(rows: Any, columns: Columns) -> Any:
    """The rows that have an image: img2dataset's Parquet files keep those that it could not download, too."""
    there = np.any([np.asarray(rows.data.column(name).is_valid()) for name in columns.images], axis=0)
    if there.all() or rows._indices is not None:  # of a selection: missing images are counted when they are read
        return rows
    logger.warning(f"left out {int((~there).sum())} of {len(rows)} rows, which have no image")
    return rows.select(np.flatnonzero(there))


def check_data_files(path: Path, given: str) -> None:
    """The datasets library reads Git LFS pointers as data, and looks for missing local paths on the hub.

    Raises:
        UsageError: names the file and what to do.
    """
    if not path.exists() and (
        "://" in given or given.count("/") > 1 or " ." in given or path.suffix.startswith(TABLES)
    ):
        raise UsageError(f"{given}: no such file or folder, and no name on the hub, such as owner/name")
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        remedy = "an image folder needs no --streaming" if path.suffix.startswith(TABLES) else instead_of_table(path)
        raise UsageError(f"{given} is no dataset: {remedy}")
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    for file in files:
        if file.suffix.startswith((*TABLES, *TARS, ".arrow", ".zip")) and file.is_file() and is_lfs_pointer(file):
            raise UsageError(f"{file} is {LFS_POINTER}")


def choose_split(splits: dict[str, Any], given: str) -> str:
    """The split named train; without one, the split that is most likely meant, with a warning."""
    likely = sorted(splits, key=lambda name: (not name.startswith("train"), not name.startswith(("val", "dev")), name))
    if likely[0] != "train":
        logger.warning(f"{given} has no split train, only {listed(splits)}: {likely[0]} is used")
    return likely[0]


def find_columns(features: dict[str, Any], args: argparse.Namespace) -> Columns:
    """The columns with images (in tars, one for each extension) and with captions.

    Raises:
        UsageError: there are no such columns.
    """
    by_type = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    images = [args.image_column] if args.image_column else named(IMAGE_COLUMNS, features)
    images = images or (by_type if len(by_type) == 1 else [])
    captions = caption_columns(args.caption_column, features)
    for flag, name, found in (
        ("image", args.image_column or "image", images and images[0] in features),
        ("caption", args.caption_column, captions),
    ):
        if not found:
            urls = "; the images of URLs have to be downloaded first, by img2dataset say"
            hint = urls if flag == "image" and any("url" in str(column).lower() for column in features) else ""
            raise UsageError(f"--{flag}_column {name} is none of {listed(features)}{hint}")
    feature = features[captions[0]] if captions[0] in features else None
    return Columns(images, captions, getattr(getattr(feature, "feature", feature), "names", None))


def describe_captions(dataset: CaptionedImages, args: argparse.Namespace) -> None:
    """Log how many captions are missing or will be cut, before hours go into training on them.

    Raises:
        UsageError: none of the first pairs has a caption.
    """
    pairs = list(itertools.islice(dataset.all_captions(), CAPTIONS_LOOKED_AT))
    captions, missing = [caption for found in pairs for caption in found], sum(not found for found in pairs)
    if not captions and args.proportion_empty_prompts < 1:
        remedy = "see --caption_column, or train without by --proportion_empty_prompts 1"
        raise UsageError(f"none of {len(pairs)} pairs has a caption: {remedy}")
    tokenizer = dataset.tokenizers[0]
    length = tokenizer.model_max_length
    longer = sum(len(ids) > length for ids in tokenizer(captions).input_ids) if captions else 0
    first = "first " * (args.streaming or len(pairs) == CAPTIONS_LOOKED_AT)
    logger.info(
        f"captions of the {first}{len(pairs)} pairs: {missing} missing, "
        f"{longer} cut, being longer than the {length} tokens that the text encoder reads"
    )
    for prompt in args.validation_prompts or []:
        if len(tokenizer(prompt).input_ids) > length:
            logger.warning(f"--validation_prompts: {prompt[:60]!r}... is longer than the {length} tokens that are read")
    for key in itertools.chain.from_iterable(dataset.micro_batches(range(16), args)):
        draws, (_, captions) = dataset.augmentation_params(*key), dataset.pair(key[1])
        if captions and not dataset.mirrored_and_emptied(draws)[1]:
            logger.info(f"the first one in training: {dataset.choose(captions, draws)[:200]!r}")
            return


class ResumableBatchSampler(Sampler):
    """Keys (epoch, row) of every micro-batch of one process, epochs joined end to end.

    Micro-batch m of the run holds samples m*B .. m*B+B-1 of that stream, whichever process works on it:
    the order depends on the seed alone, and a resumed run starts anywhere without skipping through data.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, numbers: range) -> None:
        self.rows, self.batch_size, self.seed, self.numbers = rows, batch_size, seed, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        for number in self.numbers:
            keys = []
            for position in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, at = divmod(position, self.rows)
                if epoch not in orders:
                    orders = {key: value for key, value in orders.items() if key == epoch - 1}
                    orders[epoch] = torch.randperm(
                        self.rows, generator=generator_for(self.seed, "order", epoch)
                    ).tolist()
                keys.append((epoch, orders[epoch][at]))
            yield keys


def total_steps(args: argparse.Namespace, dataset: CaptionedImages, accelerator: Accelerator) -> int:
    if args.max_train_steps is not None:
        return args.max_train_steps
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return args.num_train_epochs * math.ceil(len(dataset) / batch)


# ---------------------------------------------------------------- latents, noise and timesteps

ADDED_CONDITIONING = ("text_embeds", "time_ids")  # what SDXL's UNet takes beside encoder_hidden_states
GUIDANCE_SCALES = 1.0, 14.0  # range of those drawn for a UNet that takes the scale as an input (LCM, arXiv 2310.04378)


def encode(
    pipeline: Pipeline, batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean and standard deviation of the images' latents, [B, 2, 4, H/8, W/8]; what `encode_captions` gives.

    For SDXL also time_ids [B, 6]. Its embeddings of an emptied caption are zeros where the checkpoint says so.
    """
    if "latents" in batch:  # by --cache_latents
        names = [name for name in ("encoder_hidden_states", *ADDED_CONDITIONING) if name in batch]
        return batch["latents"].to(device), {name: batch[name].to(device) for name in names}
    pixel_values = batch["pixel_values"].to(device).contiguous(memory_format=torch.channels_last)
    encoded = pipeline.vae.encode(pixel_values)
    if hasattr(encoded, "latents"):  # of an AutoencoderTiny, which has no distribution
        moments = encoded.latents, torch.zeros_like(encoded.latents)
    else:
        moments = encoded.latent_dist.mean, encoded.latent_dist.std
    embeddings = encode_captions(text_encoders(pipeline.parts), batch["input_ids"].to(device))
    if "text_embeds" in embeddings:
        if pipeline.index.get("force_zeros_for_empty_prompt", True):
            for tensor in embeddings.values():
                tensor[batch["emptied"].to(device)] = 0
        embeddings["time_ids"] = batch["time_ids"].to(device)
    return torch.stack(moments, dim=1).float(), embeddings


@dataclass
class NoisedBatch:
    """A batch of noisy latents with the UNet's other inputs, and what it was made of."""

    noisy_latents: torch.Tensor  # [B, 4, H/8, W/8], as latents and noise
    timesteps: torch.Tensor  # [B]
    # encoder_hidden_states [B, L, D]; SDXL: added_cond_kwargs; LCM: timestep_cond [B, time_cond_proj_dim]
    conditioning: dict[str, Any]
    latents: torch.Tensor
    noise: torch.Tensor

    def predict(self, unet: nn.Module) -> torch.Tensor:
        """The UNet's output in fp32, [B, 4, H/8, W/8]."""
        return unet(self.noisy_latents, self.timesteps, **self.conditioning).sample.float()


@torch.no_grad()
def add_noise(
    pipeline: Pipeline,
    batch: dict[str, torch.Tensor],
    stratum: tuple[int, int],
    exponent: int,
    generator: torch.Generator,
    accelerator: Accelerator,
) -> NoisedBatch:
    """Encode the images and add noise; `sample_timesteps` explains stratum and exponent."""
    scheduler, device = pipeline.noise_scheduler, accelerator.device
    with accelerator.autocast():
        distribution, embeddings = encode(pipeline, batch, device)
    latents = sample_latents(distribution, generator, pipeline.vae)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    timesteps = sample_timesteps(scheduler, len(latents), stratum, exponent, generator).to(device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    conditioning: dict[str, Any] = {"encoder_hidden_states": embeddings.pop("encoder_hidden_states")}
    if embeddings:
        conditioning["added_cond_kwargs"] = embeddings
    width = pipeline.unet.config.time_cond_proj_dim
    if width is not None:
        low, high = GUIDANCE_SCALES
        scales = low + (high - low) * torch.rand(len(latents), generator=generator)
        # the pipeline's own method, which embeds scale - 1; it reads nothing of `self`
        embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, width)
        conditioning["timestep_cond"] = embedding.to(device)
    return NoisedBatch(noisy_latents, timesteps, conditioning, latents, noise)


def sample_latents(distribution: torch.Tensor, generator: torch.Generator, vae: Any) -> torch.Tensor:
    mean, deviation = distribution.unbind(dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + deviation * noise) * vae.config.scaling_factor


def sample_timesteps(
    scheduler: DDPMScheduler, count: int, stratum: tuple[int, int], exponent: int, generator: torch.Generator
) -> torch.Tensor:
    """Stratified timesteps, [count], which lower the gradient's variance (arXiv 2107.00630, appendix I.1).

    The schedule has one stratum for each image of an optimizer step; stratum (i, n) says that this micro-batch is the
    i-th of n. Timesteps are T * u ** exponent with u uniform in 0..1: exponent 2 prefers the small ones.
    """
    index, micro_batches = stratum
    places = index * count + torch.arange(count) + torch.rand(count, generator=generator).double()
    return ((places / (micro_batches * count)) ** exponent * scheduler.config.num_train_timesteps).long()


class CachedLatents(Dataset):
    """What `encode` makes of each pair, in one file for each combination of flip and caption that training draws."""

    def __init__(self, dataset: CaptionedImages, folder: Path) -> None:
        self.dataset, self.folder, self.remedy = dataset, folder, dataset.remedy
        self.micro_batches = dataset.micro_batches

    def file(self, key: tuple[int, int]) -> Path:
        draws = self.dataset.augmentation_params(*key)
        mirrored, emptied = self.dataset.mirrored_and_emptied(draws)
        captions = [] if emptied else self.dataset.pair(key[1])[1]
        chosen = f"-caption{int(draws[5] * len(captions))}" if len(captions) > 1 else ""
        return self.folder / f"{key[1]}{'-mirrored' * mirrored}{'-emptied' * emptied}{chosen}.pt"

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        try:
            return torch.load(self.file(key), weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            raise UsageError(f"{self.file(key)} is damaged ({first_line(error)}): delete it and resume") from error

    @torch.no_grad()
    def fill(self, keys: Iterable[tuple[int, int]], pipeline: Pipeline, accelerator: Accelerator) -> None:
        """Encode what is not there yet; a file gets its name once it is complete, so this may be interrupted."""
        self.folder.mkdir(exist_ok=True)
        files = list({self.file(key): key for key in keys}.items())
        own = files[accelerator.process_index :: accelerator.num_processes]
        for file, key in tqdm(own, desc="encode", disable=not accelerator.is_main_process):
            if file.is_file():
                continue
            batch = default_collate([self.dataset[key]])
            with accelerator.autocast():
                latents, embeddings = encode(pipeline, batch, accelerator.device)
            tensors = {name: tensor[0].cpu().clone() for name, tensor in {"latents": latents, **embeddings}.items()}
            tensors |= {name: batch[name][0] for name in ("replaced", "failure", "captioned")}
            try:
                with replacing(file) as partial, open(partial, "wb") as written:
                    torch.save(tensors, written)
            except (OSError, RuntimeError) as error:
                raise TrainingError(f"{file} was not written: {root_os_error(error)}") from error
        accelerator.wait_for_everyone()


def cache_latents(
    dataset: CaptionedImages, pipeline: Pipeline, steps: int, accelerator: Accelerator, args: argparse.Namespace
) -> CachedLatents:
    """Encode all pairs that calibration and training will use, into a folder named by a hash of what they depend on."""
    content: Any = getattr(dataset.rows, "_fingerprint", None)  # of the datasets library
    content = content or [(*row, os.path.isfile(row[0]) and os.path.getsize(row[0])) for row in dataset.rows]
    names = (args.pretrained_model_name_or_path, args.config, args.revision, args.variant)
    model = (*names, pipeline.loras, accelerator.mixed_precision)
    digest = hashlib.sha256(repr((content, dataset.columns, model, args.resolution)).encode()).hexdigest()
    cache = CachedLatents(dataset, args.output_dir / f"latents-{digest[:16]}")
    of_training = steps * args.gradient_accumulation_steps * accelerator.num_processes
    micro_batches = dataset.micro_batches(range(max(of_training, args.calibration_steps)), args)
    cache.fill(itertools.chain.from_iterable(micro_batches), pipeline, accelerator)
    return cache


# ---------------------------------------------------------------- fake quantization
#
# The convention, written once; s are the smoothing scales, one per input channel (SmoothQuant, arXiv 2211.10438):
#   weights      int8, symmetric, one scale per output channel: q = round(w * s / scale), scale = absmax(w * s) / 127
#   activations  uint8, affine, one scale per tensor: q = clamp(round(x / s / scale) + zero_point, 0, 255)
# x / s and w * s leave the product as it is, and let the weights take over the range of an input's outlier channels.
# Outputs are not quantized. Smoothing scales and the activations' scales are learned, as logarithms.


def row_scales(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().abs().amax(dim=1).clamp(min=1e-8) / 127


def per_channel(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[out] -> [out, 1, ...], to broadcast over `weight`."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def per_input_channel(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[in] -> [1, in, 1, ...], to broadcast over `weight`."""
    return scale.view(1, -1, *[1] * (weight.dim() - 2))


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weight [out, ...] and its fp32 scales [out]; nothing clips, as the scales follow the weight."""
    weight = weight.detach()
    scale = row_scales(weight.flatten(1))
    return torch.round(weight.float() / per_channel(scale, weight)).to(torch.int8), scale


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What the following layer computes in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Fused:
    """A function of tensors that runs eagerly, or compiled to one pass over memory.

    It is compiled once for all sizes, and once for each number of dimensions.
    """

    def __init__(self, function: Callable) -> None:
        self.eager, self.compiled = function, torch.compile(function, dynamic=True)

    def __call__(self, *arguments: Any, compiled: bool) -> Any:
        return (self.compiled if compiled else self.eager)(*arguments)


@Fused
def fake_quantize_weight(rows: torch.Tensor, smoothing: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights [out, n], smoothed by [n], quantized and dequantized."""
    rows = rows.float() * smoothing
    scale = row_scales(rows)[:, None]
    return (torch.round(rows / scale) * (scale / smoothing)).to(dtype)


@Fused
def fake_quantize_activation(
    rows: torch.Tensor, smoothing: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Inputs [n, channels], smoothed by [channels], quantized and dequantized."""
    step = scale * smoothing
    q = torch.clamp(torch.round(rows.float() / step) + zero_point, 0, 255)
    return ((q - zero_point) * step).to(dtype)


@Fused
def lsq_backward(
    grad: torch.Tensor, rows: torch.Tensor, smoothing: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the inputs [n, channels] and of the logarithm of scale * smoothing, [channels].

    The latter is the gradient times the rounding error inside of the range, times the clipped value outside (LSQ).
    """
    step = scale * smoothing
    q = torch.round(rows.float() / step) + zero_point
    inside = (q >= 0) & (q <= 255)
    quantized = (q.clamp(0, 255) - zero_point) * step
    slope = torch.where(inside, quantized - rows, quantized)
    grad = grad.float()
    return torch.where(inside, grad, 0.0).to(rows.dtype), (grad * slope).sum(dim=0)


def to_rows(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """[n, channels], contiguous (no copy where `x` is channels_last); detached, as views are compiled once more."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim]).contiguous().data


def from_rows(rows: torch.Tensor, like: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return rows.view(like.movedim(channel_dim, -1).shape).movedim(-1, channel_dim)


class FakeQuantizeWeight(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes straight through (arXiv 1308.3432), as nothing clips."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, smoothing: torch.Tensor, compiled: bool = False) -> torch.Tensor:
        channels_last = weight.movedim(1, -1)  # the order of memory, for most
        rows = channels_last.flatten(1).contiguous().data
        smoothing = smoothing.repeat(channels_last.shape[1:-1].numel())
        rows = fake_quantize_weight(rows, smoothing, compute_dtype(weight), compiled=compiled)
        return rows.view(channels_last.shape).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


def straight_through(
    x: torch.Tensor, log_smoothing: torch.Tensor, log_scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """What FakeQuantizeActivation computes, for [n, channels], by autograd: the specification that a test holds equal.

    LSQ, arXiv 1902.08153, equations 2 and 3: the gradient passes straight through the rounding, but not the clipping.
    Learned as logarithms, the scales change by a ratio at each optimizer step. The paper divides the scale's gradient
    by a constant, which Adam would undo.
    """
    step = log_scale.exp() * log_smoothing.exp()
    v = x / step
    q = (v + (v.round() - v).detach() + zero_point).clamp(0, 255)
    return (q - zero_point) * step


class FakeQuantizeActivation(torch.autograd.Function):
    """`straight_through` with a backward pass of its own, which recomputes from `x` what autograd would save.

    Uncompiled, autograd saves 3 (fp32) to 6 (bf16) times the size of `x`; compiled, `straight_through` meets more kinds
    of strides and views than torch.compile's recompile limit allows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        channel_dim: int,
        log_smoothing: torch.Tensor,
        log_scale: torch.Tensor,
        zero_point: torch.Tensor,
        compiled: bool = False,
    ) -> torch.Tensor:
        ctx.channel_dim, ctx.compiled = channel_dim, compiled
        ctx.save_for_backward(x, log_smoothing, log_scale, zero_point)
        qparams = log_smoothing.detach().exp(), log_scale.detach().exp(), zero_point
        rows = fake_quantize_activation(to_rows(x, channel_dim), *qparams, compute_dtype(x), compiled=compiled)
        return from_rows(rows, x, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, log_smoothing, log_scale, zero_point = ctx.saved_tensors
        rows, grad_rows = to_rows(x, ctx.channel_dim), to_rows(grad, ctx.channel_dim)
        qparams = log_smoothing.detach().exp(), log_scale.detach().exp(), zero_point
        grad_rows, grad_steps = lsq_backward(grad_rows, rows, *qparams, compiled=ctx.compiled)
        return from_rows(grad_rows, x, ctx.channel_dim), None, grad_steps, grad_steps.sum(), None, None


# ---------------------------------------------------------------- fake-int8 layers

LEARNED_QPARAMS = ("log_scale", "log_smoothing")  # of an ActivationFakeQuantizer


class ActivationObserver(nn.Module):
    """Range and smoothing scale of each channel of one activation, shared by all layers that read it."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.consumers = 1  # layers that read this activation
        self.register_buffer("log_smoothing", torch.zeros(channels))
        # observed minimum and maximum, [channels]; every range holds 0, as padding needs it
        self.register_buffer("low", torch.zeros(channels), persistent=False)
        self.register_buffer("high", torch.zeros(channels), persistent=False)

    @property
    def smoothing_scale(self) -> torch.Tensor:
        return self.log_smoothing.detach().exp()

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Widen the ranges to hold `x`; a batch with a non-finite value is skipped."""
        rows = x.detach().movedim(self.channel_dim, -1).flatten(0, -2).float()
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        if torch.isfinite(high - low).all():
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))


class ActivationFakeQuantizer(ActivationObserver):
    """Quantizes and dequantizes one activation, for all layers that read it.

    A forward pass changes none of its parameters and buffers, so gradient checkpointing, which runs it twice, trains
    the same model.
    """

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(channels, channel_dim)
        del self.log_smoothing  # the base class's constant becomes a parameter
        self.log_smoothing, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.pending = 0  # consumers yet to ask for the cached (input, quantized input)
        self.cached: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def compute_qparams(self) -> None:
        """Set scale and zero point to hold the observed ranges."""
        low, high = (self.low / self.smoothing_scale).min(), (self.high / self.smoothing_scale).max()
        scale = (high - low).clamp(min=1e-8) / 255
        self.log_scale.copy_(scale.log())
        self.zero_point.copy_(torch.round(-low / scale).clamp(0, 255))

    def forward(self, x: torch.Tensor, compiled: bool = False) -> torch.Tensor:
        """Layers with the same input, as q, k and v, call this one by one: the first quantizes, the others get that."""
        if self.cached is None or self.cached[0] is not x:
            qparams = self.log_smoothing, self.log_scale, self.zero_point
            self.cached = x, FakeQuantizeActivation.apply(x, self.channel_dim, *qparams, compiled)
            self.pending = self.consumers
        quantized, self.pending = self.cached[1], self.pending - 1
        if self.pending == 0:
            self.cached = None
        return quantized


class FakeInt8:
    """What FakeInt8Linear and FakeInt8Conv2d share: fake quantization before the float arithmetic.

    `observer` is an ActivationFakeQuantizer or, where only the weights are int8, an ActivationObserver.
    """

    mode = "float"  # float: compute as before; observe: also widen the input's range; quantize
    compiled = False  # whether fake quantization runs compiled

    def init_from_float(
        self, layer: nn.Linear | nn.Conv2d, channels: int, channel_dim: int, quantize_input: bool
    ) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        observer = ActivationFakeQuantizer if quantize_input else ActivationObserver
        self.observer = observer(channels, channel_dim).to(layer.weight.device)

    def fake_quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight, fake-quantized where the mode says so."""
        if self.mode == "observe":
            self.observer.observe(x)
        if self.mode != "quantize":
            return x, self.weight
        if isinstance(self.observer, ActivationFakeQuantizer):
            x = self.observer(x, self.compiled)
        return x, FakeQuantizeWeight.apply(self.weight, self.observer.smoothing_scale, self.compiled)


class FakeInt8Linear(FakeInt8, nn.Linear):
    """A Linear that computes in float, with gradients, what its int8 counterpart will compute."""

    @classmethod
    def from_float(cls, layer: nn.Linear, quantize_input: bool) -> FakeInt8Linear:
        fake = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        fake.init_from_float(layer, layer.in_features, channel_dim=-1, quantize_input=quantize_input)
        return fake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(*self.fake_quantize(x), self.bias)


class FakeInt8Conv2d(FakeInt8, nn.Conv2d):
    """A Conv2d that computes in float, with gradients, what its int8 counterpart will compute."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, quantize_input: bool) -> FakeInt8Conv2d:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.groups != 1:
            how = f"padding_mode={layer.padding_mode}, padding={layer.padding}, groups={layer.groups}"
            raise UsageError(f"a convolution with {how} cannot be quantized: --keep_float it")
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        fake = cls(*shape, bias=layer.bias is not None, device="meta")
        fake.init_from_float(layer, layer.in_channels, channel_dim=1, quantize_input=quantize_input)
        return fake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(*self.fake_quantize(x), self.bias)


class QuantizedTensors(nn.Module):
    """What quant_model.pt keeps of a layer: weight int8, weight_scale [out], input_factor [in] (the smoothing scales),
    bias and, where the input is quantized too, input_scale [] and input_zero_point [].

    It computes nothing: text2images.py builds the layer that runs.
    """

    @classmethod
    def from_fake(cls, layer: FakeInt8Linear | FakeInt8Conv2d) -> QuantizedTensors:
        stored, observer = cls(), layer.observer
        smoothing = observer.smoothing_scale
        weight, weight_scale = quantize_weight(layer.weight * per_input_channel(smoothing, layer.weight))
        bias = None if layer.bias is None else layer.bias.detach()
        tensors = {"weight": weight, "weight_scale": weight_scale, "input_factor": smoothing, "bias": bias}
        if isinstance(observer, ActivationFakeQuantizer):
            scale, zero_point = observer.log_scale.detach().exp(), observer.zero_point.clone()
            tensors |= {"input_scale": scale, "input_zero_point": zero_point}
        for name, tensor in tensors.items():
            stored.register_buffer(name, tensor)
        return stored


def share_observers(unet: nn.Module) -> None:
    """Give layers that read the same activation one observer: q, k, v of self-attention, k, v of cross-attention."""
    for attention in unet.modules():
        if not hasattr(attention, "to_q"):
            continue
        readers = [attention.to_k, attention.to_v] + ([] if attention.is_cross_attention else [attention.to_q])
        shared: dict[type, ActivationObserver] = {}
        for layer in readers:
            if isinstance(layer, FakeInt8):
                layer.observer = shared.setdefault(type(layer.observer), layer.observer)
    for observer, layers in layers_by_observer(unet).items():
        observer.consumers = len(layers)


def layers_by_observer(unet: nn.Module) -> dict[ActivationObserver, list[nn.Module]]:
    layers: dict[ActivationObserver, list[nn.Module]] = {}
    for layer in unet.modules():
        if isinstance(layer, FakeInt8):
            layers.setdefault(layer.observer, []).append(layer)
    return layers


def activation_quantizers(unet: nn.Module) -> list[ActivationFakeQuantizer]:
    return [observer for observer in layers_by_observer(unet) if isinstance(observer, ActivationFakeQuantizer)]


def set_mode(unet: nn.Module, mode: str, compiled: bool = False) -> None:
    for layer in unet.modules():
        if isinstance(layer, FakeInt8):
            layer.mode, layer.compiled = mode, compiled


# ---------------------------------------------------------------- prepare and convert, by Intel Neural Compressor


def make_teacher_and_student(
    unet: UNet2DConditionModel, accelerator: Accelerator, training: bool = True
) -> tuple[UNet2DConditionModel | None, UNet2DConditionModel]:
    """A frozen copy of the UNet in the run's precision, and the UNet itself, with fp32 weights, to be trained.

    Without training there is no teacher, and the student is frozen: autocast would cache casts of trainable weights.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[accelerator.mixed_precision]
    teacher = None
    if training:
        teacher = copy.deepcopy(unet).requires_grad_(False).eval().to(accelerator.device, dtype=dtype)
        teacher.to(memory_format=torch.channels_last)
    student = unet.train().requires_grad_(training).to(accelerator.device, memory_format=torch.channels_last)
    return teacher, student


@register_config(framework_name="torch", algo_name="sd_unet_int8")
class Int8Config(TorchBaseConfig):
    """Which layer gets which dtypes: int8 and uint8, int8 and fp32 (weights only), fp32 and fp32 (kept in float).

    `set_local(pattern, KEEP_FLOAT)` keeps layers in float. A pattern is matched from the start of a layer's name
    (re.match); of several that match, the last one counts.
    """

    name = "sd_unet_int8"

    def __init__(self, w_dtype: str = "int8", act_dtype: str = "uint8", white_list: Any = DEFAULT_WHITE_LIST) -> None:
        super().__init__(white_list)
        if (w_dtype, act_dtype) not in (("int8", "uint8"), ("int8", "fp32"), ("fp32", "fp32")):
            raise ValueError(f"w_dtype={w_dtype}, act_dtype={act_dtype}: use int8, uint8 or int8, fp32 or fp32, fp32")
        self.w_dtype, self.act_dtype = w_dtype, act_dtype
        self._post_init()

    def get_params_dict(self) -> dict[str, str]:
        return {"w_dtype": self.w_dtype, "act_dtype": self.act_dtype}

    def get_model_info(self, model: nn.Module, example_inputs: Any = None) -> list[tuple[str, str]]:
        kinds = (nn.Linear, nn.Conv2d)
        return [(name, type(layer).__name__) for name, layer in model.named_modules() if isinstance(layer, kinds)]

    @classmethod
    def register_supported_configs(cls) -> None:
        """Nothing to add: tuning over variants is not offered."""

    @classmethod
    def get_config_set_for_tuning(cls) -> list[Int8Config]:
        return [cls()]


KEEP_FLOAT = Int8Config(w_dtype="fp32", act_dtype="fp32")
WEIGHT_ONLY = Int8Config(w_dtype="int8", act_dtype="fp32")


def quantization_config(args: argparse.Namespace, unet: UNet2DConditionModel) -> Int8Config:
    """The configuration that the flags ask for.

    Raises:
        UsageError: a pattern of the user's matches no layer, or nothing is left to quantize.
    """
    keep_float, weight_only = args.keep_float, args.weight_only
    if keep_float is not DEFAULT_KEEP_FLOAT and weight_only is DEFAULT_WEIGHT_ONLY:
        weight_only = []
    elif weight_only is not DEFAULT_WEIGHT_ONLY and keep_float is DEFAULT_KEEP_FLOAT:
        keep_float = []
    default = keep_float is DEFAULT_KEEP_FLOAT and args.quantization_config is None
    if args.quantization_config is not None:
        try:
            config = Int8Config.from_dict(json.loads(args.quantization_config.read_text(encoding="utf-8")))
        except Exception as error:  # neural-compressor fails in many ways
            raise UsageError(f"--quantization_config {args.quantization_config}: {first_line(error)}") from error
    else:
        config = Int8Config()
        for pattern in weight_only:
            config.set_local(pattern, WEIGHT_ONLY)
        for pattern in keep_float:
            config.set_local(pattern, KEEP_FLOAT)
    layers = config.get_model_info(unet)
    for pattern in map(str, config.local_config):
        if re.search(r"\)\s*[*+{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 4:
            raise UsageError(f"layer pattern {pattern!r} could take for ever to match: no repeated groups, 4 of *+?{{")
        try:
            matches = sum(re.match(pattern, name) is not None for name, _ in layers)
        except re.error as error:
            raise UsageError(f"layer pattern {pattern!r} is no regular expression: {error}") from error
        if not matches and not default:  # a UNet may lack a kind of layer, but a typing error should not pass
            raise UsageError(f"layer pattern {pattern!r} matches none of the UNet's layers, such as {layers[-1][0]}")
    mapping = config.to_config_mapping(model_info=layers)
    kinds = [(layer.w_dtype, layer.act_dtype) for layer in mapping.values()]
    int8, weights = kinds.count(("int8", "uint8")), kinds.count(("int8", "fp32"))
    if not int8 + weights:
        raise UsageError("every layer is kept in float: there is nothing to quantize")
    rest = f"{weights} with int8 weights only, {len(layers) - int8 - weights} kept in float"
    logger.info(f"{int8} of {len(layers)} Linear and Conv2d layers in int8, {rest}")
    return config


FAKE_INT8 = {"Linear": FakeInt8Linear, "Conv2d": FakeInt8Conv2d}


@register_algo("sd_unet_int8")
def int8_algorithm(unet: nn.Module, configs_mapping: dict, mode: Mode, **kwargs: Any) -> nn.Module:
    """What neural-compressor's prepare() and convert() call, by the name of the algorithm.

    PREPARE replaces float layers by fake-int8 ones; CONVERT replaces these by int8 tensors, and casts layers that are
    kept in float to fp16.
    """
    for (name, kind), config in configs_mapping.items():
        layer = unet.get_submodule(name)
        if mode == Mode.PREPARE:
            if config.w_dtype == "int8":
                fake = FAKE_INT8[kind].from_float(layer, quantize_input=config.act_dtype == "uint8")
                unet.set_submodule(name, fake)
        elif config.w_dtype == "int8":
            unet.set_submodule(name, QuantizedTensors.from_fake(layer))
        elif layer.weight.abs().max() < torch.finfo(torch.float16).max:  # bf16 is as small and 8 times coarser
            layer.weight = nn.Parameter(layer.weight.detach().half(), requires_grad=False)
    if mode == Mode.PREPARE:
        share_observers(unet)
    return unet


def compile_fake_quantization(student: nn.Module, accelerator: Accelerator) -> bool:
    """Compile fake quantization, for large UNets on CPUs: up to half a minute once, as the result is cached on disk.

    A layer of medium size compiles it: kernels compiled for small inputs are single-threaded, and serve all sizes.
    Returns whether it is compiled.
    """
    size = sum(parameter.numel() for parameter in student.parameters())
    if size < COMPILE_MIN_PARAMS or accelerator.device.type != "cpu":
        return False
    began = time.monotonic()
    try:
        for quantize_input in (True, False):
            layer = FakeInt8Linear.from_float(nn.Linear(320, 640), quantize_input)
            set_mode(layer, "quantize", compiled=True)
            with accelerator.autocast():
                x = torch.zeros(4096, 320)
                output = layer(x.to(compute_dtype(x)).requires_grad_())
            output.sum().backward()
        logger.info(f"compiled the fake quantization in {time.monotonic() - began:.0f} s")
        return True
    except Exception as error:  # no C++ compiler, no room for its cache, ...
        logger.warning(f"the fake quantization runs uncompiled, which is slower: {first_line(error)}")
        return False


# ---------------------------------------------------------------- watching the run


class RunMonitor:
    """Counts bad images and non-finite steps, ends the run at too many, and averages losses over micro-batches."""

    def __init__(self, remedy: str = CaptionedImages.remedy) -> None:
        self.samples = self.replaced = self.captionless = self.bad_steps = self.bad_in_a_row = 0
        self.remedy, self.first_failure = remedy, ""
        self.losses: list[dict[str, float]] = []

    def update(self, losses: dict[str, torch.Tensor], batch: dict[str, Any]) -> None:
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        replaced = batch["replaced"]
        self.first_failure = self.first_failure or next(filter(None, batch["failure"]), "")
        self.captionless += int((~batch["captioned"]).sum())
        self.samples += len(replaced)
        self.replaced += int((replaced > 0).sum())
        # four standard deviations above MAX_BAD_SHARE: a small sample exceeds the share itself by chance
        deviation = math.sqrt(MAX_BAD_SHARE * (1 - MAX_BAD_SHARE) * self.samples)
        too_many = self.samples >= 40 and self.replaced > MAX_BAD_SHARE * self.samples + 4 * deviation
        if too_many or (replaced >= MAX_TRIES).any():
            message = f"{self.replaced} of {self.samples} images could not be read, first {self.first_failure}"
            raise UsageError(f"{message}; {self.remedy}")

    def is_finite(self, gradient_norm: torch.Tensor) -> bool:
        """Whether the step may be taken; several non-finite ones in a row end the run."""
        finite = bool(torch.isfinite(gradient_norm))
        self.bad_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise TrainingError(f"{MAX_BAD_STEPS} non-finite losses in a row: lower --learning_rate, look at the data")
        return finite

    def mean_losses(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the micro-batches since the last call, of all processes."""
        losses, self.losses = self.losses, []
        means = [sum(loss[name] for loss in losses) / len(losses) for name in losses[0]]
        means = accelerator.reduce(torch.tensor(means, device=accelerator.device), reduction="mean")
        return dict(zip(losses[0], means.tolist()))

    def report(self, accelerator: Accelerator) -> None:
        """Warn of what went wrong, in all processes."""
        counts = torch.tensor([self.replaced, self.captionless], device=accelerator.device)
        replaced, captionless = accelerator.reduce(counts, reduction="sum").tolist()
        if replaced:
            logger.warning(f"{replaced} unreadable images replaced, first {self.first_failure}")
        if captionless:
            logger.warning(f"{captionless} images had no caption")
        if self.bad_steps:
            logger.warning(f"{self.bad_steps} non-finite steps left out")


# ---------------------------------------------------------------- calibration


@torch.no_grad()
def calibrate(
    student: UNet2DConditionModel,
    pipeline: Pipeline,
    dataset: CaptionedImages,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Set activation ranges to the minimum and maximum over noised images, and smoothing scales by them.

    Captions are emptied as in training. Timesteps are stratified but uniform, as ranges must hold at every timestep.
    Many noised images beat few sampled trajectories: ranges from 20 trajectories were too narrow for other captions.
    """
    began = time.monotonic()
    numbers = range(accelerator.process_index, args.calibration_steps, accelerator.num_processes)
    keys = dataset.micro_batches(numbers, args)
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=args.dataloader_num_workers)
    monitor, finite = RunMonitor(dataset.remedy), {"VAE": 0, "text encoder": 0, "UNet": 0}  # batches
    set_mode(student, "observe")
    # not tqdm(loader): it asks for an iterator twice, and the keys of a stream come once
    progress = tqdm(total=len(numbers), desc="calibrate", disable=not accelerator.is_main_process)
    for number, batch in zip(numbers, loader):
        monitor.update({}, batch)
        generator = generator_for(args.seed, "calibration", number)
        noised = add_noise(pipeline, batch, (0, 1), 1, generator, accelerator)
        with accelerator.autocast():
            output = noised.predict(student)
        embeddings = noised.conditioning["encoder_hidden_states"]
        for part, tensor in (("VAE", noised.latents), ("text encoder", embeddings), ("UNet", output)):
            finite[part] += bool(torch.isfinite(tensor).all())
        progress.update()
    progress.close()
    for part, count in finite.items():
        if not count and monitor.samples:  # single batches may be non-finite, and are skipped by the observers
            remedy = "a VAE of fp16 may overflow: take one in fp32" if part == "VAE" else "copy its weights again"
            raise UsageError(f"the checkpoint's {part} gives values that are not finite: {remedy}")
    if accelerator.num_processes > 1:
        for observer in layers_by_observer(student):
            torch.distributed.all_reduce(observer.low, op=torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(observer.high, op=torch.distributed.ReduceOp.MAX)
    finish_calibration(student)
    quantizers = len(activation_quantizers(student))
    logger.info(f"calibrated {quantizers} activation ranges in {time.monotonic() - began:.0f} s")


def finish_calibration(student: nn.Module) -> None:
    """Compute smoothing scales, scales and zero points from the observed ranges."""
    init_smoothing_scales(student)
    for quantizer in activation_quantizers(student):
        quantizer.compute_qparams()


@torch.no_grad()
def init_smoothing_scales(unet: nn.Module) -> None:
    """s = max|x|^a / max|w|^(1-a) for each channel (SmoothQuant, arXiv 2211.10438, equation 4), with geometric mean 1.

    SmoothQuant folds 1/s into the preceding norm. Here the quantizer divides by s, which is free, as it divides by its
    scale anyway, and works after any operation. Weights that alone are int8 are divided by s when dequantized.
    """
    for observer, layers in layers_by_observer(unet).items():
        inputs = torch.maximum(-observer.low, observer.high)
        weights = torch.stack([layer.weight.abs().transpose(0, 1).flatten(1).amax(dim=1) for layer in layers])
        alpha = SMOOTHQUANT_ALPHA if isinstance(observer, ActivationFakeQuantizer) else WEIGHT_ONLY_ALPHA
        log_smoothing = alpha * inputs.log() - (1 - alpha) * weights.amax(dim=0).log()
        used = torch.isfinite(log_smoothing)  # not those of a channel whose inputs or weights are all 0
        observer.log_smoothing.copy_(torch.where(used, log_smoothing - log_smoothing[used].mean(), 0.0))


# ---------------------------------------------------------------- losses


@contextlib.contextmanager
def block_outputs(unet: UNet2DConditionModel, enabled: bool) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """The outputs of a UNet's down, mid and up blocks in its latest forward pass, kept by hooks."""
    outputs: dict[nn.Module, torch.Tensor] = {}

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:
        outputs[block] = output[0] if isinstance(output, tuple) else output

    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks] if enabled else []
    hooks = [block.register_forward_hook(keep) for block in blocks if block is not None]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def training_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet is to predict, by the checkpoint's prediction type; [B, 4, H/8, W/8]."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents}[kind]


def log_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of log(mean squared error), for tensors [B, ...].

    The log weights all timesteps equally: the squared error at the last ones of a generation is about 40 times that at
    the first, and would dominate a plain mean.
    """
    return (ours - theirs).float().square().flatten(1).mean(dim=1).clamp(min=1e-20).log().mean()


def task_loss(
    output: torch.Tensor, target: torch.Tensor, scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None
) -> torch.Tensor:
    """Denoising error, weighted by min-SNR (arXiv 2303.09556, section 3.4) where a gamma is given."""
    error = (output - target).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        error = error * snr.clamp(max=gamma) / divisor[scheduler.config.prediction_type].clamp(min=1e-8)
    return error.mean()


def compute_losses(
    student_output: torch.Tensor,
    teacher_output: torch.Tensor,
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    batch: NoisedBatch,
    scheduler: DDPMScheduler,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """Each loss by its name, and "loss", their weighted sum; `blocks` are block outputs of (student, teacher)."""
    target = training_target(scheduler, batch.latents, batch.noise, batch.timesteps)
    losses = {"kd_loss": log_distance(student_output, teacher_output)}
    losses["task_loss"] = task_loss(student_output, target, scheduler, batch.timesteps, args.snr_gamma)
    distances = [log_distance(ours, theirs) for ours, theirs in blocks]
    if distances:
        losses["feature_kd_loss"] = torch.stack(distances).mean()
    losses["loss"] = sum(getattr(args, name.replace("loss", "weight")) * loss for name, loss in losses.items())
    return losses


# ---------------------------------------------------------------- optimizer, learning rates and weight average


@dataclass
class TrainState:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    student: UNet2DConditionModel
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    average: AveragedModel | None = None  # of the student's weights
    average_begin: int = 0  # step after which it averages
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # of the latest step
    curve: TrainingCurve | None = None

    def parts(self) -> dict[str, Any]:
        names = ("student", "optimizer", "lr_scheduler", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def save(self, path: Path) -> None:
        with open(path, "wb") as file:  # torch's own writer would hide why it failed
            parts = {name: part.state_dict() for name, part in self.parts().items()}
            torch.save({"step": self.step, "losses": self.losses, **parts}, file)

    def load(self, path: Path) -> None:
        try:
            if (record := zipfile.ZipFile(path).testzip()) is not None:  # torch.load verifies no checksums
                raise ValueError(f"checksum of {record}")
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.step, self.losses = state["step"], state["losses"]
        except Exception as error:  # a damaged file fails in many ways
            problem = f"{path} is damaged ({first_line(error)}): delete {path.parent} and resume again"
            raise UsageError(problem) from error

    def update_average(self) -> None:
        """The plain mean of the weights after each step since `average_begin` (SWA, arXiv 1803.05407); before, a copy.

        At a constant learning rate the weights circle the optimum, and averaging cancels that.
        """
        if self.average is not None:
            if self.step <= self.average_begin:
                self.average.n_averaged.zero_()
            self.average.update_parameters(self.student)

    @property
    def exported(self) -> UNet2DConditionModel:
        """The UNet that is validated and saved."""
        return self.student if self.average is None else self.average.module


def peak_learning_rate(args: argparse.Namespace, accelerator: Accelerator) -> float:
    """Of the weights, relative to their median magnitude."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return args.learning_rate * (batch if args.scale_lr else 1)


def median_magnitude(weight: torch.Tensor) -> float:
    """Insensitive to outlier channels; at least 0.001, or zeros could never learn."""
    return max(1e-3, weight.detach().abs().median().item())


def create_train_state(
    student: UNet2DConditionModel, steps: int, accelerator: Accelerator, args: argparse.Namespace
) -> TrainState:
    """AdamW with these parameter groups, their schedules, and the average of the weights.

    - each weight tensor, at lr * its median magnitude: Adam's step is about lr whatever the gradient, and for a tensor
      of small weights that would be several int8 levels
    - biases and norms, at a higher lr: they remove the systematic error, which accumulates over denoising steps,
      whereas the random part of the error averages out
    - the logarithms of the activations' scales, and those of the smoothing scales
    """
    peak = peak_learning_rate(args, accelerator)
    scales = [quantizer.log_scale for quantizer in activation_quantizers(student)]
    smoothing = [quantizer.log_smoothing for quantizer in activation_quantizers(student)]
    others = [parameter for name, parameter in student.named_parameters() if not name.endswith(LEARNED_QPARAMS)]
    weights = [parameter for parameter in others if parameter.dim() > 1]
    biases = [parameter for parameter in others if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": [weight], "lr": peak * median_magnitude(weight)} for weight in weights]
    groups.append({"params": biases, "lr": args.bias_learning_rate, "weight_decay": 0.0})
    qparam_lr = args.quantizer_learning_rate
    if qparam_lr > 0:
        groups.append({"params": scales, "lr": qparam_lr, "weight_decay": 0.0})
        groups.append({"params": smoothing, "lr": SMOOTHING_LR_RATIO * qparam_lr, "weight_decay": 0.0})
    else:
        for parameter in scales + smoothing:
            parameter.requires_grad_(False)
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer = torch.optim.AdamW(groups, weight_decay=args.adam_weight_decay, fused=True, **adam)
    lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": max(1, steps)}
    schedule = get_scheduler(args.lr_scheduler, optimizer, **lengths).lr_lambdas[0]  # step -> share of the peak
    schedules = [schedule] * len(groups)
    if qparam_lr > 0:  # smoothing scales: down to 0 in the first part of the run
        end = max(1, SMOOTHING_LR_FRACTION * steps)
        schedules[-1] = lambda step: schedule(step) * max(0.0, 1 - step / end)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    average = AveragedModel(student, multi_avg_fn=get_swa_multi_avg_fn()) if args.use_ema and steps > 0 else None
    return TrainState(student, optimizer, lr_scheduler, average, average_begin=int(SMOOTHING_LR_FRACTION * steps))


# ---------------------------------------------------------------- checkpoints

CHECKPOINT_VERSION = "3"  # add 1 when a checkpoint's contents change: resuming refuses other versions
# Flags that a resumed run may change. With another value of any other flag it would not be the same run.
MAY_CHANGE = (
    "max_train_steps num_train_epochs calibration_steps gradient_accumulation_steps gradient_checkpointing use_cpu "
    "cache_dir dataloader_num_workers output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint "
    "validation_prompts validation_steps report_to logging_dir debug push_to_hub hub_token hub_model_id"
).split()


def resume_settings(args: argparse.Namespace) -> dict[str, str]:
    processes = PartialState().num_processes
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings["checkpoint_version"] = CHECKPOINT_VERSION
    settings["gradient_accumulation_steps x processes"] = str(args.gradient_accumulation_steps * processes)
    if args.streaming:  # each worker of each process reads its own part of the stream
        settings["dataloader_num_workers x processes"] = str(max(1, args.dataloader_num_workers) * processes)
    return settings


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first; an unfinished one has another name."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    complete = [(int(match[1]), path) for match, path in found if match and (path / "state.pt").is_file()]
    return [path for _, path in sorted(complete)]


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        UsageError: the path is no checkpoint, or the run that wrote it had other settings.
    """
    if args.resume_from_checkpoint is None:
        return None
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(args.output_dir)
        seen = gather_object([found[-1].name if found else None])
        if len(set(seen)) > 1:
            raise UsageError(f"--output_dir {args.output_dir} differs between processes: put it on a shared disk")
        if not found:
            logger.info(f"no checkpoint in {args.output_dir}: starting from the beginning")
            return None
        folder = found[-1]
    elif not (folder / "state.pt").is_file():
        raise UsageError(f"--resume_from_checkpoint {folder} has no state.pt; name a checkpoint-N folder, or latest")
    try:
        settings = dict(json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}/settings.json is damaged ({first_line(error)}): delete {folder}") from error
    if settings.get("checkpoint_version") != CHECKPOINT_VERSION:
        remedy = "resume with that one, or start in another --output_dir"
        raise UsageError(f"{folder} is of another version of this script: {remedy}")
    changed = [
        f"{key} (then {settings.get(key, 'None')}, now {value})"
        for key, value in resume_settings(args).items()
        if settings.get(key, "None") != value
    ]
    if changed:
        raise UsageError(f"{folder} was written with other settings: {', '.join(changed)}; use the same, or start anew")
    logger.info(f"resuming from {folder}")
    return folder


def save_checkpoint(state: TrainState, args: argparse.Namespace) -> None:
    """Write OUTPUT_DIR/checkpoint-STEP under a temporary name and rename it; then delete the oldest ones."""
    folder = args.output_dir / f"checkpoint-{state.step}"
    partial = folder.with_name(folder.name + ".partial")
    for unfinished in args.output_dir.glob("checkpoint-*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        partial.mkdir()
        state.save(partial / "state.pt")
        state.curve.save(partial / "curve.json")
        (partial / "settings.json").write_text(json.dumps(resume_settings(args), indent=1), encoding="utf-8")
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"{folder} was not written ({root_os_error(error)}); earlier ones are kept") from error
    kept = checkpoints(args.output_dir)
    kept = kept[: kept.index(folder) + 1]  # those with more steps were left in this folder by an earlier run
    for old in kept[: -args.checkpoints_total_limit]:
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- validation images


def validation_path(args: argparse.Namespace, step: int, prompt: int) -> Path:
    return args.output_dir / "validation" / f"step-{step:06d}-prompt-{prompt}.png"


@torch.no_grad()
def validate(
    state: TrainState,
    teacher: UNet2DConditionModel,
    pipeline: Pipeline,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Generate every validation prompt with teacher and student, from the same noise, side by side in one image."""
    (args.output_dir / "validation").mkdir(exist_ok=True)
    images = []
    for unet in (teacher, state.exported.eval()):
        generate = pipeline.with_unet(unet)
        generate.set_progress_bar_config(disable=True)
        prompts = args.validation_prompts
        generators = [generator_for(args.seed, "validation", index) for index in range(len(prompts))]
        size = {"height": args.resolution, "width": args.resolution, "num_inference_steps": VALIDATION_STEPS}
        with accelerator.autocast():
            images.append(generate(prompts, generator=generators, **size).images)
    state.student.train()
    for index, pair in enumerate(zip(*images)):
        side_by_side = make_image_grid(list(pair), rows=1, cols=2)
        with replacing(validation_path(args, state.step, index)) as partial:
            side_by_side.save(partial, format="PNG")
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                named = {f"teacher | student {index}": np.asarray(side_by_side)[None]}
                tracker.log_images(named, step=state.step, **layout)


# ---------------------------------------------------------------- training.png

CURVE_POINTS = 1000  # a long run's curve has from so many to twice as many points
SHOWN_PROMPTS, SHOWN_STEPS = 3, 3  # validation images in training.png
RATES = ("biases", "scales", "smoothing scales")  # the optimizer's last parameter groups


@dataclass
class TrainingCurve:
    """What training.png shows. A checkpoint holds it as curve.json, so that a resumed run continues the curve.

    A point is the mean of `stride` steps. The stride doubles whenever there are too many points, so that file and
    drawing take no longer for a long run than for a short one.
    """

    scales: list[nn.Parameter] = field(default_factory=list)  # log_scale of each activation
    start: list[float] = field(default_factory=list)  # their values after calibration
    stride: int = 1
    points: list[dict[str, float]] = field(default_factory=list)  # "step" is a point's last one, "steps" their number
    validated: list[int] = field(default_factory=list)  # steps
    saved: list[int] = field(default_factory=list)  # steps

    KEPT = ("start", "stride", "points", "validated", "saved")

    def values(self, name: str) -> list[float]:
        return [point[name] for point in self.points]

    @classmethod
    def of(cls, student: nn.Module, checkpoint: Path | None) -> TrainingCurve:
        """The checkpoint's curve, or a new one."""
        curve = cls([quantizer.log_scale for quantizer in activation_quantizers(student)])
        curve.start = [scale.item() for scale in curve.scales]
        if checkpoint is not None:
            try:
                state = json.loads((checkpoint / "curve.json").read_text(encoding="utf-8"))
                vars(curve).update({name: state[name] for name in cls.KEPT})
            except (OSError, ValueError, TypeError, KeyError) as error:  # costs the curve, not the run
                logger.warning(f"{checkpoint}/curve.json: {first_line(error)}; training.png begins anew")
        return curve

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({name: getattr(self, name) for name in self.KEPT}), encoding="utf-8")

    @torch.no_grad()
    def update(self, step: int, losses: dict[str, float], rates: dict[str, float]) -> None:
        values = {f"loss {name}": value for name, value in losses.items()}
        values |= {f"rate {name}": value for name, value in rates.items()}
        if self.scales:
            change = torch.stack(self.scales).cpu().double() - torch.tensor(self.start, dtype=torch.float64)
            change = change.exp().sub(1).mul(100)  # percent
            statistics = {"least": change.min(), "greatest": change.max(), "median": change.median()}
            values |= {f"scales {name}": value.item() for name, value in statistics.items()}
        point = {"step": step, "steps": 1, **values}
        if self.points and self.points[-1]["steps"] < self.stride:
            point = self.mean(self.points.pop(), point)
        self.points.append(point)
        if len(self.points) == 2 * CURVE_POINTS:
            self.points = [self.mean(*pair) for pair in zip(self.points[::2], self.points[1::2])]
            self.stride *= 2

    @staticmethod
    def mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
        steps = first["steps"] + second["steps"]
        shares = first["steps"] / steps, second["steps"] / steps
        means = {name: shares[0] * first[name] + shares[1] * value for name, value in second.items()}
        return {**means, "step": second["step"], "steps": steps}


def draw_training(curve: TrainingCurve, args: argparse.Namespace) -> None:
    """Write OUTPUT_DIR/training.png; a failure costs a warning, not the run."""
    path = args.output_dir / "training.png"
    try:
        with replacing(path) as partial:
            training_figure(curve, args).savefig(partial, format="png", dpi=100)
    except ImportError:
        logger.warning(f"{path} is not drawn, as matplotlib is not installed: pip install matplotlib")
    except Exception as error:
        logger.warning(f"{path} was not written: {getattr(error, 'strerror', None) or root_os_error(error)}")


def training_figure(curve: TrainingCurve, args: argparse.Namespace) -> Any:
    """Losses, learning rates and change of the scales; checkpoints and validations marked; validation images below."""
    from matplotlib.figure import Figure  # only here: it takes half a second, and only one process draws

    losses = [name for name in curve.points[-1] if name.startswith("loss ")]
    if all(point.get("loss kd_loss") == point["loss loss"] for point in curve.points):
        losses.remove("loss loss")  # kd_loss is the only one with a weight
    images = validation_images(curve, args)
    rows = math.ceil((len(losses) + 2) / 2)
    heights = [2.7] * rows + [2.1] * len(images)  # inches
    figure = Figure(figsize=(11, sum(heights)))
    # placed by hand: matplotlib's own layouts draw everything twice, which would be half of the time
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights, wspace=0.6, hspace=0.55)
    figure.subplots_adjust(0.06, (0.15 if images else 0.55) / sum(heights), 0.98, 1 - 0.35 / sum(heights))
    cells = [grid[row, left : left + 3] for row in range(rows) for left in (0, 3)]
    panels = [figure.add_subplot(cell) for cell in cells[: len(losses) + 2]]
    for axes, name in zip(panels, losses):
        draw_loss(axes, name.removeprefix("loss "), curve.values("step"), curve.values(name))
    draw_rates(panels[-2], curve)
    draw_scales(panels[-1], curve)
    for axes in panels:
        draw_marks(axes, curve)
    for row, shown in enumerate(images, rows):
        width = 6 // len(shown)
        for column, (title, image) in enumerate(shown):
            axes = figure.add_subplot(grid[row, column * width : (column + 1) * width])
            axes.imshow(image)
            axes.set_title(title, fontsize=8, parse_math=False)
            axes.set_axis_off()
    return figure


def draw_loss(axes: Any, name: str, steps: list[float], values: list[float]) -> None:
    """Every point faintly, and their moving average over a twentieth of the run."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.nan_to_num([0.0, *values]))
    known = np.cumsum([0, *np.isfinite(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    means = (sums[ends] - sums[begins]) / np.maximum(1, known[ends] - known[begins])
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, marker="." if len(steps) == 1 else None)
    axes.plot(steps, means, color="tab:blue")
    logarithm = ": logarithm of the mean squared error to the teacher" if name in ("kd_loss", "feature_kd_loss") else ""
    axes.set_title(f"{name}{logarithm}", fontsize=10)


def draw_rates(axes: Any, curve: TrainingCurve) -> None:
    for name in [name for name in curve.points[-1] if name.startswith("rate ")]:
        values = [value or math.nan for value in curve.values(name)]  # 0 has no logarithm
        axes.plot(curve.values("step"), values, label=name.removeprefix("rate "))
    axes.set_yscale("log")
    axes.set_title("learning rates", fontsize=10)
    axes.legend(fontsize=8)


def draw_scales(axes: Any, curve: TrainingCurve) -> None:
    axes.set_title("activation scales, change since calibration, %", fontsize=10)
    if "scales median" in curve.points[-1]:
        steps, least, greatest = (curve.values(name) for name in ("step", "scales least", "scales greatest"))
        axes.fill_between(steps, least, greatest, alpha=0.25, label="least to greatest")
        axes.plot(steps, curve.values("scales median"), label="median")
        axes.legend(fontsize=8)


def draw_marks(axes: Any, curve: TrainingCurve) -> None:
    """Where checkpoints and validation images were."""
    for step in curve.validated:
        axes.axvline(step, color="tab:green", alpha=0.4, linewidth=1, linestyle=":")
    floor = np.zeros(len(curve.saved))
    axes.plot(curve.saved, floor, "^", color="0.3", markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlim(0, curve.points[-1]["step"] + 1)
    axes.set_xlabel("step (triangles: checkpoints; dotted: validation)", fontsize=8)
    axes.grid(alpha=0.2)


def validation_images(curve: TrainingCurve, args: argparse.Namespace) -> list[list[tuple[str, Image.Image]]]:
    """For each of the first prompts, the first, the middle and the latest image, with titles."""
    places = np.unique(np.linspace(0, len(curve.validated) - 1, SHOWN_STEPS).round().astype(int))
    steps = [curve.validated[place] for place in places] if curve.validated else []
    rows = []
    for index, prompt in enumerate((args.validation_prompts or [])[:SHOWN_PROMPTS]):
        row = []
        for step in steps:
            try:
                with Image.open(validation_path(args, step, index)) as image:
                    shown = image.convert("RGB")
            except OSError:  # deleted since, or in another folder than the checkpoint's
                continue
            shown.thumbnail((512, 512))
            caption = prompt.encode("latin-1", "replace").decode("latin-1")  # characters that the font has
            row.append((f"step {step}: teacher | student\n{caption[:60] if not row else ''}", shown))
        rows += [row] if row else []
    return rows


# ---------------------------------------------------------------- the training loop


def distill(
    state: TrainState,
    teacher: UNet2DConditionModel,
    pipeline: Pipeline,
    dataset: CaptionedImages,
    steps: int,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Train up to optimizer step `steps`."""
    per_step = args.gradient_accumulation_steps * accelerator.num_processes  # micro-batches
    numbers = range(state.step * per_step + accelerator.process_index, steps * per_step, accelerator.num_processes)
    keys = dataset.micro_batches(numbers, args)
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=args.dataloader_num_workers)
    model, optimizer = accelerator.prepare(state.student, state.optimizer)
    features = args.feature_kd_weight > 0
    monitor, shutdown = RunMonitor(dataset.remedy), ShutdownSignal(accelerator)
    progress = tqdm(total=steps, initial=state.step, desc="distill", disable=not accelerator.is_main_process)
    with block_outputs(teacher, features) as teacher_blocks, block_outputs(state.student, features) as student_blocks:
        for number, batch in zip(numbers, loader):
            with accelerator.accumulate(model):
                # images -> latents, noise and timesteps -> noisy latents
                generator = generator_for(args.seed, "noise", number)
                stratum = (number % per_step, per_step)
                noised = add_noise(pipeline, batch, stratum, TIMESTEP_EXPONENT, generator, accelerator)
                # what teacher and student predict from them, and how far apart that is
                with torch.no_grad(), accelerator.autocast():
                    teacher_output = noised.predict(teacher)
                with accelerator.autocast():
                    student_output = noised.predict(model)
                blocks, scheduler = zip(student_blocks.values(), teacher_blocks.values()), pipeline.noise_scheduler
                losses = compute_losses(student_output, teacher_output, blocks, noised, scheduler, args)
                student_blocks.clear()
                teacher_blocks.clear()
                accelerator.backward(losses["loss"])
                monitor.update(losses, batch)
                if not accelerator.sync_gradients:
                    continue
                # the optimizer step, unless the gradient is not finite
                gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if monitor.is_finite(gradient_norm) or accelerator.scaler is not None:  # a scaler skips by itself
                    optimizer.step()
                    state.update_average()
                optimizer.zero_grad()
                state.lr_scheduler.step()
                state.step += 1
                state.losses = monitor.mean_losses(accelerator)
            progress.update()
            progress.set_postfix({name: f"{value:.2e}" for name, value in state.losses.items()})
            after_step(state, teacher, pipeline, steps, shutdown, accelerator, args)
    progress.close()
    monitor.report(accelerator)


def after_step(
    state: TrainState,
    teacher: UNet2DConditionModel,
    pipeline: Pipeline,
    steps: int,
    shutdown: ShutdownSignal,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Log the step; validate and save a checkpoint where one is due; exit where a signal asked for it."""
    stop_signal = shutdown.poll()
    last = state.step == steps
    lr = peak_learning_rate(args, accelerator) * state.lr_scheduler.lr_lambdas[0](state.step)
    accelerator.log({**state.losses, "lr": lr}, step=state.step)
    if accelerator.is_main_process:
        others = state.lr_scheduler.get_last_lr()[-len(RATES) if args.quantizer_learning_rate > 0 else -1 :]
        rates = {"weights, relative to their size": lr, **dict(zip(RATES, others))}
        state.curve.update(state.step, state.losses, rates)
        if args.validation_prompts and (last or state.step % args.validation_steps == 0):
            validate(state, teacher, pipeline, accelerator, args)
            state.curve.validated.append(state.step)
        checkpoint_due = stop_signal or state.step % args.checkpointing_steps == 0
        if checkpoint_due:
            state.curve.saved.append(state.step)
            save_checkpoint(state, args)
        if checkpoint_due or last:
            draw_training(state.curve, args)
    accelerator.wait_for_everyone()
    if stop_signal and not last:
        name = signal.Signals(stop_signal).name
        logger.info(f"stopped by {name} at step {state.step}: --resume_from_checkpoint latest continues")
        exit_process(128 + stop_signal, accelerator)


class ShutdownSignal:
    """Ctrl-C or SIGTERM: the loop ends after the step, with a checkpoint; a second one ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.signal = accelerator, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def poll(self) -> int:
        """The signal that any process got, or 0: all of them must leave the loop at the same step."""
        if LAUNCHER not in (None, os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        if self.accelerator.num_processes > 1:
            received = torch.tensor(self.signal, device=self.accelerator.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            return int(received)  # self.signal stays: one may have come in meanwhile
        return self.signal


def exit_process(code: int, accelerator: Accelerator) -> NoReturn:
    """End this process at once where there are several: destroying their group hangs at times (pytorch#75097)."""
    for tracker in accelerator.trackers:
        tracker.finish()
    if accelerator.num_processes == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------- saving quant_model.pt


def checksum(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_int8(state: TrainState, config: Int8Config, pipeline: Pipeline, args: argparse.Namespace) -> Path:
    """Convert the student and write quant_model.pt, a dict that loads without running code (docs/file-format.md)."""
    student = state.exported.to("cpu", memory_format=torch.contiguous_format)
    weights = [weight for name, weight in student.named_parameters() if not name.endswith(LEARNED_QPARAMS)]
    fp32_bytes = sum(4 * weight.numel() for weight in weights)
    state_dict = {name: tensor.contiguous() for name, tensor in convert(student).state_dict().items()}
    settings = "calibration_steps kd_weight task_weight feature_kd_weight learning_rate use_ema seed".split()
    modules = (torch, diffusers, transformers, accelerate)
    payload = {
        "format": "sd-unet-int8",
        "format_version": 1,
        "pipeline": "StableDiffusionXLPipeline" if is_xl(pipeline.index) else "StableDiffusionPipeline",
        "loras": pipeline.loras,
        "unet_config": {key: value for key, value in student.config.items() if not key.startswith("_")},
        "base_model": args.pretrained_model_name_or_path,
        "quantization": config.to_dict(),
        "versions": {module.__name__: module.__version__.split("+")[0] for module in modules},
        "training": {"steps": state.step, "losses": state.losses, **{key: getattr(args, key) for key in settings}},
        "checksum": checksum(state_dict),
        "state_dict": state_dict,
    }
    path = args.output_dir / "quant_model.pt"
    try:
        with replacing(path) as partial, open(partial, "wb") as file:  # torch's own writer would hide why it failed
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"{path} was not written ({root_os_error(error)}); the last checkpoint is kept") from error
    size = path.stat().st_size
    logger.info(f"wrote {path}: {size / 1e6:.1f} MB, {size / fp32_bytes:.3f} of the fp32 UNet")
    return path


def next_command(quant_model: Path, pipeline: Pipeline, args: argparse.Namespace) -> str:
    """The command that generates images with quant_model.pt, with the flags that this checkpoint needs."""
    script, checkpoint = Path(__file__).with_name("text2images.py"), Path(args.pretrained_model_name_or_path)
    passed_on = [(name, getattr(args, name)) for name in ("config", "variant", "revision", "cache_dir")]
    flags = [f"--{name}={value}" for name, value in passed_on if value]
    if pipeline.unet.config.sample_size is None:
        flags += [f"--height={args.resolution}", f"--width={args.resolution}"]
    if checkpoint.is_dir():
        parts = [part for part in ("safety_checker", "feature_extractor") if (pipeline.index.get(part) or [None])[0]]
        flags += ["--disable_safety_checker"] * any(not (checkpoint / part).is_dir() for part in parts)
    try:
        copy.deepcopy(pipeline.sampler).set_timesteps(50)  # the default
    except Exception:
        flags += ["--num_inference_steps=4"]
    flags += ["--lora"] * bool(args.lora) + [f"{path}:{weight}" for path, weight in args.lora or []]
    command = ["python", os.path.relpath(script), "-m", str(args.pretrained_model_name_or_path), "-qm"]
    return shlex.join([*command, str(quant_model), *flags, "-c", "a caption"])


def push_to_hub(args: argparse.Namespace) -> None:
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or args.output_dir.resolve().name
    patterns = ["quant_model.pt", "validation/*.png"]
    try:
        repo_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(repo_id=repo_id, folder_path=args.output_dir, allow_patterns=patterns, token=args.hub_token)
    except Exception as error:  # of the network, of the hub's own rules, ...
        kept = f"{args.output_dir / 'quant_model.pt'} is written all the same"
        raise TrainingError(f"--push_to_hub {name}: {first_line(error)}; {kept}") from error
    logger.info(f"pushed to {repo_id}")


# ---------------------------------------------------------------- the flow


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = start(args)  # threads, precision, logging, output folder
    pipeline = load_pipeline(args, accelerator)  # tokenizers, text encoders, VAE, UNet, scheduler
    dataset = load_dataset(args, pipeline.tokenizers)  # metadata.jsonl -> pixel_values [B, 3, H, W], input_ids, ...
    describe_captions(dataset, args)
    steps = total_steps(args, dataset, accelerator)
    checkpoint = find_checkpoint(args)
    training = steps > 0 or checkpoint is not None
    teacher, student = make_teacher_and_student(pipeline.unet, accelerator, training)
    config = quantization_config(args, student)  # which layer gets which dtypes
    student = prepare(student, config)  # float layers -> fake-int8 layers, by int8_algorithm
    if args.cache_latents:
        dataset = cache_latents(dataset, pipeline, steps, accelerator, args)
    if checkpoint is None:
        calibrate(student, pipeline, dataset, accelerator, args)  # activation ranges
    state = TrainState(student)
    if training:
        set_mode(student, "quantize", compiled=compile_fake_quantization(student, accelerator))
        if args.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        state = create_train_state(student, steps, accelerator, args)  # optimizer, schedules, average of the weights
        if checkpoint is not None:
            state.load(checkpoint / "state.pt")
        state.curve = TrainingCurve.of(student, checkpoint)
        accelerator.init_trackers("text-to-image-qat")
        distill(state, teacher, pipeline, dataset, steps, accelerator, args)  # the training loop
    if accelerator.is_main_process:
        path = save_int8(state, config, pipeline, args)  # convert, by int8_algorithm -> quant_model.pt
        logger.info(f"next: {next_command(path, pipeline, args)}")
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (UsageError, TrainingError) as error:
        # an error in a data worker comes with its traceback, whose last line names it
        message = re.sub(r"(?s)Caught .*\n[\w.]+: (?=.*$)", "", str(error).strip())
        if "--debug" in sys.argv:
            logging.exception("the traceback of the error below")
        print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
