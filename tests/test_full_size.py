"""By hand (make test-full): a random-weight Stable Diffusion v1.5 through all three scripts, within 24 GB."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conftest import ROOT

FP32_UNET_BYTES = 4 * 859_520_964


def write_random_sd15(path: Path) -> None:
    """The architecture of SD v1.5; the bundled model's small vocabulary takes the place of CLIP's."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "demo/tiny-stable-diffusion", subfolder="tokenizer"),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=PNDMScheduler(**schedule, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


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
def test_sd_v1_5_trains_and_paints_within_24_gb(tmp_path: Path) -> None:
    model, pictures, output = tmp_path / "sd15", tmp_path / "pictures", tmp_path / "out"
    maker = "import sys; from pathlib import Path; sys.path.insert(0, 'tests');"
    maker += "import test_full_size; test_full_size.write_random_sd15(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", maker, str(model)], cwd=ROOT, check=True)  # a process of its own: memory
    measured("demo/scenes.py", "--output_dir", pictures, "--count", "4", "--size", "512")
    measured("create_metadata.py", "--image_path", pictures)
    flags = "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_checkpointing "
    flags += "--max_train_steps=1 --learning_rate=1e-05 --calibration_steps=2 --use_cpu --report_to none"
    name = ["--pretrained_model_name_or_path", model]
    _, _, peak = measured(
        "train_text_to_image_qat.py", *name, "--train_data_dir", pictures, *flags.split(), "--output_dir", output
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
