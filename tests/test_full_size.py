"""By hand (make test-full): Stable Diffusion v1.5 and XL with random weights through all scripts, within 24 GB."""

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
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import BETAS, ROOT

FP32_UNET_BYTES = 4 * 859_520_964
FP32_XL_UNET_BYTES = 4 * 2_567_463_684


def vae_of_full_size(edge: int) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=edge)


def write_random_sd15(path: Path) -> None:
    """The architecture of SD v1.5; the bundled model's small vocabulary takes the place of CLIP's."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    StableDiffusionPipeline(
        vae=vae_of_full_size(512),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "demo/tiny-stable-diffusion", subfolder="tokenizer"),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def write_random_xl(path: Path) -> None:
    """The architecture of SDXL base 1.0, in fp16, as most of its checkpoints are."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    first, second = (
        CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                       num_attention_heads=width // 64, projection_dim=width, hidden_act=activation)
        for width, layers, activation in ((768, 12, "quick_gelu"), (1280, 32, "gelu"))
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    assert 4 * sum(parameter.numel() for parameter in unet.parameters()) == FP32_XL_UNET_BYTES
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "demo/tiny-stable-diffusion", subfolder="tokenizer")
    StableDiffusionXLPipeline(
        vae=vae_of_full_size(1024),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(path)


def make(writer: str, path: Path) -> Path:
    """In a process of its own, whose memory is then free."""
    maker = "import sys; from pathlib import Path; sys.path.insert(0, 'tests'); import test_full_size;"
    maker += f"test_full_size.{writer}(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", maker, str(path)], cwd=ROOT, check=True)
    return path


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
    pictures, output, model = tmp_path / "pictures", tmp_path / "out", make("write_random_sd15", tmp_path / "sd15")
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


@pytest.mark.full
def test_sdxl_calibrates_and_paints_at_1024_pixels_within_24_gb(tmp_path: Path) -> None:
    pictures, output, model = tmp_path / "pictures", tmp_path / "out", make("write_random_xl", tmp_path / "xl")
    measured("demo/scenes.py", "--output_dir", pictures, "--count", "2", "--size", "1024")
    measured("create_metadata.py", "--image_path", pictures)
    name = ["--pretrained_model_name_or_path", model]
    flags = "--max_train_steps 0 --calibration_steps 1 --train_batch_size 2 --use_cpu --report_to none --center_crop"
    _, _, peak = measured(
        "train_text_to_image_qat.py", *name, "--train_data_dir", pictures, *flags.split(), "--output_dir", output
    )
    assert peak < 24
    assert (output / "quant_model.pt").stat().st_size < 0.28 * FP32_XL_UNET_BYTES
    short = ["--captions", "a lake", "--num_inference_steps", "1", "--output_dir", tmp_path / "int8"]
    _, _, peak = measured("text2images.py", *name, "-qm", output, *short)
    row = json.loads((tmp_path / "int8" / "results.jsonl").read_text())
    assert row["status"] == "ok" and (row["height"], row["width"]) == (1024, 1024) and peak < 24
