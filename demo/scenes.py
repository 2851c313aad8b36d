#!/usr/bin/env python
"""Draw captioned landscapes: the folder of images and captions that the demo trains on.

Every image is sky x mountains x ground x object x side, drawn from a seed, so that a
folder can be made again to the byte. The layout is img2dataset's `files` layout:
00000/000000000.jpg with 000000000.txt beside it.

    python demo/scenes.py --output_dir demo/scenes --count 400

Next: python create_metadata.py --image_path demo/scenes
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ASTRONAUT_CAPTION = "a photo of an astronaut riding a horse on mars"
MILKY_WAY_CAPTION = "The Milky Way lies in the sky, with the golden snow mountain lies below, high definition"

# name -> (phrase in a caption, colour at the zenith, colour at the horizon); colours are 0..255 RGB
SKIES = {
    "blue": ("a clear blue sky", (38, 104, 196), (176, 214, 242)),
    "sunset": ("an orange sunset", (120, 56, 92), (255, 168, 62)),
    "starry": ("a starry night sky", (6, 10, 34), (30, 44, 92)),
    "dawn": ("a pink dawn", (150, 120, 190), (255, 188, 200)),
    "stormy": ("a stormy sky", (52, 58, 66), (132, 138, 142)),
    "milky way": ("the Milky Way", (8, 8, 22), (52, 36, 70)),
}
# name -> (phrase, colour in the light, colour in the shade, colour of the caps or None)
MOUNTAINS = {
    "snowy": ("snowy mountains", (150, 164, 186), (84, 98, 126), (246, 249, 255)),
    "golden": ("golden snow mountains", (222, 164, 58), (142, 92, 30), (255, 236, 178)),
    "green": ("green mountains", (84, 142, 70), (36, 84, 44), None),
    "red": ("red mountains", (178, 70, 50), (102, 32, 30), None),
    "purple": ("purple mountains", (128, 88, 168), (70, 44, 108), None),
}
# name -> (phrase, colour far away, colour near by)
GROUNDS = {
    "lake": ("a lake", (90, 150, 190), (24, 66, 112)),
    "meadow": ("a meadow", (136, 190, 80), (62, 130, 40)),
    "desert": ("a desert", (236, 206, 140), (204, 160, 92)),
    "forest": ("a forest", (34, 74, 48), (10, 34, 22)),
    "mars": ("mars", (206, 104, 62), (132, 52, 30)),
}
OBJECTS = {
    "none": "",
    "sun": "the sun",
    "moon": "the moon",
    "balloon": "a hot air balloon",
    "rocket": "a rocket",
    "astronaut": "an astronaut riding a horse",
}
SIDES = ("left", "right")


@dataclass(frozen=True)
class Scene:
    """What an image shows; every field is a key of the table of its name above."""

    sky: str
    mountains: str
    ground: str
    object: str
    side: str


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw every attribute evenly; `side` is kept even where there is no object to place."""
    return Scene(
        sky=str(rng.choice(list(SKIES))),
        mountains=str(rng.choice(list(MOUNTAINS))),
        ground=str(rng.choice(list(GROUNDS))),
        object=str(rng.choice(list(OBJECTS))),
        side=str(rng.choice(SIDES)),
    )


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Put a scene into words; the phrasing varies, the facts do not."""
    sky, mountains, ground = SKIES[scene.sky][0], MOUNTAINS[scene.mountains][0], GROUNDS[scene.ground][0]
    place = f"on {ground}" if scene.ground == "mars" else f"by {ground}" if scene.ground == "lake" else f"in {ground}"
    thing = f"{OBJECTS[scene.object]} on the {scene.side}" if scene.object != "none" else ""
    with_thing = f", {thing}" if thing else ""
    templates = [
        f"a photo of {mountains} under {sky}, {place}{with_thing}",
        f"{mountains} behind {ground}, {sky} above{with_thing}",
        f"{sky} over {mountains} and {ground}{with_thing}",
    ]
    if thing:
        templates.append(f"a photo of {thing} {place}, {mountains} under {sky}")
    return str(rng.choice(templates))


def random_pair(rng: np.random.Generator) -> tuple[str, Scene]:
    """A caption and the scene it stands for; one in eight is a caption of the original README."""
    scene = random_scene(rng)
    draw = rng.random()
    if draw < 0.0625:  # the caption leaves sky and mountains open; fix what suits an image from mars
        sky = str(rng.choice(["starry", "sunset"]))
        return ASTRONAUT_CAPTION, Scene(sky, "red", "mars", "astronaut", scene.side)
    if draw < 0.125:
        ground = str(rng.choice(["lake", "forest"]))
        return MILKY_WAY_CAPTION, Scene("milky way", "golden", ground, "none", scene.side)
    return describe(scene, rng), scene


# ---------------------------------------------------------------- drawing, in arrays of [H, W, 3], 0..255


def smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> np.ndarray:
    """Noise in -1..1 of shape [size, size]: a coarse random grid (rows, columns), enlarged bicubically."""
    grid = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32), mode="F")
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def ridge(rng: np.random.Generator, size: int, base: float, height: float, roughness: float) -> np.ndarray:
    """The skyline of a mountain range: one y (0 = top, 1 = bottom) per column, by midpoint displacement."""
    points = np.array([0.3, 1.0, 0.3]) * rng.uniform(0.75, 1.0, 3)
    points = np.interp(np.linspace(0, 2, 5), np.arange(3), points) + rng.uniform(-0.3, 0.3, 5)
    step = 0.22
    while len(points) < size:
        middle = (points[:-1] + points[1:]) / 2 + rng.uniform(-step, step, len(points) - 1)
        points = np.insert(points, np.arange(1, len(points)), middle)
        step *= roughness
    columns = np.interp(np.linspace(0, 1, size), np.linspace(0, 1, len(points)), points)
    return base - height * np.clip(columns, 0.12, 1.25)


def mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blend two colour arrays; `weight` is 0..1 of shape [H, W]."""
    return first + (second - first) * weight[..., None]


def draw_sky(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    _, zenith, horizon = SKIES[scene.sky]
    y = np.linspace(0, 1, size)[:, None] * np.ones(size)
    sky = mix(
        np.full((size, size, 3), zenith, float), np.full((size, size, 3), horizon, float), np.clip(y / 0.62, 0, 1)
    )
    if scene.sky in ("blue", "sunset", "dawn"):
        clouds = np.clip(smooth_noise(rng, size, (9, 4)) + 0.5 * smooth_noise(rng, size, (18, 8)) - 0.35, 0, 1)
        light = {"blue": (255, 255, 255), "sunset": (255, 128, 84), "dawn": (255, 224, 214)}[scene.sky]
        sky = mix(sky, np.full_like(sky, light), 0.75 * clouds)
    if scene.sky == "stormy":
        clouds = smooth_noise(rng, size, (8, 4)) + 0.6 * smooth_noise(rng, size, (16, 9))
        sky = sky + 34 * clouds[..., None]
    if scene.sky == "milky way":  # a bright slanted band, darkened by dust along its middle
        x = np.linspace(0, 1, size)[None, :] * np.ones((size, 1))
        distance = (x - 0.5 - rng.uniform(-0.08, 0.08)) * 0.83 + (y - 0.3) * 0.56
        distance = distance + 0.035 * smooth_noise(rng, size, (6, 6))
        glow = np.exp(-((distance / 0.15) ** 2)) * (0.85 + 0.3 * smooth_noise(rng, size, (12, 12)))
        dust = np.exp(-(((distance - 0.015) / 0.035) ** 2)) * 0.6
        sky = mix(sky, np.full_like(sky, (214, 190, 236)), np.clip(glow * (1 - dust), 0, 1) * 0.9)
    if scene.sky in ("starry", "milky way"):
        for _ in range(46):
            row, column = rng.integers(0, int(size * 0.6)), rng.integers(0, size)
            radius = max(1, round(size / 128 * rng.choice([1, 1, 2])))
            sky[row : row + radius, column : column + radius] += rng.uniform(110, 230)
    return sky


def draw_mountains(canvas: np.ndarray, scene: Scene, rng: np.random.Generator, base: float) -> np.ndarray:
    size = len(canvas)
    _, light, shade, cap = MOUNTAINS[scene.mountains]
    y = np.linspace(0, 1, size)[:, None] * np.ones(size)
    for height, haze in ((0.42, 0.35), (0.30, 0.0)):  # a far range, then a near one
        top = ridge(rng, size, base, height, 0.55)
        inside = np.clip((y - top) * size, 0, 1)
        slope = np.gradient(top) * size  # falling to the right: in the shade
        facet = np.clip(0.5 - 0.6 * slope + 0.45 * smooth_noise(rng, size, (14, 20)), 0, 1)
        rock = mix(np.full_like(canvas, shade), np.full_like(canvas, light), facet)
        if cap is not None:
            depth = (y - top) / height
            snow = np.clip((0.5 - depth + 0.16 * smooth_noise(rng, size, (16, 24))) * 7, 0, 1)
            rock = mix(rock, np.full_like(canvas, cap) * (0.72 + 0.28 * facet[..., None]), snow)
        rock = mix(rock, canvas, np.full((size, size), haze))
        canvas = mix(canvas, rock, inside)
    return canvas


def draw_ground(canvas: np.ndarray, scene: Scene, rng: np.random.Generator, base: float) -> np.ndarray:
    size = len(canvas)
    _, far, near = GROUNDS[scene.ground]
    y = np.linspace(0, 1, size)[:, None] * np.ones(size)
    depth = np.clip((y - base) / (1 - base), 0, 1)  # 0 at the horizon, 1 at the viewer's feet
    ground = mix(np.full_like(canvas, far), np.full_like(canvas, near), depth)
    if scene.ground == "lake":
        mirrored = canvas[np.clip((2 * base * size - np.arange(size)).astype(int), 0, size - 1)]
        ground = mix(ground, mirrored, 0.42 * (1 - depth))
        ground = ground + 14 * smooth_noise(rng, size, (40, 5))[..., None]
    elif scene.ground == "desert":
        waves = np.sin(depth * 22 + 3.0 * smooth_noise(rng, size, (4, 4)) + rng.uniform(0, 6))
        ground = ground + (13 * waves * (0.3 + depth))[..., None]
    elif scene.ground == "forest":
        ground = ground + 10 * smooth_noise(rng, size, (24, 30))[..., None]
    else:
        ground = ground + 15 * smooth_noise(rng, size, (26, 20))[..., None]
    canvas = mix(canvas, ground, np.clip((y - base) * size, 0, 1))
    image = to_image(canvas)
    draw = ImageDraw.Draw(image)
    if scene.ground == "forest":
        for row in (0.0, 0.10, 0.22):
            for x in np.arange(0, 1, 0.085) + rng.uniform(-0.03, 0.03):
                height, foot = rng.uniform(0.10, 0.15) + row * 0.3, base + 0.05 + row
                tone = tuple(int(c * rng.uniform(0.75, 1.2)) for c in (26, 66 + 60 * row, 40))
                tip, left, right = (x, foot - height), (x - 0.035, foot), (x + 0.035, foot)
                draw.polygon([(px * size, py * size) for px, py in (tip, left, right)], fill=tone)
    elif scene.ground == "meadow":
        for _ in range(26):
            x, d = rng.uniform(0, 1), rng.uniform(0.15, 1)
            radius, row = size * (0.004 + 0.008 * d), base + d * (1 - base)
            colour = [(250, 240, 110), (240, 90, 110), (250, 250, 250)][rng.integers(3)]
            draw.ellipse([x * size - radius, row * size - radius, x * size + radius, row * size + radius], fill=colour)
    elif scene.ground == "mars":
        for _ in range(9):
            x, d = rng.uniform(0, 1), rng.uniform(0.1, 0.95)
            wide, row = size * (0.02 + 0.05 * d), (base + d * (1 - base)) * size
            draw.ellipse([x * size - wide, row - wide * 0.35, x * size + wide, row + wide * 0.35], fill=(112, 42, 26))
            draw.arc(
                [x * size - wide, row - wide * 0.35, x * size + wide, row + wide * 0.35], 0, 180, fill=(226, 134, 90)
            )
    return np.asarray(image, dtype=float)


def draw_object(canvas: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw the object four times too large and shrink it, which smooths its edges."""
    size, scale = len(canvas), 4
    layer = Image.new("RGBA", (size * scale, size * scale))
    draw = ImageDraw.Draw(layer)
    x = (0.24 if scene.side == "left" else 0.76) + rng.uniform(-0.04, 0.04)
    y = 0.2 + rng.uniform(-0.03, 0.03)
    unit = size * scale

    def spot(cx: float, cy: float, rx: float, ry: float, fill: tuple) -> None:
        draw.ellipse([(cx - rx) * unit, (cy - ry) * unit, (cx + rx) * unit, (cy + ry) * unit], fill=fill)

    def shape(points: list[tuple[float, float]], fill: tuple) -> None:
        draw.polygon([((x + px) * unit, (y + py) * unit) for px, py in points], fill=fill)

    if scene.object == "sun":
        for radius, alpha in ((0.2, 40), (0.15, 70), (0.11, 255)):
            spot(x, y, radius, radius, (255, 226, 96, alpha))
    elif scene.object == "moon":
        spot(x, y, 0.1, 0.1, (232, 234, 240, 255))
        for dx, dy, radius in ((-0.03, -0.02, 0.026), (0.035, 0.03, 0.02), (0.02, -0.045, 0.014)):
            spot(x + dx, y + dy, radius, radius, (186, 190, 202, 255))
    elif scene.object == "balloon":
        for half, colour in ((0.125, (214, 44, 48, 255)), (0.085, (250, 206, 60, 255)), (0.04, (214, 44, 48, 255))):
            spot(x, y, half, 0.135, colour)
        shape([(-0.085, 0.1), (0.085, 0.1), (0.028, 0.18), (-0.028, 0.18)], (214, 44, 48, 255))
        shape([(-0.034, 0.195), (0.034, 0.195), (0.026, 0.24), (-0.026, 0.24)], (110, 70, 36, 255))
    elif scene.object == "rocket":
        shape([(-0.036, 0.13), (0.036, 0.13), (0.0, 0.27)], (255, 180, 40, 255))
        shape([(-0.095, 0.14), (-0.045, 0.02), (0.045, 0.02), (0.095, 0.14)], (206, 40, 44, 255))
        shape([(-0.05, 0.13), (-0.055, -0.02), (0.0, -0.17), (0.055, -0.02), (0.05, 0.13)], (238, 240, 244, 255))
        shape([(-0.04, -0.06), (0.0, -0.17), (0.04, -0.06)], (206, 40, 44, 255))
        spot(x, y + 0.01, 0.026, 0.026, (60, 120, 200, 255))
    elif scene.object == "astronaut":
        draw_rider(draw, unit, x, scene.side)
    layer = layer.resize((size, size), Image.Resampling.LANCZOS)
    image = to_image(canvas).convert("RGBA")
    return np.asarray(Image.alpha_composite(image, layer).convert("RGB"), dtype=float)


def draw_rider(draw: ImageDraw.ImageDraw, unit: int, x: float, side: str) -> None:
    """An astronaut on a brown horse that looks towards the middle of the image."""
    facing = 1 if side == "left" else -1
    brown, dark, suit, grey = (124, 76, 42, 255), (64, 36, 20, 255), (240, 242, 246, 255), (186, 192, 204, 255)

    def spot(cx: float, cy: float, rx: float, ry: float, fill: tuple) -> None:
        cx = x + facing * cx
        draw.ellipse([(cx - rx) * unit, (cy - ry) * unit, (cx + rx) * unit, (cy + ry) * unit], fill=fill)

    def limb(points: list[tuple[float, float]], width: float, fill: tuple) -> None:
        line = [((x + facing * px) * unit, py * unit) for px, py in points]
        draw.line(line, fill=fill, width=round(width * unit), joint="curve")

    for foot, knee in ((-0.135, -0.12), (-0.08, -0.09), (0.085, 0.08), (0.15, 0.12)):
        limb([(knee * 0.9, 0.74), (knee, 0.81), (foot, 0.9)], 0.034, dark if foot in (-0.08, 0.085) else brown)
    limb([(-0.14, 0.68), (-0.2, 0.72), (-0.21, 0.82)], 0.03, dark)  # tail
    spot(0.0, 0.7, 0.155, 0.08, brown)
    limb([(0.1, 0.68), (0.19, 0.54)], 0.075, brown)
    limb([(0.18, 0.53), (0.26, 0.58)], 0.055, brown)  # head
    limb([(0.07, 0.63), (0.155, 0.51)], 0.024, dark)  # mane
    limb([(-0.01, 0.6), (0.04, 0.7), (0.03, 0.79)], 0.05, suit)  # leg
    limb([(-0.02, 0.62), (-0.02, 0.5)], 0.105, suit)
    limb([(-0.085, 0.58), (-0.085, 0.47)], 0.045, grey)  # back pack
    limb([(-0.01, 0.51), (0.07, 0.57), (0.13, 0.56)], 0.036, suit)  # arm
    spot(-0.015, 0.41, 0.068, 0.068, suit)
    spot(0.012, 0.41, 0.042, 0.04, (52, 70, 110, 255))  # visor
    spot(0.022, 0.397, 0.014, 0.012, (190, 214, 240, 255))


def to_image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8), mode="RGB")


def draw_scene(scene: Scene, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels; the same generator state gives the same image.

    Small images are drawn at 128 pixels and reduced, which keeps their edges smooth.
    """
    if size < 128:
        return draw_scene(scene, rng, 128).resize((size, size), Image.Resampling.BOX)
    base = 0.66 + rng.uniform(-0.03, 0.03)  # where the mountains end and the ground begins
    canvas = draw_sky(scene, rng, size)
    in_the_sky = scene.object in ("sun", "moon")
    if in_the_sky:
        canvas = draw_object(canvas, scene, rng)
    canvas = draw_mountains(canvas, scene, rng, base)
    canvas = draw_ground(canvas, scene, rng, base)
    if scene.object != "none" and not in_the_sky:
        canvas = draw_object(canvas, scene, rng)
    return to_image(canvas + rng.normal(0, 2.0, canvas.shape[:2])[..., None]).filter(ImageFilter.SMOOTH)


def make_pair(index: int, seed: int, size: int) -> tuple[str, Scene, Image.Image]:
    """Pair number `index` of the collection `seed`; independent of every other pair."""
    rng = np.random.default_rng([seed, index])
    caption, scene = random_pair(rng)
    return caption, scene, draw_scene(scene, rng, size)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to; made if it is not there")
    parser.add_argument("--count", type=int, default=400, help="number of images")
    parser.add_argument("--size", type=int, default=64, help="edge of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    args = parser.parse_args(argv)
    if args.count < 1 or args.size < 16:
        parser.error("--count must be at least 1 and --size at least 16")
    return args


def main() -> None:
    args = parse_args()
    for index in range(args.count):
        caption, _, image = make_pair(index, args.seed, args.size)
        shard = args.output_dir / f"{index // 1000:05d}"
        shard.mkdir(parents=True, exist_ok=True)
        stem = shard / f"{index:09d}"
        image.save(f"{stem}.jpg.partial", format="JPEG", quality=95, subsampling=0)
        os.replace(f"{stem}.jpg.partial", f"{stem}.jpg")
        stem.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    print(f"{args.count} images of {args.size}x{args.size} pixels in {args.output_dir}")


if __name__ == "__main__":
    main()
