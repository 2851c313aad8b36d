"""The three commands of the original README, as processes, with local paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conftest import ROOT, SIZE, run_command

CAPTION = "a photo of an astronaut riding a horse on mars"


def test_commands_of_the_original_readme(model_dir: Path, tmp_path: Path) -> None:
    pairs, output = tmp_path / "image text pairs", tmp_path / "sdv1-5-qat_kd"
    made = run_command(sys.executable, "demo/scenes.py", "--output_dir", pairs, "--count", "12", "--size", "40")
    assert made.returncode == 0

    listed = run_command(sys.executable, "create_metadata.py", "--image_path", pairs)
    assert listed.returncode == 0
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[0]["file_name"] == "00000/000000000.jpg"

    flags = "--use_ema --center_crop --random_flip --train_batch_size=4 --gradient_accumulation_steps=1 "
    flags += "--gradient_checkpointing --max_train_steps=3 --learning_rate=1e-05 --max_grad_norm=1 "
    flags += f"--lr_scheduler=constant --lr_warmup_steps=0 --use_cpu --resolution={SIZE} --calibration_steps=4"
    model = ["--pretrained_model_name_or_path", model_dir]
    command = ["accelerate", "launch", "train_text_to_image_qat.py", *model, "--train_data_dir", pairs]
    trained = run_command(*command, *flags.split(), f"--output_dir={output}")
    assert trained.returncode == 0
    payload = torch.load(output / "quant_model.pt", weights_only=True)
    assert payload["training"]["steps"] == 3 and payload["base_model"] == str(model_dir)

    quantized = ["--quantized_model_name_or_path", output / "quant_model.pt"]
    short = ["--num_inference_steps", "5"]
    for name, extra in (("fp32", []), ("int8", quantized)):
        images = ["--output_dir", tmp_path / name]
        generated = run_command(
            sys.executable, "text2images.py", *model, *extra, "--captions", CAPTION, *short, *images
        )
        assert generated.returncode == 0
    int8, fp32 = (np.asarray(Image.open(tmp_path / name / f"{CAPTION} {name}.png"), float) for name in ("int8", "fp32"))
    assert int8.shape == (SIZE, SIZE, 3)
    assert -10 * np.log10(np.square((int8 - fp32) / 255).mean()) > 40  # 43.8; with halved activation ranges 27

    compared = run_command(sys.executable, "evaluate.py", tmp_path / "fp32", tmp_path / "int8")
    assert compared.returncode == 0 and "1 pairs" in compared.stdout


def test_errors_are_one_line_and_exit_with_2(model_dir: Path, tmp_path: Path) -> None:
    model = ["--pretrained_model_name_or_path", model_dir]
    commands = [
        ["create_metadata.py", "--image_path", tmp_path / "nothing"],
        ["train_text_to_image_qat.py", *model, "--train_data_dir", tmp_path, "--output_dir", tmp_path / "out"],
        ["text2images.py", *model, "-qm", tmp_path / "nothing.pt", "-c", "a", "--output_dir", tmp_path / "out"],
        ["evaluate.py", tmp_path, tmp_path],
    ]
    for command in commands:
        result = run_command(sys.executable, *command)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr and str(tmp_path) in result.stderr.strip().splitlines()[-1]


def test_scripts_share_nothing_but_files() -> None:
    scripts = ["create_metadata", "train_text_to_image_qat", "text2images", "evaluate"]
    for script in scripts:
        source = (ROOT / f"{script}.py").read_text()
        assert not any(f"import {other}" in source or f"from {other}" in source for other in [*scripts, "demo"])
