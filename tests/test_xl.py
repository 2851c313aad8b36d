"""SDXL: two text encoders, pooled embedding, sizes and crops, through all scripts, with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

import text2images
import train_text_to_image_qat as trainer
from conftest import BETAS, SIZE, run_command, tiny_xl_pipeline, training_in_process
from models import BOTH, edit, generate_image, load, psnr, refusal, save


@pytest.fixture
def train_xl(xl_dir: Path, data_dir: Path) -> Iterator[Callable[..., dict]]:
    with training_in_process(xl_dir, data_dir) as run:
        yield run


def trainer_pipeline(xl_dir: Path) -> trainer.Pipeline:
    return load(trainer, xl_dir)


# ---------------------------------------------------------------- the whole way


def test_commands_of_the_original_readme(xl_dir: Path, tmp_path: Path) -> None:
    pairs, output, caption = tmp_path / "pairs", tmp_path / "out", "a photo of an astronaut riding a horse on mars"
    made = run_command(sys.executable, "demo/scenes.py", "--output_dir", pairs, "--count", "8", "--size", "40")
    assert made.returncode == 0
    assert run_command(sys.executable, "create_metadata.py", "--image_path", pairs).returncode == 0
    flags = "--use_ema --center_crop --random_flip --train_batch_size=4 --gradient_accumulation_steps=1 "
    flags += "--gradient_checkpointing --max_train_steps=2 --learning_rate=1e-05 --max_grad_norm=1 "
    flags += "--lr_scheduler=constant --lr_warmup_steps=0 --use_cpu --calibration_steps=4"
    model = ["--pretrained_model_name_or_path", xl_dir]
    command = ["accelerate", "launch", "train_text_to_image_qat.py", *model, "--train_data_dir", pairs]
    trained = run_command(*command, *flags.split(), f"--output_dir={output}")
    assert trained.returncode == 0
    payload = torch.load(output / "quant_model.pt", weights_only=True)
    assert payload["pipeline"] == "StableDiffusionXLPipeline" and payload["training"]["steps"] == 2
    assert payload["state_dict"]["add_embedding.linear_1.weight"].dtype == torch.float16
    for name, extra in (("fp32", []), ("int8", ["-qm", output])):
        short = ["--captions", caption, "--num_inference_steps", "5", "--output_dir", tmp_path / name]
        assert run_command(sys.executable, "text2images.py", *model, *extra, *short).returncode == 0
    compared = run_command(sys.executable, "evaluate.py", tmp_path / "fp32", tmp_path / "int8", "--min_psnr", "41")
    assert compared.returncode == 0 and "1 pairs" in compared.stdout
    with Image.open(next((tmp_path / "int8").glob("*seed 42.png"))) as image:
        assert image.size == (SIZE, SIZE)  # what the checkpoint was made for, in training as in generating


def test_resumed_run_ends_with_the_same_bits(train_xl, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "4", "--use_ema", "--random_flip", "--learning_rate", "3e-2"]
    flags += ["--checkpointing_steps", "2", "--validation_prompts", "a hill", "--validation_steps", "4"]
    whole = train_xl(tmp_path, *flags)
    with Image.open(tmp_path / "validation/step-000004-prompt-0.png") as image:
        pixels = np.asarray(image, dtype=float)
    assert (
        pixels.shape == (SIZE, 2 * SIZE, 3) and 0 < np.abs(pixels[:, :SIZE] - pixels[:, SIZE:]).mean() < 12
    )  # levels; it is 6
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4.partial")
    resumed = train_xl(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert whole["checksum"] == resumed["checksum"]
    assert whole["training"]["losses"] == resumed["training"]["losses"]


def test_cached_latents_train_the_same_model(train_xl, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "3", "--center_crop", "--random_flip", "--train_batch_size", "1"]
    plain = train_xl(tmp_path / "plain", *flags)
    cached = train_xl(tmp_path / "cached", *flags, "--cache_latents")
    assert plain["checksum"] == cached["checksum"]
    (folder,) = (tmp_path / "cached").glob("latents-*")
    for file in folder.iterdir():
        told = torch.load(file, weights_only=True)
        assert told["encoder_hidden_states"].shape == (77, 80) and told["time_ids"].shape == (6,)
        assert ("emptied" in file.name) == (told["text_embeds"].abs().sum() == 0)


def test_streamed_pairs_train(train_xl, data_dir: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for file in sorted(data_dir.glob("*.jpg")):
            tar.add(file, file.name)
            (tmp_path / "caption.txt").write_text(file.stem)
            tar.add(tmp_path / "caption.txt", f"{file.stem}.txt")
    flags = ["--train_data_dir", str(tmp_path), "--streaming", "--max_train_steps", "1"]
    assert train_xl(tmp_path / "out", *flags)["training"]["steps"] == 1


# ---------------------------------------------------------------- what the UNet is told


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_does_it(xl_dir: Path) -> None:
    """With guidance the half without caption is zeros, and so are captions that training empties."""
    pipeline, theirs = trainer_pipeline(xl_dir), load(text2images, xl_dir)
    embeddings, without, pooled, pooled_without = theirs.encode_prompt("a hill", device="cpu")
    args = trainer.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y"])
    ids = trainer.CaptionedImages([], pipeline.tokenizers, args).tokenize(["a hill", ""])
    assert ids.shape == (2, 2, 77) and not torch.equal(ids[:, 0], ids[:, 1])  # the second one pads with "!"
    batch = {"pixel_values": torch.zeros(2, 3, SIZE, SIZE), "input_ids": ids, "time_ids": torch.ones(2, 6)}
    _, told = trainer.encode(pipeline, batch | {"emptied": torch.tensor([False, True])}, torch.device("cpu"))
    for name, expected in {
        "encoder_hidden_states": (embeddings, without),
        "text_embeds": (pooled, pooled_without),
    }.items():
        assert torch.allclose(told[name], torch.cat(expected), atol=1e-5) and told[name][0].abs().sum() > 0
    assert torch.equal(told["time_ids"], batch["time_ids"])
    pipeline.index["force_zeros_for_empty_prompt"] = False
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    without, pooled_without = theirs.encode_prompt("a hill", device="cpu")[1::2]
    _, told = trainer.encode(pipeline, batch | {"emptied": torch.tensor([False, True])}, torch.device("cpu"))
    assert torch.allclose(told["encoder_hidden_states"][1], without[0], atol=1e-5) and without.abs().sum() > 0
    assert torch.allclose(told["text_embeds"][1], pooled_without[0], atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_size_and_crop_are_those_of_the_real_crop(mirrored: bool) -> None:
    """An image whose red says its column and green its row: the crop's first pixel is where the ids say."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))
    expected = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
    for position in ((0, 0), (0.3, 0.5), (1, 1)):
        square, time_ids = trainer.crop_to_square(image, 50, position, mirrored)
        assert time_ids[:2] == [100, 200] and time_ids[4:] == [50, 50]
        top, left = time_ids[2:4]
        scaled = expected.resize((100, 50), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(scaled, int)[top : top + 50, left : left + 50] - np.asarray(square, int)).max() <= 2
    tall = trainer.crop_to_square(Image.new("RGB", (50, 200)), 25, (0.5, 0.5))[1]
    assert tall == [200, 50, 38, 0, 25, 25]


def test_the_unet_hears_of_caption_and_size(xl_dir: Path) -> None:
    pipeline = trainer_pipeline(xl_dir)
    generator = torch.Generator().manual_seed(0)
    told = {"text_embeds": torch.randn(2, 40, generator=generator), "time_ids": torch.full((2, 6), 32.0)}
    words = torch.randn(2, 77, 80, generator=generator)
    latents = torch.randn(2, 4, SIZE // 2, SIZE // 2, generator=generator)
    noised = trainer.NoisedBatch(
        latents, torch.tensor([9, 900]), {"encoder_hidden_states": words, "added_cond_kwargs": told}, latents, latents
    )
    with torch.no_grad():
        before = noised.predict(pipeline.unet)
        for name in told:
            noised.conditioning["added_cond_kwargs"] = told | {name: told[name] + 7}
            assert not torch.allclose(noised.predict(pipeline.unet), before, atol=1e-4), name


# ---------------------------------------------------------------- generating


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("flags", [[], ["--negative_prompt", "rain"], ["--guidance_scale", "1"], ["--clip_skip", "1"]])
def test_int8_generates_what_fp32_generates(
    xl_dir: Path, xl_quant_model: Path, tmp_path: Path, flags: list[str], engine: str
) -> None:
    fp32 = generate_image(xl_dir, tmp_path / "fp32", *flags)
    int8 = generate_image(xl_dir, tmp_path / "int8", "-qm", str(xl_quant_model), *flags, "--engine", engine)
    assert fp32.shape == (SIZE, SIZE, 3) and psnr(int8, fp32) > 43
    row = json.loads((tmp_path / "int8/results.jsonl").read_text())
    assert row["paired_guidance"] == ("--guidance_scale" not in flags)


def test_fp32_images_are_those_of_diffusers(xl_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    ours = generate_image(xl_dir, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_dir, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, SIZE // 2, SIZE // 2), generator=torch.Generator().manual_seed(42))
    settings = {"num_inference_steps": 6, "guidance_scale": 7.5, "latents": latents, "output_type": "pil"}
    (theirs,) = pipeline("a hill", height=SIZE, width=SIZE, **settings).images
    assert psnr(ours, np.asarray(theirs, dtype=float)) > 50


def test_a_turbo_checkpoint_trains_and_generates_one_step_without_guidance(data_dir: Path, tmp_path: Path) -> None:
    """SDXL Turbo: Euler a, trailing timesteps, guidance 0."""
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    tiny_xl_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "model")
    with training_in_process(tmp_path / "model", data_dir) as run:
        run(tmp_path / "out", "--max_train_steps", "1")
    flags = ["--num_inference_steps", "1", "--guidance_scale", "0"]
    fp32 = generate_image(tmp_path / "model", tmp_path / "fp32", *flags)
    assert psnr(generate_image(tmp_path / "model", tmp_path / "int8", *flags, "-qm", str(tmp_path / "out")), fp32) > 44


# ---------------------------------------------------------------- what is refused


def test_a_file_for_the_other_kind_of_pipeline_is_refused(
    xl_dir: Path, model_dir: Path, xl_quant_model: Path, quant_model: Path
) -> None:
    refused = refusal(text2images, model_dir, "-qm", str(xl_quant_model))
    assert "whose UNet has down_block_types" in refused and f"that of -m {model_dir} has" in refused
    refused = refusal(text2images, xl_dir, "-qm", str(quant_model))
    assert "whose UNet has down_block_types" in refused and f"that of -m {xl_dir} has" in refused


@BOTH
def test_parts_that_do_not_fit_each_other_are_refused(script: Any, xl_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(xl_dir, tmp_path / "model"))
    edit(model / "unet/config.json", addition_time_embed_dim=4)
    assert "CLIPTextModelWithProjection, makes text_embeds [1, 40] of a caption, its UNet reads [1, 64]" in refusal(
        script, model
    )
    edit(model / "unet/config.json", addition_time_embed_dim=8)
    edit(model / "tokenizer_2/tokenizer_config.json", model_max_length=20)
    assert "its tokenizers make 77 and 20 tokens" in refusal(script, model)
    edit(model / "tokenizer_2/tokenizer_config.json", model_max_length=77)
    edit(model / "vae/config.json", latents_mean=[0.0] * 4)
    assert "its VAE shifts its latents" in refusal(script, model)
    edit(model / "model_index.json", text_encoder=[None, None])
    assert "its text_encoder is None" in refusal(script, model)  # the refiner's
    whole = tiny_xl_pipeline()
    folder = save(tmp_path / "mixed", unet=whole.unet)
    assert "its UNet reads [1, 77, 80]" in refusal(script, folder)
    shutil.rmtree(model / "text_encoder_2")
    edit(model / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    assert "it has no folder text_encoder_2" in refusal(script, model)


def test_a_file_of_full_size_is_within_the_reader_s_limits(tmp_path: Path) -> None:
    """SDXL's has 4,290 tensors: 794 layers of six each and what lies between them."""
    names = [f"up_blocks.0.attentions.0.transformer_blocks.{number}.attn1.to_q.weight_scale" for number in range(4290)]
    torch.save({"state_dict": {name: torch.zeros(1) for name in names}}, tmp_path / "quant_model.pt")
    text2images.check_pickle(tmp_path / "quant_model.pt")
