"""The scripts on a CUDA device: the same model and the same images as on a CPU. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import text2images
import train_text_to_image_qat as trainer
from conftest import ROOT, SIZE, reset_accelerate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MODEL = ROOT / "demo/tiny-stable-diffusion"


def train(output_dir: Path, model: Path, data: Path, size: int, *flags: str) -> dict:
    reset_accelerate()
    command = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", output_dir]
    command += ["--resolution", size, "--train_batch_size", 2, "--calibration_steps", 4, "--report_to", "none", *flags]
    trainer.main(list(map(str, command)))
    reset_accelerate()
    return torch.load(output_dir / "quant_model.pt", weights_only=True)


def generate(output_dir: Path, *flags: str | Path) -> np.ndarray:
    command = ["-m", MODEL, "-c", "a green hill", "--num_inference_steps", "10", "--output_dir", output_dir, *flags]
    text2images.main(list(map(str, command)))
    (file,) = output_dir.glob("*seed 42.png")
    return np.asarray(Image.open(file), dtype=float)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_cuda(model_dir: Path, data_dir: Path, tmp_path: Path, precision: str) -> None:
    flags = ["--mixed_precision", precision, "--use_ema", "--random_flip", "--gradient_checkpointing"]
    flags += ["--feature_kd_weight", "0.1", "--task_weight", "0.1", "--validation_prompts", "a"]
    saved = train(tmp_path, model_dir, data_dir, SIZE, *flags, "--max_train_steps", "3")
    assert all(np.isfinite(loss) for loss in saved["training"]["losses"].values())
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())
    assert list((tmp_path / "validation").glob("*.png"))


def test_calibration_on_cuda_is_that_of_the_cpu(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "0", "--mixed_precision", "no"]
    ours = train(tmp_path / "cuda", model_dir, data_dir, SIZE, *flags)["state_dict"]
    theirs = train(tmp_path / "cpu", model_dir, data_dir, SIZE, *flags, "--use_cpu")["state_dict"]
    for name in ours:
        if name.endswith("input_scale"):
            assert ours[name].item() == pytest.approx(theirs[name].item(), rel=0.02), name


def test_cached_latents_and_resuming_on_cuda(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--center_crop", "--cache_latents", "--use_ema"]
    train(tmp_path, model_dir, data_dir, SIZE, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "gone")
    resumed = train(tmp_path, model_dir, data_dir, SIZE, *flags, "--resume_from_checkpoint", "latest")
    assert resumed["training"]["steps"] == 4


def test_images_on_cuda_are_those_of_the_cpu(data_dir: Path, tmp_path: Path, monkeypatch) -> None:
    train(tmp_path / "out", MODEL, data_dir, 64, "--max_train_steps", "0")
    images = {}
    for name, flags in {"fp32": [], "int8": ["-qm", tmp_path / "out"]}.items():
        images[name] = generate(tmp_path / name, "--dtype", "float32", *flags)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            on_cpu = generate(tmp_path / f"{name} cpu", "--dtype", "float32", *flags)
        assert 10 * np.log10(255**2 / np.square(images[name] - on_cpu).mean()) > 35, name
    generate(tmp_path / "bf16", "-qm", tmp_path / "out", "--dtype", "bfloat16", "--batch_size", "3", "-n", "1")
    row = json.loads((tmp_path / "int8/results.jsonl").read_text())
    assert row["precision"] == "int8" and row["paired_guidance"]
    assert 10 * np.log10(255**2 / np.square(images["int8"] - images["fp32"]).mean()) > 35
