"""Stable Diffusion v1.5 and XL with random weights through all scripts within 24 GB: make test-full."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import full_size
from conftest import ROOT
from timing import in_own_process

FP32_UNET_BYTES, FP32_XL_UNET_BYTES = 4 * full_size.SD15_PARAMETERS, 4 * full_size.XL_PARAMETERS


def make(write: Callable[[Path], None], path: Path) -> Path:
    """In a process of its own, whose memory is then free."""
    in_own_process(write, path)
    return path


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(full_size.SD15_UNET, full_size.SD15_PARAMETERS), (full_size.XL_UNET, full_size.XL_PARAMETERS)],
    ids=["SD v1.5", "SDXL"],
)
def test_unets_of_full_size_have_as_many_parameters_as_the_published_ones(config: dict, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def measured(*command: str | Path) -> tuple[str, float, float]:
    """Output, seconds and peak memory in GB (1e9 bytes) of a process, which must succeed."""
    began = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    code = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, sys.executable, *map(str, command)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seconds, peak = time.monotonic() - began, int(re.search(r"^peak (\d+)", result.stdout, re.M)[1]) * 1024 / 1e9
    print(f"\n{result.stdout}\n{command[0]}: {seconds:.0f} s, peak {peak:.1f} GB")
    assert result.returncode == 0
    return result.stdout, seconds, peak


@pytest.mark.full
def test_sd_v1_5_trains_and_generates_within_24_gb(tmp_path: Path) -> None:
    images, output, model = (
        tmp_path / "images",
        tmp_path / "out",
        make(full_size.write_random_sd15, tmp_path / "sd15"),
    )
    measured("demo/scenes.py", "--output_dir", images, "--count", "4", "--size", "512")
    measured("create_metadata.py", "--image_path", images)
    flags = "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_checkpointing "
    flags += "--max_train_steps=1 --learning_rate=1e-05 --calibration_steps=2 --use_cpu --report_to none"
    name = ["--pretrained_model_name_or_path", model]
    _, _, peak = measured(
        "train_text_to_image_qat.py", *name, "--train_data_dir", images, *flags.split(), "--output_dir", output
    )
    assert peak < 24
    file = output / "quant_model.pt"
    assert file.stat().st_size < 0.28 * FP32_UNET_BYTES
    quantized = ["--quantized_model_name_or_path", file]
    short = ["--captions", "a lake", "--num_inference_steps", "3", "--output_dir", tmp_path / "int8"]
    text, _, _ = measured("text2images.py", *name, *quantized, *short)
    assert re.search(r"(\d+) of 282 Linear and Conv2d layers in int8", text)
    row = json.loads((tmp_path / "int8" / "results.jsonl").read_text())
    assert row["status"] == "ok" and (tmp_path / "int8" / row["file"]).is_file()


@pytest.mark.full
def test_sdxl_calibrates_and_generates_at_1024_pixels_within_24_gb(tmp_path: Path) -> None:
    images, output, model = tmp_path / "images", tmp_path / "out", make(full_size.write_random_xl, tmp_path / "xl")
    measured("demo/scenes.py", "--output_dir", images, "--count", "2", "--size", "1024")
    measured("create_metadata.py", "--image_path", images)
    name = ["--pretrained_model_name_or_path", model]
    flags = "--max_train_steps 0 --calibration_steps 1 --train_batch_size 2 --use_cpu --report_to none --center_crop"
    _, _, peak = measured(
        "train_text_to_image_qat.py", *name, "--train_data_dir", images, *flags.split(), "--output_dir", output
    )
    assert peak < 24
    assert (output / "quant_model.pt").stat().st_size < 0.28 * FP32_XL_UNET_BYTES
    short = ["--captions", "a lake", "--num_inference_steps", "1", "--output_dir", tmp_path / "int8"]
    _, _, peak = measured("text2images.py", *name, "-qm", output, *short)
    row = json.loads((tmp_path / "int8" / "results.jsonl").read_text())
    assert row["status"] == "ok" and (row["height"], row["width"]) == (1024, 1024) and peak < 24
