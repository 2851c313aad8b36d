"""Checkpoints as people have them: parts of other classes, damaged ones, variants, samplers, sizes; in both scripts."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel, VQModel
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextModelWithProjection

import text2images
import train_text_to_image_qat as trainer
from conftest import BETAS, ROOT, SIZE, run_command, tiny_pipeline
from models import BOTH, cut, edit, generate_image, load, make_pointer, psnr, refusal, save


@pytest.fixture
def checkpoint(model_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(model_dir, tmp_path / "checkpoint"))


def test_both_scripts_load_a_checkpoint_by_the_same_lines() -> None:
    names = "checkpoint_name load_index no_checkpoint load_part variants part_problem load_unet_config check_parts"
    names += " check_tokenizer is_xl text_parts text_encoders make_pipeline encode_captions size_made_for"
    names += " hub_options is_single_file settings_source single_file_kind from_single_file aligned"
    names += " lora_argument sha256 fuse_loras load_lora"
    for name in [*names.split(), "first_line", "has_betas", "is_lfs_pointer"]:
        assert inspect.getsource(getattr(trainer, name)) == inspect.getsource(getattr(text2images, name)), name
    for name in (
        "PIPELINES",
        "TEXT_PARTS",
        "CONDITIONING",
        "VAES",
        "TEST_WORDS",
        "SINGLE_FILES",
        "LFS_START",
        "LFS_POINTER",
    ):
        assert getattr(trainer, name) == getattr(text2images, name)


# ---------------------------------------------------------------- classes of the parts


@BOTH
@pytest.mark.parametrize(
    ("part", "named", "message"),
    [
        ("text_encoder", ["transformers", "NoSuchEncoder"], "its text_encoder is transformers.NoSuchEncoder"),
        ("text_encoder", ["my_code", "Encoder"], "its text_encoder is my_code.Encoder"),
        ("vae", ["diffusers", "VQModel"], "its vae is diffusers.VQModel, not AutoencoderKL"),
        ("unet", ["diffusers", "UNet2DModel"], "its unet is diffusers.UNet2DModel, not UNet2DConditionModel"),
        ("tokenizer", [None, None], "its tokenizer is None"),
    ],
)
def test_a_class_that_cannot_work_is_refused(
    script: ModuleType, checkpoint: Path, part: str, named: list, message: str
) -> None:
    edit(checkpoint / "model_index.json", **{part: named})
    refused = refusal(script, checkpoint)
    assert message in refused and "cannot be used here" in refused


@BOTH
def test_a_pipeline_of_another_kind_is_refused_and_one_of_the_same_parts_loads(
    script: ModuleType, checkpoint: Path
) -> None:
    edit(checkpoint / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    load(script, checkpoint)
    edit(checkpoint / "model_index.json", _class_name="StableDiffusion3Pipeline")
    assert "is a StableDiffusion3Pipeline; only Stable Diffusion 1.x, 2.x and XL" in refusal(script, checkpoint)
    edit(checkpoint / "unet/config.json", class_embed_type="timestep")
    edit(checkpoint / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "wants more than a caption (class_embed_type)" in refusal(script, checkpoint)


def bert_parts(width: int = 32, words: int = 16) -> dict[str, Any]:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "hill", "cat", "house", "sky", "##s"]
    config = BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.max_position_embeddings = 24
    torch.manual_seed(0)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    return {"text_encoder": BertModel(config).eval(), "tokenizer": tokenizer}


def test_another_text_encoder_and_vae_train_and_generate(train, tmp_path: Path) -> None:
    """A BERT whose tokenizer names no length, and a VAE without a distribution."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    folder = save(tmp_path / "model", vae=vae, **bert_parts())
    tokenizers = load(trainer, folder).tokenizers[0], load(text2images, folder).tokenizer
    assert [tokenizer.model_max_length for tokenizer in tokenizers] == [24, 24]
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(folder), "--max_train_steps", "1")
    int8 = generate_image(folder, tmp_path / "int8", "-qm", str(tmp_path / "out"))
    assert psnr(int8, generate_image(folder, tmp_path / "fp32")) > 40


@BOTH
def test_parts_that_do_not_fit_each_other_are_refused(script: ModuleType, tmp_path: Path) -> None:
    assert "ids up to 10, its text encoder reads 9" in refusal(script, save(tmp_path / "a", **bert_parts(words=9)))
    wide = save(tmp_path / "b", **bert_parts(width=64))
    assert "BertModel, makes encoder_hidden_states [1, 24, 64] of a caption, its UNet reads [1, 24, 32]" in refusal(
        script, wide
    )
    whole = tiny_pipeline()
    projecting = CLIPTextModelWithProjection(whole.text_encoder.config)
    inpainting = UNet2DConditionModel(**(dict(whole.unet.config) | {"in_channels": 9}))
    assert "takes and gives other numbers of channels" in refusal(script, save(tmp_path / "d", unet=inpainting))
    assert "CLIPTextModelWithProjection, makes encoder_hidden_states [1, " in refusal(
        script, save(tmp_path / "c", text_encoder=projecting)
    )


@BOTH
def test_a_tokenizer_that_lost_its_merges_or_its_length(script: ModuleType, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "demo/tiny-stable-diffusion", tmp_path / "model")
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=0)
    loaded = load(script, folder, *(["--resolution", "64"] if script is trainer else []))
    assert (loaded.parts["tokenizer"] if script is trainer else loaded.tokenizer).model_max_length == 77
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer spells the words that it has" in refusal(script, folder)


@BOTH
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vae/config.json", {"scaling_factor": None}, "its VAE names no scaling_factor"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_image_proj"}, "more than a caption (encoder_hid_dim_type)"),
        ("model_index.json", {"vae": "AutoencoderKL"}, "its vae is None"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    script: ModuleType, checkpoint: Path, part: str, changes: dict, message: str
) -> None:
    edit(checkpoint / part, **changes)
    assert message in refusal(script, checkpoint)


def test_weights_that_are_not_finite_end_the_calibration(train, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, name in (("vae", "VAE"), ("text_encoder", "text encoder"), ("unet", "UNet")):
        folder = shutil.copytree(checkpoint, tmp_path / part)
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file({key: tensor * float("nan") for key, tensor in tensors.items()}, file, {"format": "pt"})
        with pytest.raises(trainer.UsageError, match=f"{name} gives values that are not finite"):
            train(tmp_path / "out", "--pretrained_model_name_or_path", str(folder), "--max_train_steps", "0")
        assert not (tmp_path / "out/quant_model.pt").exists()


@BOTH
def test_a_tokenizer_without_vocabulary_is_refused(script: ModuleType, checkpoint: Path) -> None:
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    assert "its tokenizer knows no words" in refusal(script, checkpoint)


def test_textual_inversion_of_several_vectors_is_tokenized_as_the_pipeline_does(tmp_path: Path) -> None:
    whole = tiny_pipeline()
    whole.tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    whole.text_encoder.resize_token_embeddings(len(whole.tokenizer))
    folder = save(tmp_path / "model", text_encoder=whole.text_encoder, tokenizer=whole.tokenizer)
    pipeline = load(trainer, folder)
    args = trainer.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y"])
    ids = trainer.CaptionedImages([], pipeline.tokenizers, args).tokenize(["a <cat> on a hill"])
    added = pipeline.tokenizers[0].convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
    assert [token for token in ids[0, 0].tolist() if token in added] == added
    expected = load(text2images, folder).encode_prompt("a <cat> on a hill", "cpu", 1, False)[0]
    assert torch.allclose(trainer.text_encoders(pipeline.parts)[0](ids[:, 0])[0], expected, atol=1e-5)


@pytest.mark.parametrize("weight", ["--feature_kd_weight", "--task_weight"])
def test_a_unet_without_mid_block_trains_and_generates(train, tmp_path: Path, weight: str) -> None:
    config = {key: value for key, value in tiny_pipeline().unet.config.items() if not key.startswith("_")}
    folder = save(tmp_path / "model", unet=UNet2DConditionModel(**(config | {"mid_block_type": None})))
    flags = ["--max_train_steps", "1", weight, "0.1", "--validation_prompts", "a", "--gradient_checkpointing"]
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(folder), *flags, "--use_ema")
    int8 = generate_image(folder, tmp_path / "int8", "-qm", str(tmp_path / "out"))
    assert psnr(int8, generate_image(folder, tmp_path / "fp32")) > 40


# ---------------------------------------------------------------- files that are not what they should be


def drop_tensors(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "0" not in name}, file, {"format": "pt"})


@BOTH
@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "its {} is damaged or incomplete"),
        (make_pointer, "is a pointer of Git LFS, not the file itself: git lfs pull brings it"),
        (lambda file: file.write_bytes(b""), "is empty: copy it again"),
        (lambda file: file.unlink(), "its {} has no weights"),
        (drop_tensors, "its {} is damaged or incomplete (it lacks "),
        (lambda file: shutil.rmtree(file.parent), "it has no folder {}"),
        (lambda file: (file.parent / "config.json").write_text("{"), "its {} is damaged or incomplete"),
        (lambda file: (file.parent / "config.json").write_text("[7]"), "its {} is damaged or incomplete"),
    ],
)
def test_damaged_parts_are_named(
    script: ModuleType, checkpoint: Path, part: str, spoil: Callable[[Path], None], message: str
) -> None:
    (weights,) = (checkpoint / part).glob("*.safetensors")
    spoil(weights)
    refused = refusal(script, checkpoint)
    assert message.format(part) in refused and part in refused and str(checkpoint) in refused


@BOTH
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", "{", "model_index.json is damaged"),
        ("model_index.json", "[]", "model_index.json is damaged"),
        ("tokenizer/tokenizer.json", "{", "its tokenizer is damaged"),
        ("scheduler/scheduler_config.json", "{", "its scheduler is damaged"),
        ("scheduler/scheduler_config.json", "", "scheduler/scheduler_config.json is empty"),
    ],
)
def test_damaged_texts_are_named(script: ModuleType, checkpoint: Path, file: str, text: str, message: str) -> None:
    (checkpoint / file).write_text(text)
    assert message in refusal(script, checkpoint)


@BOTH
def test_a_path_that_is_no_checkpoint_gets_the_remedy_that_fits(
    script: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    assert f"give {checkpoint}" in refusal(script, tmp_path)
    assert f"give the whole, {checkpoint}" in refusal(script, checkpoint / "unet")
    (checkpoint / "model_index.json").unlink()
    assert "no model_index.json in it" in refusal(script, checkpoint)
    for name in ("model.safetensors", str(tmp_path / "model.ckpt")):
        assert "no such file" in refusal(script, name)
    (tmp_path / "model.ckpt").touch()
    assert "a pickle, which could run code; where you trust it" in refusal(script, tmp_path / "model.ckpt")
    (checkpoint / "there.safetensors").touch()
    assert f"give the file in it, {checkpoint / 'there.safetensors'}" in refusal(script, checkpoint)
    assert "no such folder" in refusal(script, tmp_path / "gone")
    assert "no such folder" in refusal(script, "owner/nothing-of-this-name")
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").touch()
    assert f"give {snapshot}" in refusal(script, snapshot.parents[1])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    commands = {
        "text2images.py": ["-m", tmp_path, "-c", "a"],
        "train_text_to_image_qat.py": ["--pretrained_model_name_or_path", tmp_path, "--train_data_dir", tmp_path],
    }
    (tmp_path / "model_index.json").write_text("{")
    for script, flags in commands.items():
        debug = run_command(sys.executable, script, *flags, "--output_dir", tmp_path / "out", "--debug")
        assert debug.returncode == 2 and "JSONDecodeError" in debug.stderr
        assert "model_index.json is damaged" in debug.stderr.splitlines()[-1]


# ---------------------------------------------------------------- variants


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Weights of variant fp16 alone."""
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    return tmp_path / "half"


@BOTH
def test_variants_are_loaded_named_and_fallen_back_from(
    script: ModuleType, half: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load(script, half, "--variant", "fp16")
    assert "has only the variant fp16: give --variant fp16" in refusal(script, half)
    assert "has only the variant fp16" in refusal(script, half, "--variant", "bf16")
    for part in ("vae", "text_encoder"):  # of which there are plain weights alone
        shutil.rmtree(half / part)
        shutil.copytree(model_dir / part, half / part)
    load(script, half, "--variant", "fp16")
    assert caplog.text.count("has no variant fp16: its plain weights are used") == 2
    (weights,) = (half / "vae").glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    cut(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "its vae is damaged" in refusal(script, half, "--variant", "fp16")  # no falling back from damage


@BOTH
def test_a_cache_of_the_hub_that_holds_one_variant_only(script: ModuleType, half: Path, tmp_path: Path) -> None:
    """Without a network, it is all there is."""
    repository = tmp_path / "cache/models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(half, repository / "snapshots" / ("0" * 40))
    flags = ["--cache_dir", str(tmp_path / "cache")]
    load(script, "owner/name", *flags, "--variant", "fp16")
    for asked in ([], ["--variant", "bf16"]):
        told = refusal(script, "owner/name", *flags, *asked)
        assert re.search("its (vae|text_encoder) is in the cache only as the variant fp16: give --variant fp16", told)


def test_the_printed_next_command_generates_what_was_trained(
    train, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    checkpoint = half.rename(tmp_path / "it's half")
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--variant", "fp16", "--max_train_steps", "0"]
    train(tmp_path / "out put", *flags)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("next: ")]
    command = shlex.split(line.removeprefix("next: "))
    assert command[0] == "python"
    generated = run_command(*command, "--output_dir", tmp_path / "images", "--num_inference_steps", "2")
    assert generated.returncode == 0 and list((tmp_path / "images").glob("*.png"))


def test_the_next_command_names_what_the_checkpoint_does_not(train, checkpoint: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    edit(checkpoint / "unet/config.json", sample_size=None)
    edit(checkpoint / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(checkpoint), "--max_train_steps", "0")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("next: ")]
    assert f"--height={SIZE} --width={SIZE} --disable_safety_checker" in line
    flags = shlex.split(line.removeprefix("next: "))[2:]
    text2images.main([*flags, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "images")])


# ---------------------------------------------------------------- samplers


def saved_scheduler(source: str, how: str, folder: Path) -> Any:
    """As a checkpoint has it that was saved with this sampler, made of the betas alone or out of another's settings."""
    kind = getattr(diffusers, text2images.SCHEDULERS[source])
    (kind(**BETAS) if how == "betas" else kind.from_config(tiny_pipeline().scheduler.config)).save_pretrained(folder)
    return kind.from_pretrained(folder)


def chosen(saved: Any, choice: str) -> Any:
    args = text2images.parse_args(["-m", "x", "-c", "y", "--scheduler", choice, "--num_inference_steps", "9"])
    scheduler = text2images.choose_scheduler(saved, args)
    scheduler.set_timesteps(9)
    return scheduler


@pytest.mark.parametrize("how", ["betas", "settings"])
@pytest.mark.parametrize("source", text2images.SCHEDULERS)
def test_whatever_sampler_a_checkpoint_was_saved_with_the_chosen_one_is_the_same(
    source: str, how: str, tmp_path: Path
) -> None:
    base, saved = tiny_pipeline().scheduler, saved_scheduler(source, how, tmp_path)
    for choice in text2images.SCHEDULERS:
        ours, expected = chosen(saved, choice), chosen(base, choice)
        settings = [{key: value for key, value in s.config.items() if key[0] != "_"} for s in (ours, expected)]
        assert settings[0] == settings[1], choice
        assert torch.equal(ours.timesteps, expected.timesteps), choice


def test_a_sampler_over_another_generates_the_image_of_the_base(model_dir: Path, tmp_path: Path) -> None:
    for choice in text2images.SCHEDULERS:
        expected = generate_image(model_dir, tmp_path / choice, "--scheduler", choice)
        if choice == "ddim":  # the base's own settings are those of Stable Diffusion
            assert psnr(generate_image(model_dir, tmp_path / "own"), expected) > 60
        for source in ("euler", "pndm", "lcm"):
            folder = shutil.copytree(model_dir, tmp_path / f"{source} for {choice}")
            edit(folder / "model_index.json", scheduler=["diffusers", text2images.SCHEDULERS[source]])
            saved_scheduler(source, "betas", folder / "scheduler")
            assert psnr(generate_image(folder, folder / "images", "--scheduler", choice), expected) > 35, (
                source,
                choice,
            )


def test_what_the_unet_was_trained_with_goes_over_and_nothing_else() -> None:
    trained = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    saved = diffusers.DDIMScheduler(**BETAS, **trained, clip_sample=True, thresholding=True)
    config = chosen(saved, "euler").config
    assert {key: config[key] for key in trained} == trained and config.beta_end == 0.012
    assert not chosen(saved, "dpm++").config.thresholding and chosen(saved, "pndm").config.skip_prk_steps


@pytest.mark.parametrize("choice", ["ddim", "pndm", "dpm++", "unipc"])
def test_more_steps_than_the_sampler_has_are_refused(checkpoint: Path, choice: str) -> None:
    message = refusal(text2images, checkpoint, "--scheduler", choice, "--num_inference_steps", "1000")
    assert "cannot take 1000 steps" in message and "give fewer --num_inference_steps" in message


def test_a_sampler_that_cannot_take_what_the_unet_predicts_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "scheduler/scheduler_config.json", prediction_type="sample")
    refused = refusal(text2images, checkpoint, "--scheduler", "pndm")
    assert "PNDMScheduler cannot take 50 steps with this checkpoint" in refused
    edit(checkpoint / "scheduler/scheduler_config.json", prediction_type="epsilon", beta_schedule="sigmoid")
    edit(checkpoint / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    assert "--scheduler euler: sigmoid is not impl" in refusal(text2images, checkpoint, "--scheduler", "euler")


def test_samplers_that_cannot_are_refused_in_one_line(checkpoint: Path) -> None:
    few = refusal(text2images, checkpoint, "--scheduler", "lcm", "--num_inference_steps", "51")
    assert "cannot take 51 steps" in few and "50" in few
    diffusers.EDMEulerScheduler().save_pretrained(checkpoint / "scheduler")
    edit(checkpoint / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    assert "has no betas" in refusal(text2images, checkpoint, "--scheduler", "ddim")
    assert "has no betas" in refusal(trainer, checkpoint)
    (checkpoint / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    edit(checkpoint / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert "has no betas" in refusal(text2images, checkpoint, "--scheduler", "ddim")
    assert "has no betas" in refusal(trainer, checkpoint)
    diffusers.LCMScheduler(**BETAS, original_inference_steps=20).save_pretrained(checkpoint / "scheduler")
    edit(checkpoint / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    load(trainer, checkpoint)
    assert "LCMScheduler cannot do 30 steps" in refusal(trainer, checkpoint, "--validation_prompts", "a")


# ---------------------------------------------------------------- clip skip


def test_clip_skip_leaves_out_layers_as_diffusers_counts(model_dir: Path, tmp_path: Path) -> None:
    pipeline = load(text2images, model_dir, "--clip_skip", "1")
    ids = pipeline.tokenizer("a hill", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    expected = pipeline.text_encoder.final_layer_norm(hidden)
    assert torch.allclose(pipeline.encode_prompt("a hill", "cpu", 1, False, clip_skip=1)[0], expected, atol=1e-5)
    names = [name for name, _ in pipeline.text_encoder.named_modules()]
    assert not any("text_model" in name for name in names)  # it is no module of its own
    plain, none = (generate_image(model_dir, tmp_path / name, *flags) for name, flags in
                   {"plain": [], "none": ["--clip_skip", "0"]}.items())  # fmt: skip
    assert psnr(plain, none) > 60 > psnr(plain, generate_image(model_dir, tmp_path / "one", "--clip_skip", "1"))
    assert json.loads((tmp_path / "one/results.jsonl").read_text())["clip_skip"] == 1


def test_clip_skip_that_cannot_work_is_refused(model_dir: Path, tmp_path: Path) -> None:
    assert "--clip_skip 2: the text encoder has 2 layers" in refusal(text2images, model_dir, "--clip_skip", "2")
    bert = save(tmp_path / "bert", **bert_parts())
    assert "--clip_skip is for CLIP" in refusal(text2images, bert, "--clip_skip", "1")


# ---------------------------------------------------------------- sizes and guidance


@pytest.mark.parametrize(
    ("config", "flags", "size"),
    [
        ({"sample_size": [12, 16]}, [], (24, 32)),
        ({"sample_size": [12, 16]}, ["--width", "24"], (24, 24)),
        ({"sample_size": None}, ["--height", "24", "--width", "16"], (24, 16)),
        ({"sample_size": 20, "_diffusers_version": "0.8.0"}, [], (128, 128)),  # said so of all, and meant 64
        ({"sample_size": 20, "_diffusers_version": "0.9.0"}, [], (40, 40)),
    ],
)
def test_the_checkpoint_says_the_size_for_both_unets(
    quant_model: Path, checkpoint: Path, tmp_path: Path, config: dict, flags: list[str], size: tuple[int, int]
) -> None:
    edit(checkpoint / "unet/config.json", **config)
    for name, more in {"fp32": [], "int8": ["-qm", str(quant_model)]}.items():
        assert generate_image(checkpoint, tmp_path / name, *flags, *more).shape[:2] == size
        row = json.loads((tmp_path / name / "results.jsonl").read_text())
        assert (row["height"], row["width"]) == size


def test_a_size_that_nobody_names_is_asked_for(quant_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "unet/config.json", sample_size=None)
    for flags in ([], ["-qm", str(quant_model)], ["--height", "32"]):
        with pytest.raises(text2images.UsageError, match="names no size: give --height and --width"):
            generate_image(checkpoint, tmp_path / "none", *flags)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet that takes the guidance scale as an input, as LCM's."""
    config = {key: value for key, value in tiny_pipeline().unet.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(config | {"time_cond_proj_dim": 16}))
    return save(tmp_path_factory.mktemp("guided"), unet=unet, scheduler=diffusers.LCMScheduler(**BETAS))


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_a_unet_that_takes_the_guidance_scale_is_trained_and_generated_with(
    train, guided: Path, tmp_path: Path, batch_size: str
) -> None:
    flags = ["--pretrained_model_name_or_path", str(guided), "--validation_prompts", "a"]
    train(tmp_path / "out", *flags, "--max_train_steps", "1")
    command = ["-m", guided, "-c", "a", "b", "c", "--num_inference_steps", "4", "--batch_size", batch_size]
    text2images.main([*map(str, command), "-qm", str(tmp_path / "out"), "--output_dir", str(tmp_path / "int8")])
    rows = [json.loads(line) for line in (tmp_path / "int8/results.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and not any(row["paired_guidance"] for row in rows)
    assert rows[0]["guidance_scale"] == 7.5


TRAILING = {"timestep_spacing": "trailing"}
VELOCITY = {"prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False}


@pytest.mark.parametrize(
    ("sampler", "settings", "flags"),
    [
        ("DDIMScheduler", VELOCITY | {"steps_offset": 1}, []),  # Stable Diffusion 2.1
        ("DDIMScheduler", VELOCITY | TRAILING | {"rescale_betas_zero_snr": True}, []),
        ("EulerDiscreteScheduler", TRAILING, ["--num_inference_steps", "1", "--guidance_scale", "0"]),  # SD Turbo
        ("LCMScheduler", {}, ["--num_inference_steps", "4", "--guidance_scale", "1"]),  # without an input for guidance
    ],
    ids=["v-prediction", "zero terminal SNR", "Turbo", "LCM"],
)
def test_what_a_checkpoint_predicts_and_how_few_steps_it_takes(
    train, checkpoint: Path, tmp_path: Path, sampler: str, settings: dict, flags: list[str]
) -> None:
    getattr(diffusers, sampler)(**BETAS, **settings).save_pretrained(checkpoint / "scheduler")
    edit(checkpoint / "model_index.json", scheduler=["diffusers", sampler])
    noise_scheduler = load(trainer, checkpoint).noise_scheduler
    assert noise_scheduler.config.prediction_type == settings.get("prediction_type", "epsilon")
    assert (noise_scheduler.alphas_cumprod[-1] == 0) == ("rescale_betas_zero_snr" in settings)
    losses = ["--task_weight", "0.1", "--snr_gamma", "5", "--train_batch_size", "4"]
    model = ["--pretrained_model_name_or_path", str(checkpoint)]
    trained = train(tmp_path / "out", *model, "--max_train_steps", "2", *losses)
    assert all(map(np.isfinite, trained["training"]["losses"].values()))
    fp32 = generate_image(checkpoint, tmp_path / "fp32", *flags)
    int8 = generate_image(checkpoint, tmp_path / "int8", *flags, "-qm", str(tmp_path / "out"))
    row = json.loads((tmp_path / "int8/results.jsonl").read_text())
    assert row["scheduler"] == sampler and row["paired_guidance"] == (not flags)
    assert (
        psnr(int8, fp32) > 43 > 20 > psnr(fp32, generate_image(checkpoint, tmp_path / "other", *flags, "--seed", "43"))
    )


def test_training_shows_the_unet_several_guidance_scales(guided: Path) -> None:
    pipeline = load(trainer, guided)
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad)
    batch = {"pixel_values": torch.zeros(4, 3, SIZE, SIZE), "input_ids": torch.zeros(4, 1, 77, dtype=torch.long)}
    generator = torch.Generator().manual_seed(0)
    noised = trainer.add_noise(pipeline, batch, (0, 1), 1, generator, accelerator)
    embedding = noised.conditioning["timestep_cond"]
    assert embedding.shape == (4, 16) and len(embedding.unique(dim=0)) == 4
    told = noised.predict(pipeline.unet)
    noised.conditioning["timestep_cond"] = None
    assert not torch.equal(told, noised.predict(pipeline.unet))


def test_results_say_what_was_done_not_what_was_asked(model_dir: Path, tmp_path: Path, caplog) -> None:
    flags = ["--guidance_scale", "0.5", "--negative_prompt", "rain", "--scheduler", "euler"]
    generate_image(model_dir, tmp_path, *flags)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["guidance_scale"] == 1.0 and row["negative_prompt"] is None and row["paired_guidance"] is False
    assert row["scheduler"] == "EulerDiscreteScheduler" and (row["height"], row["width"]) == (SIZE, SIZE)
    assert "--negative_prompt has no effect" in caplog.text


# ---------------------------------------------------------------- what is left out is said


def test_words_that_the_text_encoder_does_not_read_are_named(model_dir: Path, tmp_path: Path, caplog) -> None:
    """A token is a letter here: 75 of them beside those of start and end."""
    long = "a" * 30 + " " + "b" * 30 + " " + "c" * 30
    command = ["-m", model_dir, "-c", long, "short", long, "--num_inference_steps", "1", "--output_dir", tmp_path]
    text2images.main([*map(str, command), "--negative_prompt", "n" * 80])
    told = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert len(told) == 2  # once for each, and not for the short one
    assert "reads 77 of 92 tokens" in told[0] and told[0].endswith(f"{'c' * 15!r}")
    assert "reads 77 of 82 tokens" in told[1] and told[1].endswith(f"{'n' * 5!r}")


def test_a_quant_model_that_is_a_pointer_of_git_lfs_is_named_as_such(model_dir: Path, tmp_path: Path) -> None:
    make_pointer(tmp_path / "quant_model.pt")
    assert "a pointer of Git LFS, not the file itself" in refusal(text2images, model_dir, "-qm", str(tmp_path))


def test_an_output_dir_that_cannot_be_made_is_refused(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    image_flags = ["-m", model_dir, "-c", "a", "--output_dir", tmp_path / "file/below"]
    train_flags = ["--pretrained_model_name_or_path", model_dir, "--train_data_dir", data_dir]
    with pytest.raises(text2images.UsageError, match="--output_dir .* cannot be made: Not a directory"):
        text2images.main(list(map(str, image_flags)))
    with pytest.raises(trainer.UsageError, match="--output_dir .* cannot be made: Not a directory"):
        trainer.main(list(map(str, [*train_flags, "--output_dir", tmp_path / "file/below"])))


def test_the_list_of_vaes_is_what_the_pipeline_can_decode_with() -> None:
    for name in text2images.VAES:
        assert {"generator"} <= set(inspect.signature(getattr(diffusers, name).decode).parameters)
    assert "generator" not in inspect.signature(VQModel.decode).parameters
