"""What several test files need of data: pairs, shards, and folders as text2images.py leaves them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import create_metadata as cm
import train_text_to_image_qat as trainer
from conftest import SIZE, tiny_pipeline

FACTS = {"status": "ok", "steps": 4, "guidance_scale": 3.0, "negative_prompt": None, "scheduler": "DDIMScheduler"}
FACTS |= {"precision": "int8", "dtype": "fp32", "unet_mb": 7.0, "peak_memory_gib": 1.0}


def collect(folder: Path, *flags: str) -> tuple[list[tuple[str, str]], dict[str, int], dict[str, int]]:
    """The rows that would be written, the counts of what is left out, and the counts of what is remarked on."""
    args = cm.parse_args(["-p", str(folder), *flags])
    left_out, remarks = cm.Reasons(), cm.Reasons()
    rows = cm.check_pairs(cm.find_pairs(args, left_out, remarks), args, left_out, remarks)
    return rows, dict(left_out.counts), dict(remarks.counts)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def encoded_image(level: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE + 4, SIZE), (level, level, level)).save(file, kind)
    return file.getvalue()


def pair(key: str, level: int) -> dict[str, bytes]:
    """A sample as img2dataset writes it; the image's grey level tells which one it is."""
    return {f"{key}.png": encoded_image(level), f"{key}.txt": f"grey {level}".encode(), f"{key}.json": b'{"width": 36}'}


def stream(tars: Path | str, *flags: str) -> tuple[trainer.CaptionedImages, object]:
    command = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tars), "--streaming"]
    command += ["--max_train_steps", "9", "--resolution", str(SIZE), "--train_batch_size", "2", "--center_crop"]
    args = trainer.parse_args([*command, "--proportion_empty_prompts", "0", *flags])
    return trainer.load_dataset(args, [tiny_pipeline().tokenizer]), args


def folder(path: Path, images: dict[tuple[str, int], np.ndarray], **facts) -> Path:
    path.mkdir()
    with open(path / "results.jsonl", "w") as file:
        for number, ((caption, seed), pixels) in enumerate(images.items()):
            Image.fromarray(pixels).save(path / f"{number}.png")
            row = {"caption": caption, "seed": seed, "file": f"{number}.png", "seconds": 2.0, **FACTS, **facts}
            file.write(json.dumps(row) + "\n")
    return path


def noise_images(count: int, shift: int = 0, edge: int = 16) -> dict[tuple[str, int], np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for index in range(count):
        pixels = rng.integers(20, 200, (edge, edge, 3), dtype=np.uint8)
        made[("a caption", index)] = pixels + np.uint8(shift)
    return made
