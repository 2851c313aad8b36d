#!/usr/bin/env python
"""Compare folders of generated images, pair by pair: how close to the first one, how fast, how large.

Reads the results.jsonl that text2images.py wrote into each folder and pairs the images by caption
and seed. The first folder is the reference. Prints a table and writes report.html (every pair, worst
first, to be flipped through in a browser), report.json and contact_sheet.png (reference | candidate |
difference; the worst, median and best pair).

    python evaluate.py images/fp32 images/int8

PSNR, SSIM and CIEDE2000 always; LPIPS, FID and CLIP score where their weights are on this machine, or with
--download. --min_psnr 35 makes it exit with 1 where a candidate's mean PSNR is lower, for use in CI.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where the page is made, as --help need not wait for it

MAX_PSNR = 99.0  # dB, for images that are equal to the bit: a mean cannot hold infinity
DIFFERENCE_GAIN = 20  # of the contact sheet: at 50 dB the mean error is one level of 255
# Kept in torch.hub's folder, where pytorch-fid and torchvision keep the same files under the same names.
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LPIPS_HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth"
LPIPS_FILE = "lpips-alex-df73285e.pth"  # what it is called on disk: plain alex.pth would be too common a name
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the same, as torch-fidelity and torchmetrics call it
CLIP = "openai/clip-vit-large-patch14"
METRICS = {  # heading and format, in the order of the table
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ciede2000": ("CIEDE2000", "{:.2f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "fid": ("FID", "{:.2f}"),
}
LARGE_PAGE = 200  # MB of report.html, from where on a browser takes seconds to open it
# Must agree, or images are not comparable.
MUST_MATCH = ("steps", "guidance_scale", "negative_prompt", "scheduler", "clip_skip")
REQUIRED = ("caption", "seed", "file", "status", "precision", "dtype", "unet_mb", "seconds", "peak_memory_gib")
POSITIVE = ("unet_mb", "seconds", "peak_memory_gib")


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="folder of text2images.py, usually fp32")
    parser.add_argument("candidates", type=Path, nargs="+", help="folders to compare with it")
    parser.add_argument("--output_dir", type=Path, help="for what this script writes (default: last folder)")
    text = "report.html shows the images where they are, by relative paths, and does not hold them: for hundreds"
    parser.add_argument("--link", action="store_true", help=text)
    parser.add_argument("--min_psnr", type=float, help="exit with 1 where a candidate's mean PSNR is below so many dB")
    text = (
        "LPIPS' published weights in one .safetensors: conv0 to conv4 (.weight, .bias) of AlexNet, lin0.weight to lin4"
    )
    parser.add_argument("--lpips_weights", type=Path, metavar="FILE", help=text)
    text = f"CLIP for the CLIP score, a folder or hub id; by default {CLIP} if it is in the hub's cache"
    parser.add_argument("--clip_model", metavar="NAME", help=text)
    text = "fetch what LPIPS, FID and the CLIP score lack: 2 GB; without it nothing is downloaded"
    parser.add_argument("--download", action="store_true", help=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback with an error")
    args = parser.parse_args(argv)
    for folder in (args.reference, *args.candidates):
        if not (folder / "results.jsonl").is_file():
            parser.error(f"{folder}: no results.jsonl there; generate into it with text2images.py --output_dir")
    return args


# ---------------------------------------------------------------- reading and pairing


@dataclass
class Folder:
    """The rows of one results.jsonl by (caption, seed), and what was measured on them."""

    path: Path
    rows: dict[tuple[str, int], dict]
    values: dict[str, list[float]] = field(default_factory=dict)  # of each metric, one a pair
    fid: float | None = None

    def image(self, key: tuple[str, int]) -> np.ndarray:
        """[H, W, 3], uint8."""
        file = self.path / self.rows[key]["file"]
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise about ten kinds
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{file}: {reason}; generate it again, or take its row out of results.jsonl") from error

    def median(self, fact: str) -> float:
        return float(np.median([row[fact] for row in self.rows.values()]))


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def read_folder(path: Path) -> Folder:
    """Rows with an image.

    Raises:
        UsageError: a row is damaged, or two images are of one caption and seed: which one is meant?
    """
    rows: dict[tuple[str, int], dict] = {}
    with open(path / "results.jsonl", encoding="utf-8", errors="replace", newline="\n") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
            key, file, status = (row["caption"], row["seed"]), row["file"], row["status"]
            missing = [] if file is None or status != "ok" else [name for name in REQUIRED if row.get(name) is None]
            missing += [name for name in POSITIVE if name in row and not is_positive(row[name])]
            rows.get(key), Path(file or "")  # raise where they are of another kind
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            missing = [str(error)]
        if missing:
            problem = f"{path}/results.jsonl, line {number} is damaged or of another program ({missing[0][:80]})"
            raise UsageError(f"{problem}: take that line out, or generate into a new folder")
        if file is None or status != "ok":
            continue
        if key in rows:
            raise UsageError(
                f"{path}: two images of {key[0]!r} with seed {key[1]}; generate each run into its own folder"
            )
        rows[key] = row
    return Folder(path, rows)


def pair(folders: list[Folder]) -> list[tuple[str, int]]:
    """Captions and seeds that every folder has, in the reference's order; says what has no partner.

    Raises:
        UsageError: nothing in common, or partners that were generated with different settings.
    """
    reference = folders[0]
    keys = [key for key in reference.rows if all(key in folder.rows for folder in folders)]
    if not keys:
        counts = ", ".join(f"{folder.path} ({len(folder.rows)} images)" for folder in folders)
        raise UsageError(f"no caption and seed is in all of {counts}: generate the same captions with the same --seed")
    for folder in folders:
        alone = len(folder.rows) - len(keys)
        if alone:
            print(f"{folder.path}: {alone} of {len(folder.rows)} images have no partner and are left out")
        for key in keys:
            ours, theirs = folder.rows[key], reference.rows[key]
            changed = [fact for fact in MUST_MATCH if ours.get(fact) != theirs.get(fact)]
            if changed:
                values = f"{ours.get(changed[0])}, not {theirs.get(changed[0])}"
                raise UsageError(
                    f"{folder.path}: {key[0][:60]!r} was generated with {changed[0]} {values}: not comparable"
                )
    return keys


# ---------------------------------------------------------------- measuring


def psnr(reference: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one image in dB, at a data range of 1 (uint8 levels / 255)."""
    mse = np.square((reference.astype(np.float64) - image) / 255).mean()
    return min(MAX_PSNR, -10 * np.log10(mse)) if mse > 0 else MAX_PSNR


def color_difference(reference: np.ndarray, image: np.ndarray) -> float:
    """The largest CIEDE2000 difference of two sRGB images [H, W, 3], uint8, anywhere in them.

    Means over blocks whose edge is a 32nd of the width: what an eye takes in at once, and no single odd pixel. The
    unit is made so that 1 is about the least difference that people see between two colours side by side.
    """
    lab = [rgb2lab(pixels / np.float32(255)) for pixels in (reference, image)]  # half the time of float64
    difference = torch.from_numpy(deltaE_ciede2000(*lab))[None, None]  # [1, 1, H, W]
    return F.avg_pool2d(difference, max(1, image.shape[1] // 32), ceil_mode=True).max().item()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % bootstrap interval over images (percentiles of 10,000 resamples, fixed seed)."""
    sample = np.asarray(values)
    rows = np.random.default_rng(0).integers(0, len(sample), (10_000, len(sample)))
    low, high = np.percentile(sample[rows].mean(axis=1), [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


def measure(folders: list[Folder], keys: list[tuple[str, int]]) -> None:
    """PSNR, SSIM and the largest colour difference of every candidate."""
    for key in keys:
        reference = folders[0].image(key)
        for candidate in folders[1:]:
            image = candidate.image(key)
            if image.shape != reference.shape:
                name = candidate.rows[key]["file"]
                raise UsageError(f"{candidate.path}: {name} is not as large as its partner: generate both at one size")
            ssim = float(structural_similarity(reference, image, channel_axis=2))
            candidate.values.setdefault("psnr", []).append(psnr(reference, image))
            candidate.values.setdefault("ssim", []).append(ssim)
            candidate.values.setdefault("ciede2000", []).append(color_difference(reference, image))


# ---------------------------------------------------------------- measuring with networks
#
# The forward passes are written out, as the packages for these metrics cannot run here: lpips, pytorch-fid, clean-fid
# and torch-fidelity, which torchmetrics needs for FID, import torchvision, and PyPI's build of that does not import
# beside a CPU build of PyTorch. Tensors have the names of the published files.

Weights = dict[str, torch.Tensor]
ALEXNET_LAYERS = (0, 3, 6, 8, 10)  # its convolutions, as torchvision numbers them


def hub_weights(url: str, download: bool, file_name: str | None = None) -> Weights | None:
    """A file of torch.hub's folder, loaded without running code; None where it is not there and not to be fetched."""
    name = file_name or url.rpartition("/")[2]
    if not download and not (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
        return None
    try:  # the hash that a name ends with is checked
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", file_name=name, check_hash=True, weights_only=True
        )
    except Exception as error:  # a lost connection and a damaged file fail in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{name} in {torch.hub.get_dir()}/checkpoints: {reason}; delete it, or --download") from error


def lpips_weights(path: Path | None, download: bool) -> tuple[Weights | None, Weights | None]:
    """AlexNet and the heads: from one file, or from those of torch.hub's folder.

    Raises:
        UsageError: the file is none of safetensors, or holds other tensors.
    """
    if path is None:
        return hub_weights(ALEXNET, download), hub_weights(LPIPS_HEADS, download, LPIPS_FILE)
    try:
        weights = load_file(path)
        alexnet = {
            f"features.{layer}.{part}": weights[f"conv{index}.{part}"]
            for index, layer in enumerate(ALEXNET_LAYERS)
            for part in ("weight", "bias")
        }
        return alexnet, {f"lin{index}.model.1.weight": weights[f"lin{index}.weight"] for index in range(5)}
    except Exception as error:  # no such file, no safetensors, a missing tensor
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UsageError(f"--lpips_weights {path}: {reason}; see --help for what it must hold") from error


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 -> [1, 3, H, W] in -1..1."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def alexnet_features(x: torch.Tensor, weights: Weights) -> list[torch.Tensor]:
    """The five ReLU outputs of AlexNet, each position scaled to length 1, for images in -1..1."""
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
    x, features = (x - shift) / scale, []
    for layer, stride, padding in zip(ALEXNET_LAYERS, (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)):
        x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        x = F.relu(F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], stride, padding))
        features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
    return features


def lpips(reference: list[torch.Tensor], features: list[torch.Tensor], heads: Weights) -> float:
    """Learned perceptual distance of one image, version 0.1 (arXiv 1801.03924, equation 1)."""
    layers = enumerate(zip(reference, features))
    parts = [
        ((ours - theirs) ** 2 * heads[f"lin{layer}.model.1.weight"]).sum(dim=1) for layer, (ours, theirs) in layers
    ]
    return sum(part.mean().item() for part in parts)


def inception_features(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Pooled features [B, 2048] of FID's own Inception v3 (TensorFlow's of 2015), for images in -1..1."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, padded: bool = True) -> torch.Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = [edge // 2 for edge in kernel.shape[2:]] if padded and stride == 1 else 0
        norm = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(F.conv2d(x, kernel, stride=stride, padding=padding), *norm, eps=0.001))

    def chain(x: torch.Tensor, *names: str, last_stride: int = 1) -> torch.Tensor:
        for name in names:
            x = conv(x, name, last_stride if name == names[-1] else 1)
        return x

    def numbered(name: str, count: int) -> list[str]:
        return [f"{name}_{number}" for number in range(1, count + 1)]

    x = F.interpolate(x, (299, 299), mode="bilinear")
    x = conv(conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3", padded=False)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padded=False), 3, 2)
    for block in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        towers = [["branch1x1"], numbered("branch5x5", 2), numbered("branch3x3dbl", 3)]
        outputs = [chain(x, *(block + name for name in names)) for names in towers]
        x = torch.cat([*outputs, conv(pooled, block + "branch_pool")], dim=1)
    down = [f"Mixed_6a.{name}" for name in numbered("branch3x3dbl", 3)]
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", 2), chain(x, *down, last_stride=2), F.max_pool2d(x, 3, 2)], dim=1)
    for block in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        towers = [["branch1x1"], numbered("branch7x7", 3), numbered("branch7x7dbl", 5)]
        outputs = [chain(x, *(block + name for name in names)) for names in towers]
        x = torch.cat([*outputs, conv(pooled, block + "branch_pool")], dim=1)
    towers = [numbered("branch3x3", 2), numbered("branch7x7x3", 4)]
    outputs = [chain(x, *(f"Mixed_7a.{name}" for name in names), last_stride=2) for names in towers]
    x = torch.cat([*outputs, F.max_pool2d(x, 3, 2)], dim=1)
    for block in ("Mixed_7b.", "Mixed_7c."):
        # the last block pools by maximum: a quirk of the original graph
        pooled = F.max_pool2d(x, 3, 1, 1) if block == "Mixed_7c." else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        starts = {
            "branch3x3_2": conv(x, block + "branch3x3_1"),
            "branch3x3dbl_3": chain(x, block + "branch3x3dbl_1", block + "branch3x3dbl_2"),
        }
        split = [conv(start, f"{block}{name}{half}") for name, start in starts.items() for half in "ab"]
        x = torch.cat([conv(x, block + "branch1x1"), *split, conv(pooled, block + "branch_pool")], dim=1)
    return x.mean(dim=(2, 3))


def frechet_distance(reference: torch.Tensor, features: torch.Tensor) -> float:
    """Between the normal distributions of two sets of features [N, D] (arXiv 1706.08500, equation 6).

    With centred features A and B, the trace of the root of both covariances' product is the sum of the singular
    values of A B^T, and so of their triangular factors, which are never larger than D x D.
    """
    means = [part.mean(dim=0) for part in (reference, features)]
    factors = [
        torch.linalg.qr((part - mean) / math.sqrt(len(part) - 1)).R for part, mean in zip((reference, features), means)
    ]
    traces = sum(factor.square().sum() for factor in factors)
    common = torch.linalg.matrix_norm(factors[0] @ factors[1].T, "nuc")
    return max(0.0, ((means[0] - means[1]).square().sum() + traces - 2 * common).item())


class ClipScore:
    """100 x the cosine of CLIP's embeddings of image and caption, at least 0 (arXiv 2104.08718)."""

    def __init__(self, name: str) -> None:
        import transformers  # only here: it takes seconds
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.CLIPModel.from_pretrained(name).eval()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
        self.prepare = CLIPImageProcessorPil.from_pretrained(name)

    def __call__(self, image: np.ndarray, caption: str) -> float:
        words = self.tokenizer(caption, truncation=True, max_length=77, return_tensors="pt")
        pixel_values = self.prepare(images=[Image.fromarray(image)], return_tensors="pt").pixel_values
        output = self.model(**words, pixel_values=pixel_values)  # its embeddings have length 1
        return max(0.0, 100 * (output.image_embeds * output.text_embeds).sum().item())


def clip_score(name: str | None, download: bool) -> ClipScore | None:
    """None where no model was named and the usual one is not on this machine."""
    where = name or CLIP
    try:
        if not download and not Path(where).is_dir():
            config = try_to_load_from_cache(where, "config.json")
            if not isinstance(config, str):
                raise OSError("no such folder, and not in the hub's cache")
            where = str(Path(config).parent)  # about a hub id, the libraries ask the network even for a cached one
        return ClipScore(where)
    except Exception as error:  # the libraries fail in ways of their own
        if name is None and not download:
            return None
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"--clip_model {name or CLIP}: {reason}; name a folder, or --download") from error


@torch.no_grad()
def measure_with_networks(folders: list[Folder], keys: list[tuple[str, int]], args: argparse.Namespace) -> list[str]:
    """LPIPS and FID to the reference, CLIP score of every folder; returns the names of those that have no weights."""
    alexnet, heads = lpips_weights(args.lpips_weights, args.download)
    inception = hub_weights(INCEPTION, False, INCEPTION_FILE) or hub_weights(INCEPTION, args.download)
    clip = clip_score(args.clip_model, args.download)
    if alexnet and heads:
        for key in keys:
            features = [alexnet_features(to_tensor(folder.image(key)), alexnet) for folder in folders]
            for folder, ours in zip(folders[1:], features[1:]):
                folder.values.setdefault("lpips", []).append(lpips(features[0], ours, heads))
    if inception and len(keys) > 1:
        sets = []
        for folder in folders:
            features = [inception_features(to_tensor(folder.image(key)), inception) for key in keys]
            sets.append(torch.cat(features).double())
        for folder, ours in zip(folders[1:], sets[1:]):
            folder.fid = frechet_distance(sets[0], ours)
    if clip:
        for folder in folders:
            folder.values["clip_score"] = [clip(folder.image(key), key[0]) for key in keys]
    found = {"LPIPS": alexnet and heads, "FID": inception, "CLIP score": clip}
    return [name for name, weights in found.items() if not weights]


# ---------------------------------------------------------------- the report


def report(folders: list[Folder], keys: list[tuple[str, int]]) -> dict:
    """Everything in one dict; intervals are [mean, low, high]."""
    summary: dict = {"pairs": len(keys), "reference": str(folders[0].path), "folders": [], "differences": []}
    for folder in folders:
        first = next(iter(folder.rows.values()))
        row = {
            "folder": str(folder.path),
            **{fact: first.get(fact) for fact in ("precision", "dtype", "unet_mb", *MUST_MATCH)},
        }
        row |= {"seconds": folder.median("seconds"), "peak_memory_gib": folder.median("peak_memory_gib")}
        row["speedup"] = folders[0].median("seconds") / row["seconds"]
        row |= {metric: interval(values) for metric, values in folder.values.items()}
        if folder is not folders[0]:
            row["psnr_worst"] = min(folder.values["psnr"])
        if folder.fid is not None:
            row["fid"] = folder.fid
        summary["folders"].append(row)
    for first, second in combinations(folders[1:], 2):
        difference = interval([b - a for a, b in zip(first.values["psnr"], second.values["psnr"])])
        summary["differences"].append({"from": str(first.path), "to": str(second.path), "psnr": difference})
    return summary


def format_interval(how: str, values: tuple[float, float, float]) -> str:
    mean, low, high = map(how.format, values)
    return f"{mean} [{low}, {high}]"


def table(summary: dict) -> list[list[str]]:
    """The headings, and a row a folder."""
    measured = {name: how for name, how in METRICS.items() if any(name in row for row in summary["folders"])}
    headings = [heading for heading, _ in measured.values()]
    rows = [["folder", "UNet, float layers", *headings, "s / image", "speed", "peak GiB", "UNet MB"]]
    for row in summary["folders"]:
        cells = [row["folder"], f"{row['precision']}, {row['dtype']}"]
        for name, (_, how) in measured.items():
            value = row.get(name)
            cells.append("-" if value is None else how.format(value) if name == "fid" else format_interval(how, value))
        cells += [
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['peak_memory_gib']:.2f}",
            str(row["unet_mb"]),
        ]
        rows.append(cells)
    return rows


def remarks(summary: dict, missing: list[str]) -> list[str]:
    """What belongs under the table."""
    lines = []
    if any("fid" in row for row in summary["folders"]):
        lines.append(f"FID of {summary['pairs']} images: compare it with that of other sets of {summary['pairs']} only")
    for row in summary["differences"]:
        mean, low, high = row["psnr"]
        lines.append(f"from {row['from']} to {row['to']}: {mean:+.2f} dB [{low:+.2f}, {high:+.2f}], paired")
    if missing:
        why = "not measured, as the weights are not on this machine (--download gets them)"
        lines.append(f"{', '.join(missing)}: {why}")
    return lines


def print_table(summary: dict, missing: list[str]) -> None:
    headings, *rows = table(summary)
    print(f"\n{summary['pairs']} pairs, compared with {summary['reference']}; mean [95 % interval]\n")
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")
    for line in remarks(summary, missing):
        print(f"\n{line}")


# ---------------------------------------------------------------- the contact sheet


def contact_sheet(reference: Folder, candidate: Folder, keys: list[tuple[str, int]]) -> Image.Image:
    """Reference | candidate | amplified difference, of the worst, the median and the best pair."""
    values = candidate.values["psnr"]
    order = np.argsort(values)
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    size = reference.image(keys[0]).shape[1::-1]
    width, height = (edge * max(1, 256 // size[1]) for edge in size)
    gap, line, font = 8, 20, ImageFont.load_default(15)
    sheet = Image.new("RGB", (3 * (width + gap) + gap, line + gap + 3 * (height + 2 * line + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(left: int, top: int, text: str, room: int) -> None:
        text = text[:500].encode("latin-1", "replace").decode("latin-1")  # what the font has
        while font.getlength(text) > room:
            text = text.removesuffix("...")[:-1] + "..."
        draw.text((left, top), text, "black", font)

    headings = (reference.path.name, candidate.path.name, f"difference x {DIFFERENCE_GAIN} (black: none)")
    for column, heading in enumerate(headings):
        write(gap + column * (width + gap), 4, heading, width)
    for row, (name, index) in enumerate(chosen.items()):
        top = line + gap + row * (height + 2 * line + 2 * gap)
        caption, seed = keys[index]
        write(gap, top, f"{name} of {len(keys)} pairs: PSNR {values[index]:.1f} dB, seed {seed}", 3 * width)
        write(gap, top + line, caption, 3 * width)
        first, second = reference.image(keys[index]), candidate.image(keys[index])
        difference = np.clip(np.abs(first.astype(int) - second) * DIFFERENCE_GAIN, 0, 255).astype(np.uint8)
        for column, pixels in enumerate((first, second, difference)):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (width + gap), top + 2 * line + 4))
    return sheet


# ---------------------------------------------------------------- the page

TEMPLATE = Path(__file__).with_name("report_template.html")
LOWER_IS_BETTER = ("lpips", "ciede2000", "fid", "seconds")
NOT_SEEN, UP_CLOSE = 1.0, 2.0  # CIEDE2000 below which no eye, or only one that looks closely, tells two colours apart
AS_FAST = 0.05  # a smaller difference in speed or size is none
FRACTIONS = {1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half"}  # the words for what is within a tenth of them
HOW_JUDGED = (
    "Speed: median seconds an image, as measured when they were generated. Size: the file with the UNet's "
    f"weights. Up to {100 * AS_FAST:.0f} % of difference counts as none. PSNR: the mean, higher is closer. What "
    "an eye sees: the largest CIEDE2000 colour difference in a pair, averaged over squares a 32nd of the image wide. "
    f"Where it is below {NOT_SEEN:g} in every pair, the sentence says that no eye sees it; from {UP_CLOSE:g} on, a "
    "pair differs visibly; between the two, only up close."
)
# By which a folder is known in the plots, and the table's and the pairs' chips: fit for light and dark, and for the
# colour-blind together with the shapes. The first is the reference's.
COLOURS = ("#808894", "#3f7fe8", "#e07b1f", "#1fa37a", "#b45fd0", "#d9534f", "#a08a1c")
SHAPES = {"o": "\u25cf", "s": "\u25a0", "^": "\u25b2", "D": "\u25c6", "v": "\u25bc", "P": "\u271a", "X": "\u2716"}
INK = "#0a0b0c"  # stands for the page's text colour in a plot


def labels(folders: list[Folder]) -> list[str]:
    """The folders' short names, no two alike: their precision if that tells them apart."""
    precisions = [str(next(iter(folder.rows.values()))["precision"]) for folder in folders]
    for names in (precisions, [folder.path.name for folder in folders], [str(folder.path) for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return [f"{number}. {folder.path}" for number, folder in enumerate(folders, 1)]


def times(ratio: float) -> str:
    """1.06, 1.9, 12: no digit that would flatter."""
    return f"{ratio:.2f}" if ratio < 1.5 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def sentence(reference: str, name: str, speed: float, size: float, values: dict[str, list[float]]) -> str:
    """What became of a candidate, in one sentence that HOW_JUDGED explains.

    Args:
        speed: reference's seconds / candidate's.
        size: candidate's MB / reference's.
        values: the candidate's psnr (dB) and ciede2000 of each pair.
    """
    if abs(speed - 1) <= AS_FAST:
        fast = f"is as fast as {reference}"
    elif speed > 1:
        fast = f"is {times(speed)} times as fast as {reference}"
    else:
        fast = f"takes {times(1 / speed)} times as long as {reference}"
    word = next((word for share, word in FRACTIONS.items() if abs(size / share - 1) <= 0.1), None)
    percent = f"{100 * size:.0f} %"
    large = f"{word} of its size ({percent})" if word else f"{percent} of its size"
    large = "as large" if abs(size - 1) <= AS_FAST else large
    large = f"is {large}" if fast.startswith("takes") else large
    worst, count = min(values["psnr"]), len(values["psnr"])
    visibly = sum(value >= UP_CLOSE for value in values["ciede2000"])
    up_close = sum(NOT_SEEN <= value < UP_CLOSE for value in values["ciede2000"])
    pairs = f"{visibly or up_close} of {count} {'pairs' if count > 1 else 'pair'}"
    seen = "no eye sees the difference"
    if visibly:
        seen = f"{pairs} {'differ' if visibly > 1 else 'differs'} visibly, the worst at {worst:.0f} dB"
    elif up_close:
        seen = f"the difference shows only up close, in {pairs}"
    far = f"its images reach a PSNR of {np.mean(values['psnr']):.0f} dB: {seen}"
    if worst == MAX_PSNR:
        far = "generates the same images, to the bit"
    return f"{name} {fast}, {large}, and {far}."


def command(row: dict) -> tuple[str | None, str | None]:
    """A line for a POSIX shell that generates the image of this row again, or None and why there is none.

    text2images.py records the flags that it was given, but not what --dtype auto meant on its machine. A caption with
    control characters gets no line: a terminal may obey them when they are pasted.
    """
    flags = row.get("flags")
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        return None, "no command, as it is of an older text2images.py, which did not record its flags"
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(str(row["dtype"]))
    if dtype and not any(flag.startswith("--dtype") for flag in flags):
        flags = [*flags, f"--dtype={dtype}"]
    own = [f"--seed={row['seed']}", f"--captions={row['caption']}", "--output_dir=again"]  # = as it may start with a -
    line = shlex.join(["python", "text2images.py", *flags, *own])
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", line):
        return None, "no command, as its caption has control characters, which a terminal may obey"
    return line, None


def png(folder: Folder, key: tuple[str, int]) -> bytes:
    """The file as it is, or what another format shows as PNG."""
    data = (folder.path / folder.rows[key]["file"]).read_bytes()
    if not data.startswith(b"\x89PNG"):
        buffer = io.BytesIO()
        Image.fromarray(folder.image(key)).save(buffer, "PNG")
        data = buffer.getvalue()
    return data


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if math.isfinite(value) else None


def page_data(folders: list[Folder], keys: list[tuple[str, int]], summary: dict, missing: list[str]) -> dict[str, Any]:
    """All that report.html shows but its plots and images, as JSON has it."""
    names, rows = labels(folders), summary["folders"]
    sizes = [row["unet_mb"] / rows[0]["unet_mb"] for row in rows]
    sentences = [
        sentence(names[0], name, row["speedup"], size, folder.values)
        for name, row, size, folder in list(zip(names, rows, sizes, folders))[1:]
    ]
    how = {name: how for name, how in METRICS.items() if any(name in folder.values for folder in folders)}
    how["seconds"] = ("seconds", "{:.2f}")
    values = [{**folder.values, "seconds": [folder.rows[key]["seconds"] for key in keys]} for folder in folders]
    commands = [tuple(zip(*(command(folder.rows[key]) for folder in folders))) for key in keys]
    settings = {fact: folders[0].rows[keys[0]].get(fact) for fact in (*MUST_MATCH, "width", "height")}
    return {
        "sentences": sentences,
        "how_judged": HOW_JUDGED,
        "remarks": remarks(summary, missing),
        "table": table(summary),
        "settings": {fact: str(value) for fact, value in settings.items() if value is not None},
        "folders": [
            {"name": name, "path": str(folder.path), "colour": colour, "shape": shape}
            for name, folder, colour, shape in zip(names, folders, cycle(COLOURS), cycle(SHAPES.values()))
        ],
        "metrics": [
            {"name": name, "heading": heading, "digits": int(form[3:-2]), "lower_is_better": name in LOWER_IS_BETTER}
            for name, (heading, form) in how.items()
        ],
        "pairs": [
            {
                "caption": key[0],
                "seed": str(key[1]),  # 64 bits are more than a number holds there
                "values": {
                    name: [finite(each[name][index]) if name in each else None for each in values] for name in how
                },
                "commands": commands[index][0],
                "no_commands": commands[index][1],
            }
            for index, key in enumerate(keys)
        ],
    }


def as_svg(figure: Figure, name: str) -> str:
    """A plot to put into the page, in its text colour; letters are drawn as paths, so that no font is asked for."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"(?s)<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue())
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)  # no two plots may have the same ids


def plot(width: float, height: float, xlabel: str) -> tuple[Figure, Any]:
    """An empty figure (inches) and its axes, quiet in looks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(axis="x", color=INK, alpha=0.12)
    return figure, axes


def distribution(metric: str, candidates: list[Folder]) -> Figure:
    """A histogram a folder, one above the other, each pair a tick below it; the median and the worst are marked."""
    heading, how = METRICS[metric]
    figure, axes = plot(5.6, max(3.2, 0.8 + 0.9 * len(candidates)), heading)
    for row, folder in enumerate(candidates):
        values, colour, base = np.asarray(folder.values[metric]), COLOURS[(row + 1) % len(COLOURS)], -1.3 * row
        counts, edges = np.histogram(values, bins=min(40, max(8, int(2 * len(values) ** 0.5))))
        axes.bar(edges[:-1], 0.8 * counts / counts.max(), np.diff(edges), base, align="edge", color=colour, alpha=0.45)
        axes.plot(values, np.full(len(values), base - 0.08), "|", color=colour, alpha=0.6, markersize=5)
        median, worst = np.median(values), (max if metric in LOWER_IS_BETTER else min)(values)
        axes.plot([median] * 2, [base, base + 0.85], color=colour, linewidth=2)
        axes.plot(worst, base - 0.08, "X", color=colour, markersize=7)
        for value, text, offset in ((median, "median", (0, 3)), (worst, "worst", (0, -14))):
            spot = (value, base + 0.85 if text == "median" else base - 0.08)
            words = f"{text} {how.format(value)}"
            axes.annotate(words, spot, offset, textcoords="offset points", ha="center", color=INK, fontsize=9)
    axes.set_ylim(-1.3 * (len(candidates) - 1) - 0.45, 1.15)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.1)
    return figure


def time_against_distance(folders: list[Folder]) -> Figure:
    """A point a folder: median seconds an image, mean PSNR with its interval; the reference has no distance."""
    figure, axes = plot(5.6, 3.2, "seconds an image, median")
    axes.set_ylabel(METRICS["psnr"][0], color=INK)
    seconds = [folder.median("seconds") for folder in folders]
    axes.axvline(seconds[0], color=COLOURS[0], linestyle="--")
    for place, shape, colour in list(zip(range(len(folders)), cycle(SHAPES), cycle(COLOURS)))[1:]:
        mean, low, high = interval(folders[place].values["psnr"])
        spread = [[mean - low], [high - mean]]
        axes.errorbar(seconds[place], mean, spread, fmt=shape, color=colour, markersize=9, capsize=4)
    axes.set_xlim(0, 1.15 * max(seconds))
    axes.grid(color=INK, alpha=0.12)
    return figure


def plots(folders: list[Folder]) -> str:
    """The page's figures, as HTML; what they say stands in words as well, for those who do not see them."""
    candidates, names = folders[1:], labels(folders)
    drawn = [("seconds", "Time against distance", "The dashed line is the reference.", time_against_distance(folders))]
    said = [f"{name}: {folder.median('seconds'):.2f} s" for name, folder in zip(names, folders)]
    words = ["; ".join(said)]
    for metric in ("psnr", "lpips"):
        if metric in candidates[0].values:
            heading, how = METRICS[metric]
            note = "Every tick is a pair; folders from top to bottom."
            drawn.append((metric, f"{heading} of every pair", note, distribution(metric, candidates)))
            worst = max if metric in LOWER_IS_BETTER else min
            said = [
                f"{name}: median {how.format(np.median(folder.values[metric]))}, "
                f"worst {how.format(worst(folder.values[metric]))}"
                for name, folder in zip(names[1:], candidates)
            ]
            words.append("; ".join(said))
    return "".join(
        f'<figure id="plot-{name}"><figcaption><b>{title}</b> {note}</figcaption>'
        f'<div role="img" aria-label="{html.escape(text)}">{as_svg(figure, name)}</div></figure>'
        for (name, title, note, figure), text in zip(drawn, words)
    )


def page(
    folders: list[Folder], keys: list[tuple[str, int]], summary: dict, missing: list[str], link: Path | None
) -> Iterator[str]:
    """report.html, piece by piece, as its images may be larger than memory.

    Nothing that comes from a folder is HTML here: it goes into JSON, and the page's own program, the only one that its
    policy lets run, makes text of it. With `link`, the folder that the page will lie in, the images stay outside.
    """
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{TEMPLATE}: {error.strerror}; it belongs beside {Path(__file__).name}") from error
    program = re.search(r'(?s)<script id="program">(.*?)</script>', template)[1]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    data = page_data(folders, keys, summary, missing)
    if link is not None:
        for pair, key in zip(data["pairs"], keys):
            files = [Path(os.path.relpath(folder.path / folder.rows[key]["file"], link)) for folder in folders]
            pair["images"] = [quote(os.fsencode(file.as_posix())) for file in files]
    text = json.dumps(data, allow_nan=False)  # ASCII, so no line separators either
    fill = {
        "IMAGES": "blob:" if link is None else "'self' file:",
        "HASH": digest,
        "PLOTS": plots(folders),
        "DATA": text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"),
    }
    for index, part in enumerate(re.split("@@([A-Z]+)@@", template)):
        if index % 2 == 0:
            yield part
        elif part != "EMBEDDED":
            yield fill[part]
        elif link is None:
            for number, key in enumerate(keys):
                for place, folder in enumerate(folders):
                    data = base64.b64encode(png(folder, key)).decode()
                    yield f'<script type="text/plain" id="image-{number}-{place}">{data}</script>\n'


def write(path: Path, fill: Callable[[io.BufferedWriter], object]) -> None:
    """Under a temporary name first, so that what stands there is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            fill(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folders = [read_folder(path) for path in (args.reference, *args.candidates)]
    keys = pair(folders)
    measure(folders, keys)
    missing = measure_with_networks(folders, keys, args)
    summary = report(folders, keys)
    print_table(summary, missing)
    output_dir = args.output_dir or args.candidates[-1]
    sheet = contact_sheet(folders[0], folders[-1], keys)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(summary, indent=1) + "\n"
        write(output_dir / "report.json", lambda file: file.write(text.encode()))
        write(output_dir / "contact_sheet.png", lambda file: sheet.save(file, format="PNG"))
        parts = page(folders, keys, summary, missing, output_dir if args.link else None)
        write(output_dir / "report.html", lambda file: file.writelines(part.encode() for part in parts))
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from error
    print(f"\n{output_dir / 'report.json'}, {output_dir / 'contact_sheet.png'}")
    size = (output_dir / "report.html").stat().st_size / 1e6
    print(f"{output_dir / 'report.html'}: {size:.1f} MB{', with --link much less' if size > LARGE_PAGE else ''}")
    if args.min_psnr is not None and min(np.mean(folder.values["psnr"]) for folder in folders[1:]) < args.min_psnr:
        print(f"below --min_psnr {args.min_psnr}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        if "--debug" in sys.argv:
            logging.exception("the traceback of the error below")
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
