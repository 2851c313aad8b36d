"""LoRAs are fused before anything else: teacher, student and the fp32 image are those of the fused model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import text2images
import train_text_to_image_qat as trainer
from conftest import tiny_pipeline, tiny_xl_pipeline, training_in_process
from lora import write_lora
from models import BOTH, cut, generate_image, load, make_pointer, psnr, refusal

TEXT = {"sd": ("text_encoder",), "xl": ("text_encoder", "text_encoder_2")}
MAKERS = {"sd": tiny_pipeline, "xl": tiny_xl_pipeline}


@pytest.fixture(scope="module")
def models(model_dir: Path, xl_dir: Path) -> dict[str, Path]:
    return {"sd": model_dir, "xl": xl_dir}


def parts_of(script: Any, loaded: Any) -> dict[str, Any]:
    return loaded.components if script is text2images else {"unet": loaded.unet, **loaded.parts}


@BOTH
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_fused_weights_are_the_old_ones_plus_weight_alpha_over_rank_times_the_product(
    script: Any, models: dict, kind: str, style: str, tmp_path: Path
) -> None:
    file, parts = tmp_path / "style: 2.safetensors", ("unet", *TEXT[kind])
    added = write_lora(MAKERS[kind](), file, style, parts)
    before = parts_of(script, load(script, models[kind]))
    after = parts_of(script, load(script, models[kind], "--lora", f"{file}:0.5"))
    for part in parts:
        old, new = before[part].state_dict(), after[part].state_dict()
        assert old.keys() == new.keys()
        for name in old:
            layer = (part, name.removesuffix(".weight"))
            expected = old[name] + 0.5 * added[layer] if name.endswith("weight") and layer in added else old[name]
            assert torch.allclose(new[name], expected, atol=1e-6), (part, name)
    if script is trainer:
        assert all(parameter.requires_grad for parameter in after["unet"].parameters())


def test_several_loras_add_up(models: dict, tmp_path: Path) -> None:
    first = write_lora(tiny_pipeline(), tmp_path / "a.safetensors", "kohya")
    second = write_lora(tiny_pipeline(), tmp_path / "b.safetensors", "diffusers", size=0.2)
    flags = ["--lora", str(tmp_path / "a.safetensors"), f"{tmp_path / 'b.safetensors'}:-1"]
    plain, fused = load(trainer, models["sd"]).unet, load(trainer, models["sd"], *flags).unet
    for (_, name), more in first.items():
        expected = plain.get_submodule(name).weight + more - second["unet", name]
        assert torch.allclose(fused.get_submodule(name).weight, expected, atol=1e-6)


@dataclass
class Styled:
    model: Path
    lora: str  # of all its parts
    folder: Path  # with what was trained with it
    plain: Path  # and without
    payload: dict[str, Any]


@pytest.fixture(scope="module", params=["sd", "xl"])
def styled(request, models: dict, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Styled:
    folder, kind = tmp_path_factory.mktemp("styled"), request.param
    file, flags = folder / "style.safetensors", ["--max_train_steps", "1", "--calibration_steps", "6"]
    write_lora(MAKERS[kind](), file, "kohya", ("unet", *TEXT[kind]), size=0.2)
    with training_in_process(models[kind], data_dir) as run:
        run(folder / "plain", *flags)
        payload = run(folder, *flags, "--lora", f"{file}:0.8")
    return Styled(models[kind], f"{file}:0.8", folder, folder / "plain", payload)


def test_a_fused_lora_changes_both_images_alike(styled: Styled, tmp_path: Path) -> None:
    lora = ["--lora", styled.lora]
    plain, fp32 = (
        generate_image(styled.model, tmp_path / "plain"),
        generate_image(styled.model, tmp_path / "fp32", *lora),
    )
    plain_int8 = generate_image(styled.model, tmp_path / "plain int8", "-qm", str(styled.plain))
    int8 = generate_image(styled.model, tmp_path / "int8", *lora, "-qm", str(styled.folder))
    assert psnr(plain, fp32) < 32 and abs(psnr(fp32, int8) - psnr(plain, plain_int8)) < 2


def test_the_file_records_the_lora_and_the_student_is_of_the_fused_model(styled: Styled, tmp_path: Path) -> None:
    model, lora, payload = styled.model, styled.lora, styled.payload
    digest = trainer.sha256(Path(lora.rpartition(":")[0]))
    assert payload["loras"] == [{"name": "style.safetensors", "weight": 0.8, "sha256": digest, "text_encoder": True}]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = payload["state_dict"]
    weight, scale, factor = (state[f"{name}.{key}"] for key in ("weight", "weight_scale", "input_factor"))
    worth = weight.float() * scale[:, None] / factor
    plain, fused = (load(trainer, model, *flags).unet.get_submodule(name).weight for flags in ([], ["--lora", lora]))
    assert (worth - fused).norm() < 0.02 * fused.norm() and (worth - plain).norm() > 0.2 * plain.norm()


def test_a_run_with_a_lora_is_not_resumed_without_and_names_it_at_its_end(
    model_dir: Path, data_dir: Path, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "it's a style.safetensors"
    write_lora(tiny_pipeline(), file, "kohya", ("unet", "text_encoder"))
    flags = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--cache_latents", "--center_crop"]
    with training_in_process(model_dir, data_dir) as run:
        run(tmp_path, *flags, "--lora", str(file))
        with pytest.raises(trainer.UsageError, match=r"other settings: lora \(then \[.*, now None\)"):
            run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
        run(tmp_path, *flags)
    assert len(list(tmp_path.glob("latents-*"))) == 2  # captions are encoded otherwise
    assert f"--lora '{tmp_path}/it'\"'\"'s a style.safetensors:1.0' -c" in caplog.text


# ---------------------------------------------------------------- generating with what was trained with a LoRA


def test_int8_asks_for_the_lora_that_the_text_encoder_needs(styled: Styled, tmp_path: Path) -> None:
    model, lora, folder = styled.model, styled.lora, styled.folder
    file = lora.rpartition(":")[0]
    refused = refusal(text2images, model, "-qm", str(folder))
    assert "-qm was trained with --lora 'style.safetensors:0.8', which changes the text encoder, too" in refused
    assert "give the same" in refusal(text2images, model, "-qm", str(folder), "--lora", f"{file}:0.7")
    tensors = load_file(file)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "style.safetensors")
    assert "give the same" in refusal(
        text2images, model, "-qm", str(folder), "--lora", f"{tmp_path / 'style.safetensors'}:0.8"
    )


def test_int8_holds_a_lora_of_the_unet(
    model_dir: Path, data_dir: Path, quant_model: Path, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "style.safetensors"
    write_lora(tiny_pipeline(), file, size=0.3)
    with training_in_process(model_dir, data_dir) as run:
        run(tmp_path, "--lora", str(file), "--max_train_steps", "0")
    without = generate_image(model_dir, tmp_path / "without", "-qm", str(tmp_path))
    assert "the int8 UNet holds the LoRA 'style.safetensors:1.0'" in caplog.text
    given = generate_image(model_dir, tmp_path / "with", "-qm", str(tmp_path), "--lora", str(file))
    assert np.array_equal(without, given)
    refused = refusal(text2images, model_dir, "-qm", str(quant_model), "--lora", str(file))
    assert "the int8 UNet of -qm was trained without" in refused
    assert "which its int8 UNet holds: give the same, or none" in refusal(
        text2images, model_dir, "-qm", str(tmp_path), "--lora", f"{file}:0.5"
    )


@pytest.mark.parametrize(
    "loras", [7, [7], [{"name": "a"}], [{"name": "a", "weight": "b", "sha256": "", "text_encoder": 1}]]
)
def test_a_damaged_record_is_named(model_dir: Path, quant_model: Path, tmp_path: Path, loras: Any) -> None:
    payload = torch.load(quant_model, weights_only=True) | {"loras": loras}
    torch.save(payload, tmp_path / "quant_model.pt")
    assert "-qm is damaged, its loras are none" in refusal(text2images, model_dir, "-qm", str(tmp_path))


# ---------------------------------------------------------------- what is refused


@BOTH
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_lora_for_another_architecture_is_refused(script: Any, models: dict, style: str, tmp_path: Path) -> None:
    for made_for, given_to in (("sd", "xl"), ("xl", "sd")):
        for parts in (("unet",), ("unet", *TEXT[made_for])):
            file = tmp_path / f"{made_for} {len(parts)}.safetensors"
            write_lora(MAKERS[made_for](), file, style, parts)
            assert f"--lora {file} does not fit" in refusal(script, models[given_to], "--lora", str(file)), made_for


@BOTH
def test_a_lora_of_which_layers_are_strange_is_refused(script: Any, model_dir: Path, tmp_path: Path) -> None:
    write_lora(tiny_pipeline(), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    odd = {name.replace("down_blocks_0", "down_blocks_9"): tensor for name, tensor in tensors.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    assert "of its 32 layers are there" in refusal(script, model_dir, "--lora", str(tmp_path / "odd.safetensors"))


@BOTH
def test_files_that_are_no_lora_are_refused(script: Any, model_dir: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.safetensors"
    for spoil, message in ((cut, "no LoRA that can be read"), (make_pointer, "a pointer of Git LFS")):
        write_lora(tiny_pipeline(), file)
        spoil(file)
        assert message in refusal(script, model_dir, "--lora", str(file))
    save_file({"a.b": torch.zeros(2)}, file)
    assert "does not fit" in refusal(script, model_dir, "--lora", str(file))
    shutil.copy(file, tmp_path / "a.pt")
    for given, message in (
        (tmp_path / "a.pt", "other files that hold LoRAs could run code"),
        (tmp_path / "b.safetensors", "no such file"),
        (f"{file}:nan", "is no FILE.safetensors or FILE.safetensors:WEIGHT"),
        (f"{file}:much", "is no FILE.safetensors or FILE.safetensors:WEIGHT"),
    ):
        with pytest.raises(SystemExit) as left:
            load(script, model_dir, "--lora", str(given))
        assert left.value.code == 2 and message in capsys.readouterr().err
