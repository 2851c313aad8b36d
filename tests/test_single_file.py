"""One .safetensors file in the original layout gives what the diffusers folder gives, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_text_to_image_qat as trainer
from conftest import ROOT, tiny_pipeline, tiny_xl_pipeline, training_in_process
from models import BOTH, cut, generate_image, load, make_pointer, refusal
from single_file import write_single_file

BUNDLED = ROOT / "demo/tiny-stable-diffusion"


def settings_of(checkpoint: Path, folder: Path) -> Path:
    """All of a checkpoint but its weights."""
    return Path(shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def files(model_dir: Path, xl_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """By kind: the file, its settings, and the folder of the same weights."""
    folder = tmp_path_factory.mktemp("single")
    made = {}
    for kind, pipeline, whole in (("sd", tiny_pipeline(), model_dir), ("xl", tiny_xl_pipeline(), xl_dir)):
        file = write_single_file(pipeline, folder / f"{kind}.safetensors")
        made[kind] = file, settings_of(whole, folder / kind), whole
    return made


@pytest.mark.parametrize("open_clip", [False, True], ids=["SD 1", "SD 2"])
def test_every_tensor_of_the_bundled_model_comes_back(tmp_path: Path, open_clip: bool) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BUNDLED, safety_checker=None)
    file = write_single_file(pipeline, tmp_path / "model.safetensors", open_clip)
    flags = ["--config", str(settings_of(BUNDLED, tmp_path / "settings"))]
    ours = load(trainer, file, *flags, "--resolution", "64")
    for part in ("unet", "vae", "text_encoder"):
        expected, tensors = getattr(pipeline, part).state_dict(), {"unet": ours.unet, **ours.parts}[part].state_dict()
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(expected[name], tensors[name]) for name in expected), part


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_single_file_trains_and_generates_to_the_bits_of_the_folder(
    files: dict, kind: str, data_dir: Path, tmp_path: Path
) -> None:
    file, settings, folder = files[kind]
    states = []
    for name, model, flags in (("file", file, ["--config", str(settings)]), ("folder", folder, [])):
        with training_in_process(model, data_dir) as run:
            states.append(run(tmp_path / name, *flags, "--max_train_steps", "1"))
    assert states[0]["checksum"] == states[1]["checksum"] and states[0]["base_model"] == str(file)
    config = ["--config", str(settings)]
    for quantized in ([], ["-qm", str(tmp_path / "file")]):
        name = f"images {len(quantized)}"
        ours = generate_image(file, tmp_path / f"{name} file", *config, *quantized)
        assert np.array_equal(ours, generate_image(folder, tmp_path / f"{name} folder", *quantized))


def test_the_next_command_names_the_settings(files: dict, data_dir: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    file, settings, _ = files["sd"]
    with training_in_process(file, data_dir) as run:
        run(tmp_path, "--config", str(settings), "--max_train_steps", "0")
    assert f"-m {file} -qm {tmp_path / 'quant_model.pt'} --config={settings}" in caplog.text


@BOTH
def test_without_the_hub_the_settings_are_asked_for(script: Any, files: dict) -> None:
    file = files["sd"][0]
    refused = refusal(script, file)
    assert "whose settings are those of stable-diffusion-v1-5/stable-diffusion-v1-5" in refused
    assert "give --config FOLDER" in refused
    assert "--config x/y/z: no such folder" in refusal(script, file, "--config", "x/y/z")


@BOTH
def test_what_cannot_be_meant_is_refused(script: Any, files: dict, tmp_path: Path, model_dir: Path) -> None:
    sd, xl = files["sd"], files["xl"]
    assert "is SDXL by its keys, but --config" in refusal(script, xl[0], "--config", str(sd[1]))
    assert "is no SDXL by its keys, but --config" in refusal(script, sd[0], "--config", str(xl[1]))
    assert "--variant fp16 is for a folder" in refusal(script, sd[0], "--config", str(sd[1]), "--variant", "fp16")
    assert "--config is for a single .safetensors file" in refusal(script, model_dir, "--config", str(sd[1]))
    assert "is a checkpoint of kind inpainting" in refusal(script, inpainting(sd[0], tmp_path / "in.safetensors"))


def inpainting(source: Path, file: Path) -> Path:
    tensors = load_file(source)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, file)
    return file


@BOTH
def test_damaged_and_incomplete_files_are_named(script: Any, files: dict, tmp_path: Path) -> None:
    source, settings, _ = files["sd"]
    config = ["--config", str(settings)]
    for number, (spoil, message) in enumerate(((cut, "is damaged"), (make_pointer, "a pointer of Git LFS"))):
        file = Path(shutil.copy(source, tmp_path / f"{number}.safetensors"))
        spoil(file)
        assert message in refusal(script, file, *config) and str(file) in refusal(script, file, *config)
    tensors = load_file(source)
    for prefix, message in (
        ("model.diffusion_model", "no whole checkpoint of Stable Diffusion"),
        ("first_stage_model", "its vae could not be loaded"),
        ("cond_stage_model", "its text_encoder could not be loaded"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1", "text_encoder could not be loaded: it lacks"),
        ("model.diffusion_model.middle_block.1", "its unet could not be loaded: it lacks "),
    ):
        file = tmp_path / f"without {prefix}.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}, file)
        assert message in refusal(script, file, *config), prefix
