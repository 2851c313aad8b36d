#!/usr/bin/env python
"""Does a generated image show what its caption says? Count it, attribute by attribute.

A small classifier, fitted on images that scenes.py draws, looks at each region of an image and
names what it sees there by its colours; a table says how often that is what the caption asked for.
It either generates an image for each of some random captions (fp32, on the CPU), or reads a folder
that text2images.py wrote (results.jsonl and its images), e.g. to compare int8 with fp32.

    python demo/check_scenes.py --pretrained_model_name_or_path demo/tiny-stable-diffusion
    python demo/check_scenes.py --image_dir int8_images

Exit code: 0; 1 where --min_accuracy is not reached; 2 for a bad argument.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageFilter

from scenes import (
    ASTRONAUT_CAPTION,
    GROUNDS,
    MILKY_WAY_CAPTION,
    MOUNTAINS,
    OBJECTS,
    SIDES,
    SKIES,
    Scene,
    draw_scene,
    random_pair,
    random_scene,
)

SIZE = 128  # pixels; every image is looked at in this size
# where to look: (top, bottom, rows of cells, columns of cells); margins allow for a horizon that wanders
BANDS = {"sky": (0, 28, 2, 8), "mountains": (46, 76, 3, 8), "ground": (92, 128, 3, 8)}
# objects: sun, moon, balloon and rocket are in the upper window, the rider is in the lower one
WINDOWS = ((4, 60, 7, 8), (44, 116, 8, 8))
HALF = 72  # pixels; a little more than half the width, as the rider reaches over the middle
NAMES = {"sky": list(SKIES), "mountains": list(MOUNTAINS), "ground": list(GROUNDS), "object": list(OBJECTS)}
ATTRIBUTES = (*NAMES, "side")
PHRASES = {
    "sky": {name: phrase for name, (phrase, *_) in SKIES.items()},
    "mountains": {name: phrase for name, (phrase, *_) in MOUNTAINS.items()},
    "ground": {name: phrase for name, (phrase, *_) in GROUNDS.items()},
    "object": {name: phrase for name, phrase in OBJECTS.items() if phrase},
    "side": {side: f"on the {side}" for side in SIDES},
}
# what the captions of the original README state; the rest is open, so it is not checked
ORIGINALS = {
    ASTRONAUT_CAPTION.casefold(): {"ground": "mars", "object": "astronaut"},
    MILKY_WAY_CAPTION.casefold(): {"sky": "milky way", "mountains": "golden"},
}
# seeds of the images to fit on, of those to test on and of the captions; far from those of the training images
FIT_STREAM, HELD_OUT_STREAM, CAPTION_STREAM = 90_001, 90_002, 90_003

Features = dict[str, np.ndarray]


# ---------------------------------------------------------------- arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("what to check (one of the two)").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--pretrained_model_name_or_path", type=Path, metavar="FOLDER", help="pipeline to generate with"
    )
    source.add_argument(
        "--image_dir", type=Path, metavar="FOLDER", help="output of text2images.py, with its results.jsonl"
    )
    generation = parser.add_argument_group("generation (with --pretrained_model_name_or_path)")
    generation.add_argument("--count", type=int, default=100, help="captions, one image each [%(default)s]")
    generation.add_argument(
        "--num_inference_steps", type=int, default=30, help="denoising steps an image [%(default)s]"
    )
    generation.add_argument("--guidance_scale", type=float, default=4.0, help="1 switches guidance off [%(default)s]")
    generation.add_argument(
        "--seed", type=int, default=0, help="another seed gives other captions and other noise [%(default)s]"
    )
    generation.add_argument(
        "--batch_size", type=int, default=8, help="images generated at once; takes memory [%(default)s]"
    )
    checking = parser.add_argument_group("checking")
    checking.add_argument(
        "--fit_count", type=int, default=900, help="drawn images the classifier is fitted on [%(default)s]"
    )
    checking.add_argument(
        "--min_accuracy", type=float, metavar="PERCENT", help="exit 1 if sky, mountains or ground is below"
    )
    checking.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table and every image's verdict to this file"
    )
    return parser


def fail(message: str) -> NoReturn:
    build_parser().error(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    for flag in ("count", "num_inference_steps", "batch_size"):
        if getattr(args, flag) < 1:
            fail(f"--{flag} must be at least 1")
    if args.seed < 0:
        fail("--seed must be 0 or more")
    if args.fit_count < 100:
        fail("--fit_count must be at least 100: fewer images do not make a classifier")
    if args.min_accuracy is not None and not 0 <= args.min_accuracy <= 100:
        fail("--min_accuracy is in percent: between 0 and 100")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        fail(f"--json: {args.json} cannot be written: give a file name in a folder that is there")
    model = args.pretrained_model_name_or_path
    if model and not (model / "model_index.json").is_file():
        fail(f"--pretrained_model_name_or_path: no pipeline in {model} (no model_index.json)")
    if args.image_dir and not (args.image_dir / "results.jsonl").is_file():
        fail(f"--image_dir: no results.jsonl in {args.image_dir}: give the --output_dir of text2images.py")
    return args


# ---------------------------------------------------------------- what the captions ask for


@dataclass(frozen=True)
class Request:
    """A caption, the attributes that it states, and its image's file where there is one already."""

    caption: str
    asked: dict[str, str]
    file: Path | None = None


def parse_caption(caption: str) -> dict[str, str]:
    """The attributes that a caption of scenes.py states; {} for any other caption.

    Only what is stated is in it: a side only beside an object, and of the two original captions no more than they say.
    A caption in the manner of scenes.describe names one sky, one range of mountains and one ground; if it names no
    object, it asks for none.
    """
    text = " ".join(caption.casefold().split())
    if text in ORIGINALS:
        return dict(ORIGINALS[text])
    stated = {}
    for attribute, phrases in PHRASES.items():
        found = [name for name, phrase in phrases.items() if re.search(rf"\b{phrase.casefold()}\b", text)]
        if len(found) > 1:
            return {}
        if found:
            stated[attribute] = found[0]
    if any(attribute not in stated for attribute in BANDS):
        return {}
    if "object" not in stated:
        stated.pop("side", None)
    return {"object": "none", **stated}


def random_requests(count: int, seed: int) -> list[Request]:
    """Captions of random scenes, in the proportions of the training collection (one in eight is an original one)."""
    captions = [random_pair(np.random.default_rng([CAPTION_STREAM, seed, index]))[0] for index in range(count)]
    return [Request(caption, parse_caption(caption)) for caption in captions]


def read_requests(folder: Path) -> list[Request]:
    """The rows of results.jsonl that have an image and a caption of scenes.py; says how many have not."""
    requests, foreign, without = [], 0, 0
    lines = (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            caption, name = row["caption"], row.get("file")
            asked = parse_caption(caption)
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f'--image_dir: {folder / "results.jsonl"}, line {number}: not a JSON object with "caption" and "file"')
        if not asked:
            foreign += 1
        elif not name:  # an image that text2images.py reported as failed
            without += 1
        elif not (folder / str(name)).is_file():
            fail(f"--image_dir: line {number} of results.jsonl names {name}, which is not in {folder}")
        else:
            requests.append(Request(caption, asked, folder / str(name)))
    if foreign or without:
        print(f"left out: {foreign} with a caption that is not of scenes.py, {without} without an image")
    if not requests:
        fail(f"--image_dir: {folder / 'results.jsonl'} has no image with a caption of scenes.py")
    return requests


# ---------------------------------------------------------------- looking at an image


def describe_region(region: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mean colour and spread of each cell of a grid, and a 4x4x4 colour histogram; `region` is [h, w, 3] in 0..1."""
    height, width, _ = region.shape
    cells = region.reshape(rows, height // rows, columns, width // columns, 3)
    bins = np.minimum((region * 4).astype(np.int64), 3) @ (16, 4, 1)
    histogram = np.bincount(bins.ravel(), minlength=64) / bins.size
    # the square root lets a few pixels count (stars, a rocket's nose); the spread tells stars from a bright band
    return np.concatenate([cells.mean((1, 3)).ravel(), cells.std((1, 3)).mean(-1).ravel(), np.sqrt(histogram)])


def look(image: Image.Image) -> Features:
    """Features of the three bands, each [D], and of the two halves, [2, D]: the right one mirrored.

    Objects are looked for in half an image, so that one classifier learns them from both sides.
    """
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255
    features = {
        band: describe_region(pixels[top:bottom], rows, columns) for band, (top, bottom, rows, columns) in BANDS.items()
    }
    features["halves"] = np.stack(
        [
            np.concatenate([describe_region(half[top:bottom], rows, cols) for top, bottom, rows, cols in WINDOWS])
            for half in (pixels[:, :HALF], pixels[:, ::-1][:, :HALF])
        ]
    )
    return features


def spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shift, blur, tint and roughen a drawn image a little, as a VAE and a denoiser do."""
    down, right = 4 + rng.integers(-3, 4, 2)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="edge")
    shifted = Image.fromarray(padded[down : down + SIZE, right : right + SIZE])
    pixels = np.asarray(shifted.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))), dtype=np.float64)
    pixels = (pixels - 128) * rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3) + 128 + rng.uniform(-15, 15)
    pixels = pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_and_look(index: int, stream: int) -> tuple[Scene, Features]:
    """Attributes are drawn independently of each other, so that no region can give away another's."""
    rng = np.random.default_rng([stream, index])
    scene = random_scene(rng)
    return scene, look(spoil(draw_scene(scene, rng, SIZE), rng))


# ---------------------------------------------------------------- the classifier


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on one-hot labels: `scores` is about the probability of each name."""

    mean: np.ndarray  # [D]
    spread: np.ndarray  # [D]
    weights: np.ndarray  # [D + 1, names]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, names]"""
        standard = (features - self.mean) / self.spread
        return standard @ self.weights[:-1] + self.weights[-1]


def fit_ridge(features: np.ndarray, labels: list[str], names: list[str], penalty: float = 30.0) -> Ridge:
    mean, spread = features.mean(0), features.std(0) + 0.01  # a bin that is nearly always empty stays small
    standard = np.c_[(features - mean) / spread, np.ones(len(features))]
    one_hot = np.array([[label == name for name in names] for label in labels], dtype=np.float64)
    gram = standard.T @ standard + penalty * np.eye(standard.shape[1])
    return Ridge(mean, spread, np.linalg.solve(gram, standard.T @ one_hot))


def see(ridges: dict[str, Ridge], looks: list[Features]) -> list[dict[str, str]]:
    """What each image shows; `side` is "nowhere" where no object is seen."""
    seen = {}
    for band in BANDS:
        best = ridges[band].scores(np.stack([features[band] for features in looks])).argmax(1)
        seen[band] = [NAMES[band][index] for index in best]
    left, right = (ridges["object"].scores(np.stack([features["halves"][k] for features in looks])) for k in (0, 1))
    # an object in one half, none in the other; the first column is none in both
    pairs = [("none", "nowhere")] + [(name, side) for side in SIDES for name in NAMES["object"][1:]]
    scores = np.c_[left[:, :1] + right[:, :1], left[:, 1:] + right[:, :1], right[:, 1:] + left[:, :1]]
    seen["object"], seen["side"] = zip(*(pairs[index] for index in scores.argmax(1)), strict=True)
    return [dict(zip(seen, values, strict=True)) for values in zip(*seen.values(), strict=True)]


def fit_classifier(count: int) -> tuple[dict[str, Ridge], dict[str, tuple[int, float | None]]]:
    """Fit on `count` drawn images; the second result is the accuracy on a third as many others, the ceiling."""
    with multiprocessing.Pool() as pool:
        fitted = pool.map(partial(draw_and_look, stream=FIT_STREAM), range(count), chunksize=16)
        held_out = pool.map(partial(draw_and_look, stream=HELD_OUT_STREAM), range(count // 3), chunksize=16)
    ridges = {}
    for band in BANDS:
        features = np.stack([features[band] for _, features in fitted])
        ridges[band] = fit_ridge(features, [getattr(scene, band) for scene, _ in fitted], NAMES[band])
    halves = np.concatenate([features["halves"] for _, features in fitted])
    labels = [scene.object if scene.side == side else "none" for scene, _ in fitted for side in SIDES]
    ridges["object"] = fit_ridge(halves, labels, NAMES["object"])
    return ridges, accuracy([facts(scene) for scene, _ in held_out], see(ridges, [looked for _, looked in held_out]))


def facts(scene: Scene) -> dict[str, str]:
    """The attributes of a drawn scene that can be seen; the side is one only where there is an object."""
    return {name: getattr(scene, name) for name in ATTRIBUTES if name != "side" or scene.object != "none"}


def accuracy(asked: list[dict[str, str]], seen: list[dict[str, str]]) -> dict[str, tuple[int, float | None]]:
    """For each attribute: the images whose caption states it, and the percentage that show it."""
    table = {}
    for attribute in ATTRIBUTES:
        hits = [a[attribute] == s[attribute] for a, s in zip(asked, seen, strict=True) if attribute in a]
        table[attribute] = (len(hits), 100 * sum(hits) / len(hits) if hits else None)
    return table


# ---------------------------------------------------------------- the images


def generate_images(requests: list[Request], args: argparse.Namespace) -> Iterator[Image.Image]:
    """Generate with a random generator for each image, so that image k does not depend on the batch size."""
    import torch  # here, as --help and --image_dir need neither of these
    from diffusers import StableDiffusionPipeline
    from tqdm import tqdm

    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"--pretrained_model_name_or_path: {args.pretrained_model_name_or_path}: {' '.join(str(error).split())}")
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(requests), desc="generating", unit="image") as progress:
        for start in range(0, len(requests), args.batch_size):
            captions = [request.caption for request in requests[start : start + args.batch_size]]
            yield from pipeline(
                captions,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[torch.Generator().manual_seed(args.seed + start + k) for k in range(len(captions))],
            ).images
            progress.update(len(captions))


def open_images(requests: list[Request]) -> Iterator[Image.Image]:
    for request in requests:
        try:
            with Image.open(request.file) as image:
                yield image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            fail(f"--image_dir: {request.file} cannot be read as an image: {error}")


# ---------------------------------------------------------------- the report


def report(
    requests: list[Request], seen: list[dict[str, str]], ceiling: dict[str, tuple[int, float | None]], file: Path | None
) -> dict[str, tuple[int, float | None]]:
    """Print the table, write the JSON file if one is wanted, and return the table's numbers."""
    table = accuracy([request.asked for request in requests], seen)
    print(f"{'attribute':<10} | images | as asked | classifier's ceiling")
    for attribute, (images, percent) in table.items():
        shown = "-" if percent is None else f"{percent:.1f} %"
        print(f"{attribute:<10} | {images:>6} | {shown:>8} | {ceiling[attribute][1]:>18.1f} %")
    mistakes = Counter(
        f"{name} {s[name]} for {asked}"
        for request, s in zip(requests, seen, strict=True)
        for name, asked in request.asked.items()
        if s[name] != asked
    )
    if mistakes:
        print("seen instead:", "; ".join(f"{text} ({times}x)" for text, times in mistakes.most_common(5)))
    if file:
        result = {
            "attributes": {
                name: {"images": images, "percent_as_asked": percent, "percent_ceiling": ceiling[name][1]}
                for name, (images, percent) in table.items()
            },
            "images": [
                {
                    "caption": request.caption,
                    "file": request.file and str(request.file),
                    "asked": request.asked,
                    "seen": s,
                }
                for request, s in zip(requests, seen, strict=True)
            ],
        }
        partial_file = file.with_name(file.name + ".partial")
        partial_file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial_file, file)
    return table


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    requests = read_requests(args.image_dir) if args.image_dir else random_requests(args.count, args.seed)
    ridges, ceiling = fit_classifier(args.fit_count)
    images = open_images(requests) if args.image_dir else generate_images(requests, args)
    seen = see(ridges, [look(image) for image in images])
    table = report(requests, seen, ceiling, args.json)
    if args.min_accuracy is not None:
        low = [name for name in BANDS if table[name][1] is None or table[name][1] < args.min_accuracy]
        if low:
            sys.exit(f"below --min_accuracy {args.min_accuracy:g}: {', '.join(low)}")


if __name__ == "__main__":
    main()
