#!/usr/bin/env python
"""Compare painted folders, picture by picture: how close to the first one, how fast, how large.

Reads the results.jsonl that text2images.py wrote into each folder and pairs the pictures by caption
and seed. The first folder is the reference. Prints a table and writes report.json and
contact_sheet.png (reference | candidate | difference x 8; the worst, median and best pair).

    python evaluate.py images/fp32 images/int8

--min_psnr 35 makes it exit with 1 where a candidate's mean PSNR is lower, for use in CI.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity

MAX_PSNR = 99.0  # dB, for pictures that are equal to the bit: a mean cannot hold infinity
SAME = ("steps", "guidance_scale", "negative_prompt", "scheduler")  # must agree, or pictures are not comparable


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="folder of text2images.py, usually fp32")
    parser.add_argument("candidates", type=Path, nargs="+", help="folders to compare with it")
    parser.add_argument("--output_dir", type=Path, help="for report.json and contact_sheet.png (default: last folder)")
    parser.add_argument("--min_psnr", type=float, help="exit with 1 where a candidate's mean PSNR is below so many dB")
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
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def picture(self, key: tuple[str, int]) -> np.ndarray:
        """[H, W, 3], uint8."""
        with Image.open(self.path / self.rows[key]["file"]) as image:
            return np.asarray(image.convert("RGB"))

    def median(self, fact: str) -> float:
        return float(np.median([row[fact] for row in self.rows.values()]))


def read_folder(path: Path) -> Folder:
    """Rows with a picture.

    Raises:
        UsageError: two pictures of one caption and seed: which one is meant?
    """
    rows: dict[tuple[str, int], dict] = {}
    lines = (path / "results.jsonl").read_text(encoding="utf-8").split("\n")
    for line in filter(str.strip, lines):
        row = json.loads(line)
        key = (row["caption"], row["seed"])
        if row["file"] is None or row["status"] != "ok":
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
        raise UsageError(f"no caption and seed is in all of {', '.join(str(folder.path) for folder in folders)}")
    for folder in folders:
        alone = len(folder.rows) - len(keys)
        if alone:
            print(f"{folder.path}: {alone} of {len(folder.rows)} pictures have no partner and are left out")
        for key in keys:
            changed = [fact for fact in SAME if folder.rows[key][fact] != reference.rows[key][fact]]
            if changed:
                values = f"{folder.rows[key][changed[0]]}, not {reference.rows[key][changed[0]]}"
                raise UsageError(f"{folder.path}: {key[0]!r} was painted with {changed[0]} {values}: not comparable")
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
    """Fill psnr and ssim of every candidate, one value a pair."""
    for key in keys:
        reference = folders[0].picture(key)
        for candidate in folders[1:]:
            picture = candidate.picture(key)
            if picture.shape != reference.shape:
                raise UsageError(f"{candidate.path}: {candidate.rows[key]['file']} is not as large as its partner")
            candidate.psnr.append(psnr(reference, picture))
            candidate.ssim.append(float(structural_similarity(reference, picture, channel_axis=2)))


def report(folders: list[Folder], keys: list[tuple[str, int]]) -> dict:
    """Everything in one dict; intervals are [mean, low, high]."""
    summary: dict = {"pairs": len(keys), "reference": str(folders[0].path), "folders": [], "differences": []}
    for folder in folders:
        first = next(iter(folder.rows.values()))
        row = {"folder": str(folder.path), **{fact: first[fact] for fact in ("precision", "dtype", "unet_mb", *SAME)}}
        row |= {"seconds": folder.median("seconds"), "peak_memory_gib": folder.median("peak_memory_gib")}
        row["speedup"] = folders[0].median("seconds") / row["seconds"]
        if folder is not folders[0]:
            row |= {"psnr": interval(folder.psnr), "ssim": interval(folder.ssim), "psnr_worst": min(folder.psnr)}
        summary["folders"].append(row)
    for first, second in combinations(folders[1:], 2):
        difference = interval([b - a for a, b in zip(first.psnr, second.psnr)])
        summary["differences"].append({"from": str(first.path), "to": str(second.path), "psnr": difference})
    return summary


def print_table(summary: dict) -> None:
    print(f"\n{summary['pairs']} pairs; PSNR and SSIM to {summary['reference']}, mean [95 % interval]\n")
    print("| folder | UNet, around | PSNR, dB | SSIM | s / picture | speed | peak GiB | UNet MB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in summary["folders"]:
        psnr_text = "{:.2f} [{:.2f}, {:.2f}]".format(*row["psnr"]) if "psnr" in row else "-"
        ssim_text = "{:.4f} [{:.4f}, {:.4f}]".format(*row["ssim"]) if "ssim" in row else "-"
        cost = f"{row['seconds']:.2f} | {row['speedup']:.2f}x | {row['peak_memory_gib']:.2f} | {row['unet_mb']}"
        print(f"| {row['folder']} | {row['precision']}, {row['dtype']} | {psnr_text} | {ssim_text} | {cost} |")
    for row in summary["differences"]:
        mean, low, high = row["psnr"]
        print(f"\nfrom {row['from']} to {row['to']}: {mean:+.2f} dB [{low:+.2f}, {high:+.2f}], paired")


# ---------------------------------------------------------------- the contact sheet


def contact_sheet(reference: Folder, candidate: Folder, keys: list[tuple[str, int]]) -> Image.Image:
    """Reference | candidate | difference x 8, of the worst, the median and the best pair."""
    order = np.argsort(candidate.psnr)
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    tiles = []
    for index in chosen.values():
        first, second = reference.picture(keys[index]), candidate.picture(keys[index])
        difference = np.abs(first.astype(int) - second) * 8
        tiles.append(np.concatenate([first, second, np.clip(difference, 0, 255).astype(np.uint8)], axis=1))
    height, width = tiles[0].shape[:2]
    scale = max(1, 256 // height)
    sheet = Image.new("RGB", (width * scale, (height * scale + 16) * len(tiles)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, index) in enumerate(chosen.items()):
        top = row * (height * scale + 16)
        caption, seed = keys[index]
        words = f"{name}: {candidate.psnr[index]:.1f} dB, seed {seed}, {caption}"
        draw.text((4, top + 2), words.encode("latin-1", "replace").decode("latin-1"), fill="black")
        tile = Image.fromarray(tiles[row]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (0, top + 16))
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folders = [read_folder(path) for path in (args.reference, *args.candidates)]
    keys = pair(folders)
    measure(folders, keys)
    summary = report(folders, keys)
    print_table(summary)
    output_dir = args.output_dir or args.candidates[-1]
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = output_dir / "report.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output_dir / "report.json")
    partial = output_dir / "contact_sheet.png.partial"
    contact_sheet(folders[0], folders[-1], keys).save(partial, format="PNG")
    os.replace(partial, output_dir / "contact_sheet.png")
    print(f"\n{output_dir / 'report.json'}, {output_dir / 'contact_sheet.png'}")
    if args.min_psnr is not None and min(interval(folder.psnr)[0] for folder in folders[1:]) < args.min_psnr:
        print(f"below --min_psnr {args.min_psnr}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
