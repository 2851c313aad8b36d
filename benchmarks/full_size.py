"""Stable Diffusion v1.5 and XL at full size, with random weights: what speed and memory are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from output import ROOT

# UNets; what is not named here is the class's default
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
XL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_PARAMETERS, XL_PARAMETERS = 859_520_964, 2_567_463_684  # of the UNets
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def vae(sample_size: int = 512) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    return AutoencoderKL(**blocks, **sizes, sample_size=sample_size)


def text_config(width: int = 768, layers: int = 12, **more: Any) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return CLIPTextConfig(vocab_size=49408, **sizes, num_attention_heads=width // 64, **more)


def tokenizer() -> CLIPTokenizer:
    """The bundled model's, with its small vocabulary, in the place of CLIP's."""
    return CLIPTokenizer.from_pretrained(ROOT / "demo/tiny-stable-diffusion", subfolder="tokenizer")


def write_random_sd15(path: Path) -> None:
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**SD15_UNET),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def write_random_xl(path: Path) -> None:
    """SDXL base 1.0 in fp16, as most of its checkpoints are."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    StableDiffusionXLPipeline(
        vae=vae(1024),
        text_encoder=CLIPTextModel(text_config(projection_dim=768, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(1280, 32, projection_dim=1280, hidden_act="gelu")),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(**XL_UNET),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(path)
