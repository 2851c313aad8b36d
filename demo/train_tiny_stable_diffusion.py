#!/usr/bin/env python
"""Train the bundled Stable Diffusion from nothing: VAE, tokenizer, text encoder, UNet.

Reads nothing: it draws its own images with scenes.py. Writes a diffusers
StableDiffusionPipeline folder (64x64 images, under 40 MB). About an hour and a half on
2 CPU cores; every stage is kept in --work_dir, and the same command goes on where it stopped.

    python demo/train_tiny_stable_diffusion.py --output_dir demo/tiny-stable-diffusion

Next: python demo/check_scenes.py --pretrained_model_name_or_path demo/tiny-stable-diffusion
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scenes import make_pair

SIZE = 64  # pixels; the VAE makes 16x16 latents of it
MAX_TOKENS = 77  # as in CLIP


# ---------------------------------------------------------------- data


def draw_images(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """`count` images as uint8 [N, 3, 64, 64], and their captions."""
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    captions = []
    with multiprocessing.Pool() as pool:
        pairs = pool.imap(partial(make_pair, seed=seed, size=SIZE), range(count), chunksize=64)
        for index, (caption, _, image) in enumerate(tqdm(pairs, total=count, desc="images")):
            images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            captions.append(caption)
    return images, captions


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero at the last step; as a fraction of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_state(path: Path, state: dict) -> None:
    torch.save(state, f"{path}.partial")
    os.replace(f"{path}.partial", path)


# ---------------------------------------------------------------- the VAE


def new_vae() -> AutoencoderKL:
    """An f=4 autoencoder: at this size the f=8 one of Stable Diffusion takes many times the steps to learn."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)
    # begin with almost no noise on the latents: at a standard deviation of 1 it would hide them for long
    torch.nn.init.zeros_(vae.quant_conv.weight[4:])
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -7.0)
    return vae


def train_vae(images: torch.Tensor, args: argparse.Namespace) -> AutoencoderKL:
    """Absolute and squared error of the pixels, with a slight pull of the latents towards N(0, 1)."""
    vae, path = new_vae(), args.work_dir / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), fused=True)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    progress = tqdm(range(first, args.vae_steps), desc="VAE", mininterval=5)
    for step in progress:
        rng = torch.Generator().manual_seed(step)
        pixels = to_pixel_values(images[torch.randint(len(images), (16,), generator=rng)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
            error = vae.decode(latents).sample.float() - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean() / latents[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.vae_learning_rate * learning_rate(step, args.vae_steps)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(psnr=f"{10 * math.log10(4 / error.square().mean().item()):.1f}")
        if (step + 1) % 200 == 0 or step + 1 == args.vae_steps:
            save_state(path, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 4, 16, 16] of standard deviation 1; sets the VAE's scaling factor to make them so."""
    batches = tqdm(images.split(32), desc="latents", mininterval=5)
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(to_pixel_values(batch)).latent_dist.mean.float() for batch in batches])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor


# ---------------------------------------------------------------- tokenizer and text encoder


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding with a vocabulary of this demo's own words; any other text falls back to bytes."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2000, min_frequency=50, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    # the trainer knows a letter at the end of a word only where it has seen one: add the other bytes
    pieces = list(alphabet) + [letter + "</w>" for letter in alphabet]
    learned = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    pieces += [piece for piece in learned if piece not in set(pieces)]
    vocabulary = {piece: index for index, piece in enumerate(pieces + specials)}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# ---------------------------------------------------------------- the UNet


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet, small: the same kinds of layers, so that what holds here can hold there."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=(2, 4, 6),  # diffusers' name for the number of heads of each block
        norm_num_groups=16,
        time_embedding_dim=96,
    ).to(memory_format=torch.channels_last)


class Fp32Attention:
    """Attention in fp32 under autocast: its backward pass in bf16 is three times slower on CPUs."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def train_unet(latents: torch.Tensor, input_ids: torch.Tensor, scheduler: DDIMScheduler, models: dict, args) -> None:
    """Epsilon prediction with min-SNR weights (gamma 5, arXiv 2303.09556); UNet and text encoder learn together."""
    unet, text_encoder, path = models["unet"], models["text_encoder"], args.work_dir / "unet.pt"
    processors = unet.attn_processors
    unet.set_attn_processor(Fp32Attention())
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.unet_learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(parameters, decay=0.999)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name in models:
            models[name].load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    empty_prompt = input_ids[-1]
    progress = tqdm(range(first, args.unet_steps), desc="UNet", mininterval=5)
    average = None
    for step in progress:
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (args.batch_size,), generator=rng)
        clean, tokens = latents[rows], input_ids[rows].clone()
        tokens[torch.rand(len(rows), generator=rng) < 0.1] = empty_prompt  # for classifier-free guidance
        noise = torch.randn(clean.shape, generator=rng)
        # one timestep from each of batch_size equal slices: less noise in the loss than independent draws
        slices = (torch.arange(len(rows)) + torch.rand(len(rows), generator=rng)) / len(rows)
        timesteps = (slices * scheduler.config.num_train_timesteps).long()
        noisy_latents = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            encoder_hidden_states = text_encoder(tokens)[0]
            prediction = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        snr = compute_snr(scheduler, timesteps)
        error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (error * snr.clamp(max=5.0) / snr).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.unet_learning_rate * learning_rate(step, args.unet_steps)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == args.unet_steps:
            states = {name: model.state_dict() for name, model in models.items()}
            save_state(path, {**states, "optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "step": step + 1})
            average_models = copy.deepcopy(models)
            ema.copy_to([*average_models["unet"].parameters(), *average_models["text_encoder"].parameters()])
            average_models["unet"].set_attn_processor(dict(processors))
            yield average_models


# ---------------------------------------------------------------- the flow


def save_pipeline(models: dict, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scheduler, output_dir: Path) -> None:
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{name: model.eval() for name, model in models.items()},
    )
    pipeline.save_pretrained(partial_dir)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial_dir.rename(output_dir)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the pipeline folder to write")
    parser.add_argument("--work_dir", type=Path, default=Path("demo/work"), help="where an interrupted run is kept")
    parser.add_argument("--images", type=int, default=12000, help="number of images to draw and learn from")
    parser.add_argument("--vae_steps", type=int, default=1800)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--unet_steps", type=int, default=3300)
    parser.add_argument("--unet_learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step of the UNet")
    parser.add_argument("--seed", type=int, default=1, help="of the images and of the first weights")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images, captions = draw_images(args.images, args.seed)
    vae = train_vae(images, args)
    latents = encode(vae, images)
    tokenizer = train_tokenizer(captions)
    input_ids = tokenize(tokenizer, [*captions, ""])  # the last row is the empty prompt
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    models = {"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}
    for average_models in train_unet(latents, input_ids, scheduler, models, args):
        save_pipeline(average_models, vae, tokenizer, scheduler, args.output_dir)
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(f"{args.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
