#!/usr/bin/env python
"""Compare painted folders, picture by picture: how close to the first one, how fast, how large.

Reads the results.jsonl that text2images.py wrote into each folder and pairs the pictures by caption
and seed. The first folder is the reference. Prints a table and writes report.json and
contact_sheet.png (reference | candidate | difference; the worst, median and best pair).

    python evaluate.py images/fp32 images/int8

PSNR and SSIM always; LPIPS, FID and CLIP score where their weights are on this machine, or with
--download. --min_psnr 35 makes it exit with 1 where a candidate's mean PSNR is lower, for use in CI.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from skimage.metrics import structural_similarity

MAX_PSNR = 99.0  # dB, for pictures that are equal to the bit: a mean cannot hold infinity
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
    "lpips": ("LPIPS", "{:.4f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "fid": ("FID", "{:.2f}"),
}
# Must agree, or pictures are not comparable.
SAME = ("steps", "guidance_scale", "negative_prompt", "scheduler", "clip_skip")
NEEDED = ("caption", "seed", "file", "status", "precision", "dtype", "unet_mb", "seconds", "peak_memory_gib")


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="folder of text2images.py, usually fp32")
    parser.add_argument("candidates", type=Path, nargs="+", help="folders to compare with it")
    parser.add_argument("--output_dir", type=Path, help="for report.json and contact_sheet.png (default: last folder)")
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
            parser.error(f"{folder}: no results.jsonl there; paint into it with text2images.py --output_dir")
    return args


# ---------------------------------------------------------------- reading and pairing


@dataclass
class Folder:
    """The rows of one results.jsonl by (caption, seed), and what was measured on them."""

    path: Path
    rows: dict[tuple[str, int], dict]
    values: dict[str, list[float]] = field(default_factory=dict)  # of each metric, one a pair
    fid: float | None = None

    def picture(self, key: tuple[str, int]) -> np.ndarray:
        """[H, W, 3], uint8."""
        file = self.path / self.rows[key]["file"]
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise about ten kinds
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{file}: {reason}; paint it again, or take its row out of results.jsonl") from error

    def median(self, fact: str) -> float:
        return float(np.median([row[fact] for row in self.rows.values()]))


def read_folder(path: Path) -> Folder:
    """Rows with a picture.

    Raises:
        UsageError: a row is damaged, or two pictures are of one caption and seed: which one is meant?
    """
    rows: dict[tuple[str, int], dict] = {}
    with open(path / "results.jsonl", encoding="utf-8", errors="replace", newline="\n") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
            key, file, status = (row["caption"], row["seed"]), row["file"], row["status"]
            missing = [] if file is None or status != "ok" else [name for name in NEEDED if row.get(name) is None]
            rows.get(key), Path(file or ""), float(row.get("seconds") or 0)  # raise where they are of another kind
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            missing = [str(error)]
        if missing:
            problem = f"{path}/results.jsonl, line {number} is damaged or of another program ({missing[0][:80]})"
            raise UsageError(f"{problem}: take that line out, or paint into a new folder")
        if file is None or status != "ok":
            continue
        if key in rows:
            raise UsageError(
                f"{path}: two pictures of {key[0]!r} with seed {key[1]}; paint each run into its own folder"
            )
        rows[key] = row
    return Folder(path, rows)


def pair(folders: list[Folder]) -> list[tuple[str, int]]:
    """Captions and seeds that every folder has, in the reference's order; says what has no partner.

    Raises:
        UsageError: nothing in common, or partners painted in different ways.
    """
    reference = folders[0]
    keys = [key for key in reference.rows if all(key in folder.rows for folder in folders)]
    if not keys:
        counts = ", ".join(f"{folder.path} ({len(folder.rows)} pictures)" for folder in folders)
        raise UsageError(f"no caption and seed is in all of {counts}: paint the same captions with the same --seed")
    for folder in folders:
        alone = len(folder.rows) - len(keys)
        if alone:
            print(f"{folder.path}: {alone} of {len(folder.rows)} pictures have no partner and are left out")
        for key in keys:
            ours, theirs = folder.rows[key], reference.rows[key]
            changed = [fact for fact in SAME if ours.get(fact) != theirs.get(fact)]
            if changed:
                values = f"{ours.get(changed[0])}, not {theirs.get(changed[0])}"
                raise UsageError(
                    f"{folder.path}: {key[0][:60]!r} was painted with {changed[0]} {values}: not comparable"
                )
    return keys


# ---------------------------------------------------------------- measuring


def psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one picture in dB, at a data range of 1 (uint8 levels / 255)."""
    mse = np.square((reference.astype(np.float64) - picture) / 255).mean()
    return min(MAX_PSNR, -10 * np.log10(mse)) if mse > 0 else MAX_PSNR


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % bootstrap interval over pictures (percentiles of 10,000 resamples, fixed seed)."""
    sample = np.asarray(values)
    rows = np.random.default_rng(0).integers(0, len(sample), (10_000, len(sample)))
    low, high = np.percentile(sample[rows].mean(axis=1), [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


def measure(folders: list[Folder], keys: list[tuple[str, int]]) -> None:
    """PSNR and SSIM of every candidate."""
    for key in keys:
        reference = folders[0].picture(key)
        for candidate in folders[1:]:
            picture = candidate.picture(key)
            if picture.shape != reference.shape:
                name = candidate.rows[key]["file"]
                raise UsageError(f"{candidate.path}: {name} is not as large as its partner: paint both at one size")
            ssim = float(structural_similarity(reference, picture, channel_axis=2))
            candidate.values.setdefault("psnr", []).append(psnr(reference, picture))
            candidate.values.setdefault("ssim", []).append(ssim)


# ---------------------------------------------------------------- measuring with networks
#
# The forward passes are written out: lpips, torchmetrics' LPIPS, torch-fidelity, pytorch-fid and clean-fid all import
# torchvision, which cannot be installed beside a CPU build of PyTorch. Tensors have the names of the published files.

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


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 -> [1, 3, H, W] in -1..1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def alexnet_features(x: torch.Tensor, weights: Weights) -> list[torch.Tensor]:
    """The five ReLU outputs of AlexNet, each position scaled to length 1, for pictures in -1..1."""
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
    x, features = (x - shift) / scale, []
    for layer, stride, padding in zip(ALEXNET_LAYERS, (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)):
        x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        x = F.relu(F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], stride, padding))
        features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
    return features


def lpips(reference: list[torch.Tensor], features: list[torch.Tensor], heads: Weights) -> float:
    """Learned perceptual distance of one picture, version 0.1 (arXiv 1801.03924, equation 1)."""
    layers = enumerate(zip(reference, features))
    parts = [
        ((ours - theirs) ** 2 * heads[f"lin{layer}.model.1.weight"]).sum(dim=1) for layer, (ours, theirs) in layers
    ]
    return sum(part.mean().item() for part in parts)


def inception_features(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Pooled features [B, 2048] of FID's own Inception v3 (TensorFlow's of 2015), for pictures in -1..1."""

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
    """100 x the cosine of CLIP's embeddings of picture and caption, at least 0 (arXiv 2104.08718)."""

    def __init__(self, name: str) -> None:
        import transformers  # only here: it takes seconds
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.CLIPModel.from_pretrained(name).eval()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
        self.prepare = CLIPImageProcessorPil.from_pretrained(name)

    def __call__(self, picture: np.ndarray, caption: str) -> float:
        words = self.tokenizer(caption, truncation=True, max_length=77, return_tensors="pt")
        pixel_values = self.prepare(images=[Image.fromarray(picture)], return_tensors="pt").pixel_values
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
            features = [alexnet_features(to_tensor(folder.picture(key)), alexnet) for folder in folders]
            for folder, ours in zip(folders[1:], features[1:]):
                folder.values.setdefault("lpips", []).append(lpips(features[0], ours, heads))
    if inception and len(keys) > 1:
        sets = []
        for folder in folders:
            features = [inception_features(to_tensor(folder.picture(key)), inception) for key in keys]
            sets.append(torch.cat(features).double())
        for folder, ours in zip(folders[1:], sets[1:]):
            folder.fid = frechet_distance(sets[0], ours)
    if clip:
        for folder in folders:
            folder.values["clip_score"] = [clip(folder.picture(key), key[0]) for key in keys]
    found = {"LPIPS": alexnet and heads, "FID": inception, "CLIP score": clip}
    return [name for name, weights in found.items() if not weights]


def report(folders: list[Folder], keys: list[tuple[str, int]]) -> dict:
    """Everything in one dict; intervals are [mean, low, high]."""
    summary: dict = {"pairs": len(keys), "reference": str(folders[0].path), "folders": [], "differences": []}
    for folder in folders:
        first = next(iter(folder.rows.values()))
        row = {
            "folder": str(folder.path),
            **{fact: first.get(fact) for fact in ("precision", "dtype", "unet_mb", *SAME)},
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


def three(how: str, values: tuple[float, float, float]) -> str:
    mean, low, high = map(how.format, values)
    return f"{mean} [{low}, {high}]"


def print_table(summary: dict) -> None:
    measured = {name: how for name, how in METRICS.items() if any(name in row for row in summary["folders"])}
    print(f"\n{summary['pairs']} pairs, compared with {summary['reference']}; mean [95 % interval]\n")
    headings = " | ".join(heading for heading, _ in measured.values())
    print(f"| folder | UNet, around | {headings} | s / picture | speed | peak GiB | UNet MB |")
    print("|---" * (6 + len(measured)) + "|")
    for row in summary["folders"]:
        cells = [row["folder"], f"{row['precision']}, {row['dtype']}"]
        for name, (_, how) in measured.items():
            value = row.get(name)
            cells.append("-" if value is None else how.format(value) if name == "fid" else three(how, value))
        cells += [
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['peak_memory_gib']:.2f}",
            str(row["unet_mb"]),
        ]
        print(f"| {' | '.join(cells)} |")
    if "fid" in measured:
        print(f"\nFID of {summary['pairs']} pictures: compare it with that of other sets of {summary['pairs']} only")
    for row in summary["differences"]:
        mean, low, high = row["psnr"]
        print(f"\nfrom {row['from']} to {row['to']}: {mean:+.2f} dB [{low:+.2f}, {high:+.2f}], paired")


# ---------------------------------------------------------------- the contact sheet


def contact_sheet(reference: Folder, candidate: Folder, keys: list[tuple[str, int]]) -> Image.Image:
    """Reference | candidate | amplified difference, of the worst, the median and the best pair."""
    values = candidate.values["psnr"]
    order = np.argsort(values)
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    size = reference.picture(keys[0]).shape[1::-1]
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
        first, second = reference.picture(keys[index]), candidate.picture(keys[index])
        difference = np.clip(np.abs(first.astype(int) - second) * DIFFERENCE_GAIN, 0, 255).astype(np.uint8)
        for column, pixels in enumerate((first, second, difference)):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (width + gap), top + 2 * line + 4))
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folders = [read_folder(path) for path in (args.reference, *args.candidates)]
    keys = pair(folders)
    measure(folders, keys)
    missing = measure_with_networks(folders, keys, args)
    summary = report(folders, keys)
    print_table(summary)
    if missing:
        print(f"\n{', '.join(missing)}: not measured, as the weights are not on this machine (--download gets them)")
    output_dir = args.output_dir or args.candidates[-1]
    sheet = contact_sheet(folders[0], folders[-1], keys)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        partial = output_dir / "report.json.partial"
        partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, output_dir / "report.json")
        partial = output_dir / "contact_sheet.png.partial"
        sheet.save(partial, format="PNG")
        os.replace(partial, output_dir / "contact_sheet.png")
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from error
    print(f"\n{output_dir / 'report.json'}, {output_dir / 'contact_sheet.png'}")
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
