"""text2images.py: int8 layers against integers, the file against what may be wrong with it, names, seeds, reports."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.models.clip import CLIPImageProcessorPil

import text2images
import train_text_to_image_qat as trainer
from conftest import ROOT, SIZE
from models import KINDS, calibrated_unet, generate, new_layer, pair_of_inputs, pixels, some_input, unet_inputs
from text2images import UsageError


@pytest.mark.parametrize("script", ["text2images", "train_text_to_image_qat"])
def test_garbage_is_looked_for_after_the_imports_but_not_among_what_they_made(script: str) -> None:
    said = "print(gc.isenabled(), 5 * len(gc.get_objects()) < gc.get_freeze_count())"
    command = [sys.executable, "-c", f"import gc, {script}; {said}"]
    assert subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.split() == [b"True"] * 2


def multiply(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stride, groups = (2 if kind == "strided" else 1), (2 if kind == "grouped" else 1)
    return F.linear(x, weight, bias) if kind == "linear" else F.conv2d(x, weight, bias, stride, 1, 1, groups)


# ---------------------------------------------------------------- int8 layers


@pytest.mark.parametrize("kind", KINDS)
def test_reference_path_computes_what_integers_do(kind: str) -> None:
    """As README documents the file: levels and weights are integers, and every sum of their products is exact."""
    layer, x = new_layer(kind), some_input(kind, 2)
    levels = (torch.round(x / layer.input_factor / 0.03) + 77).clamp(0, 255) - 77
    sums = multiply(kind, levels.double(), layer.weight.double(), None)
    scale = layer.weight_scale.flatten().double() * 0.03
    broadcast = scale if kind == "linear" else scale.view(-1, 1, 1)
    bias = 0 if layer.bias is None else layer.bias.double() if kind == "linear" else layer.bias.double().view(-1, 1, 1)
    expected = sums * broadcast + bias
    assert torch.allclose(layer(x).double(), expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_with_int8_weights_alone_is_the_float_layer_of_these_weights(kind: str) -> None:
    layer, x = new_layer(kind, quantize_input=False), some_input(kind, 2)
    weight = layer.weight.float() * layer.weight_scale
    expected = multiply(kind, x / layer.input_factor, weight, layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-4)
    quantized = new_layer(kind)(x)
    assert not torch.allclose(quantized, expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_paired_guidance_quantizes_what_captions_change(kind: str) -> None:
    x = pair_of_inputs(kind, batch=3, change=0.05)
    layer = new_layer(kind, paired=True)
    plain, exact, paired = new_layer(kind)(x), new_layer(kind, quantize_input=False)(x), layer(x)

    def error_of_changes(output: torch.Tensor) -> float:
        (ours, theirs), (without, with_captions) = output.chunk(2), exact.chunk(2)
        return ((theirs - ours) - (with_captions - without)).square().mean().sqrt().item()

    assert torch.allclose(paired.chunk(2)[0], plain.chunk(2)[0], atol=1e-5)
    assert error_of_changes(paired) < 0.1 * error_of_changes(plain)
    for sample in range(3):  # alone it is the same: what else is in the batch does not count
        pair = [sample, sample + 3]
        assert torch.allclose(layer(x[pair]), paired[pair], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paired_guidance_stands_that_nothing_changes(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(2, 40)] * 2).to(dtype)  # [B, C], as the time embedding's
    first, second = new_layer("linear", paired=True)(x).chunk(2)
    assert first.dtype == dtype and torch.equal(first, second)


def test_paired_guidance_brings_guided_predictions_closer(quant_model: Path) -> None:
    payload = text2images.read_quant_model(quant_model)
    cpu = torch.device("cpu")
    plain, paired, exact = (text2images.build_int8_unet(payload, torch.float32, cpu, pair) for pair in (0, 1, 0))
    for layer in exact.modules():
        if isinstance(layer, text2images.Int8Layer):
            layer.quantize_input = False
    sample, timestep, text = unet_inputs(2)
    inputs = torch.cat([sample[:1]] * 2), timestep[:1], text

    def guided(unet: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            without, with_captions = unet(*inputs)[0].chunk(2)
        return without + 7.5 * (with_captions - without)

    expected = guided(exact)
    assert (guided(paired) - expected).square().mean() < 0.5 * (guided(plain) - expected).square().mean()


def test_attention_reads_unpaired_inputs(quant_model: Path) -> None:
    payload = text2images.read_quant_model(quant_model)
    unet = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"), paired=True)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, text2images.Int8Layer)}
    layers = {name: layer for name, layer in layers.items() if layer.quantize_input}
    unpaired = {name for name, layer in layers.items() if not layer.paired}
    assert unpaired and unpaired < set(layers)
    assert unpaired == {name for name in layers if name.endswith(("to_q", "to_k", "to_v"))}


@pytest.mark.parametrize(
    ("flags", "paired"), [([], True), (["--guidance_scale", "1"], False), (["--no_paired_guidance"], False)]
)
def test_guidance_is_paired_in_int8_where_there_is_guidance(
    quant_model: Path, model_dir: Path, flags: list[str], paired: bool
) -> None:
    args = text2images.parse_args(["-m", str(model_dir), "-qm", str(quant_model), "-c", "y", *flags])
    assert text2images.run_metadata(text2images.load_pipeline(args), args)["paired_guidance"] is paired
    args = text2images.parse_args(["-m", str(model_dir), "-c", "y"])  # not without int8
    assert text2images.run_metadata(text2images.load_pipeline(args), args)["paired_guidance"] is False


@pytest.mark.parametrize("flags", [["--no_paired_guidance"], ["--engine", "torch"], ["--device", "GPU"]])
def test_flags_for_int8_are_refused_without_it(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        text2images.parse_args(["-m", "x", "-c", "y", *flags])
    assert stopped.value.code == 2 and "give -qm FILE too" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "edge"), [(1, SIZE // 2), (3, SIZE // 2), (2, SIZE)])
def test_int8_unet_computes_what_the_fake_quantized_student_did(batch: int, edge: int) -> None:
    student = calibrated_unet().eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        for name, layer in student.named_modules():
            if isinstance(layer, trainer.FakeInt8):
                layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
            elif isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight.copy_(layer.weight.half())  # kept in float, stored as fp16
        inputs = unet_inputs(batch, edge)
        fake = student(*inputs).sample
        expected = dict(seen)
        trainer.set_mode(student, "float")
        quantization_error = (student(*inputs).sample - fake).square().mean().sqrt()
        payload = {"unet_config": dict(student.config), "state_dict": trainer.convert(student).state_dict()}
        int8 = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
        for name, (x, y) in expected.items():  # every layer, on the very input that its fake twin had
            # a value on a rounding border may fall to its other side: one step of one input
            close = torch.isclose(int8.get_submodule(name)(x), y, atol=1e-5 * y.abs().max().item(), rtol=1e-4)
            assert close.float().mean() > 0.98, name
        difference = (int8(*inputs)[0] - fake).square().mean().sqrt()
    # Sums in another order put some value on the other side of a rounding border, and layer after layer more of
    # them: two exact implementations drift apart, by no more than quantization itself costs.
    assert len(expected) == 74 and difference <= quantization_error


# ---------------------------------------------------------------- files that are not what they should be


def changed(quant_model: Path, path: Path, **changes) -> Path:
    payload = torch.load(quant_model, weights_only=True)
    payload.update(changes)
    if "checksum" not in changes:
        payload["checksum"] = text2images.checksum(payload["state_dict"])
    torch.save(payload, path)
    return path


def test_missing_file_is_an_error_not_a_full_precision_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        text2images.read_quant_model(tmp_path / "quant_model.pt")


def test_a_folder_stands_for_the_file_in_it(quant_model: Path) -> None:
    assert text2images.read_quant_model(quant_model.parent)["format"] == "sd-unet-int8"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(quant_model: Path, tmp_path: Path, share: float) -> None:
    data = quant_model.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError, match="damaged"):
        text2images.read_quant_model(tmp_path / "cut.pt")


def test_flipped_bit_is_noticed(quant_model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(quant_model) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(quant_model.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        text2images.read_quant_model(tmp_path / "flipped.pt")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    file, trace = tmp_path / "harmful.pt", tmp_path / "was here"
    if plain:
        file.write_bytes(pickle.dumps({"format": "sd-unet-int8", "x": Harmful(trace)}))
    else:
        torch.save({"format": "sd-unet-int8", "x": Harmful(trace)}, file)
    with pytest.raises(UsageError):
        text2images.read_quant_model(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a quant_model.pt"),
        ({"format_version": 2}, "format version 2"),
        ({"checksum": "0"}, "checksum does not match"),
        ({"state_dict": None, "checksum": "0"}, "damaged"),
    ],
)
def test_wrong_contents_are_named(quant_model: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        text2images.read_quant_model(changed(quant_model, tmp_path / "q.pt", **changes))


def test_scale_that_is_no_number_is_refused(quant_model: Path, tmp_path: Path) -> None:
    state = torch.load(quant_model, weights_only=True)["state_dict"]
    state["mid_block.resnets.0.conv1.input_scale"] = torch.tensor(float("nan"))
    with pytest.raises(UsageError, match="mid_block.resnets.0.conv1.input_scale is not a positive number"):
        text2images.read_quant_model(changed(quant_model, tmp_path / "q.pt", state_dict=state))


def test_bare_state_dict_of_the_original_recipe_is_explained(tmp_path: Path) -> None:
    torch.save({"conv_in.module.weight": torch.zeros(3), "conv_in.scale": torch.ones(())}, tmp_path / "q.pt")
    with pytest.raises(UsageError, match="original example"):
        text2images.read_quant_model(tmp_path / "q.pt")


def test_missing_tensor_is_named(quant_model: Path) -> None:
    payload = text2images.read_quant_model(quant_model)
    del payload["state_dict"]["conv_in.bias"]
    with pytest.raises(UsageError, match="does not fit its own architecture"):
        text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))


def test_file_of_another_architecture_is_refused(quant_model: Path) -> None:
    payload = text2images.read_quant_model(quant_model)
    base = dict(payload["unet_config"], cross_attention_dim=768)
    with pytest.raises(UsageError, match="cross_attention_dim 32; that of -m other has 768"):
        text2images.check_architecture(payload, base, "other")


# ---------------------------------------------------------------- generating


def test_image_depends_on_its_own_seed_only(model_dir: Path, tmp_path: Path) -> None:
    batched = generate(model_dir, tmp_path / "batched", "-c", "a", "b", "-n", "2", "-s", "7", "--batch_size", "3")
    alone = generate(model_dir, tmp_path / "alone", "-c", "b", "-n", "1", "-s", "8")
    assert [(row["caption"], row["seed"]) for row in batched] == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    difference = pixels(tmp_path / "batched" / batched[3]["file"]) - pixels(tmp_path / "alone" / alone[0]["file"])
    assert np.abs(difference).max() <= 1
    other = pixels(tmp_path / "batched" / batched[2]["file"]) - pixels(tmp_path / "alone" / alone[0]["file"])
    assert np.abs(other).mean() > 1


def test_int8_image_is_close_to_the_full_precision_one(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    fp32 = generate(model_dir, tmp_path, "-c", "a")[0]
    int8 = generate(model_dir, tmp_path, "-c", "a", "-qm", quant_model, "--dtype", "float32")[1]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8")
    assert (fp32["seed"], fp32["steps"], fp32["scheduler"]) == (int8["seed"], int8["steps"], int8["scheduler"])
    mse = np.square(pixels(tmp_path / fp32["file"]) - pixels(tmp_path / int8["file"])).mean()
    assert 0 < mse < 255**2 / 10**5  # better than 50 dB (it is 53.5), and not the same weights


def test_bfloat16_run_is_close_and_reported(model_dir: Path, tmp_path: Path) -> None:
    fp32 = generate(model_dir, tmp_path, "-c", "a")[0]
    bf16 = generate(model_dir, tmp_path, "-c", "a", "--dtype", "bfloat16")[1]
    assert bf16["precision"] == "bf16"
    assert (
        0 < np.abs(pixels(tmp_path / fp32["file"]) - pixels(tmp_path / bf16["file"])).mean() < 1.5
    )  # levels; it is 0.6


def test_grid_holds_every_image_of_its_caption(model_dir: Path, tmp_path: Path) -> None:
    rows = generate(model_dir, tmp_path, "-c", "a", "-n", "3")
    grid = Image.open(tmp_path / "a fp32.png")
    assert grid.size == (2 * SIZE, 2 * SIZE)
    for index, row in enumerate(rows):
        corner = (index % 2 * SIZE, index // 2 * SIZE)
        part = grid.crop((*corner, corner[0] + SIZE, corner[1] + SIZE))
        assert np.array_equal(np.asarray(part), pixels(tmp_path / row["file"]))


def test_facts_are_in_the_row_and_in_the_image(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    flags = ["--guidance_scale", "3", "--scheduler", "pndm", "--negative_prompt", "fog", "-qm", quant_model]
    row = generate(model_dir, tmp_path, "-c", "été 日本", *flags)[0]
    expected = {"caption": "été 日本", "seed": 42, "status": "ok", "steps": 4, "guidance_scale": 3.0}
    expected |= {"scheduler": "PNDMScheduler", "negative_prompt": "fog", "precision": "int8"}
    assert expected.items() <= row.items()
    assert row["seconds"] > 0 and row["peak_memory_gib"] > 0.1
    assert row["unet_mb"] == round(quant_model.stat().st_size / 1e6, 1)
    text = Image.open(tmp_path / row["file"]).text
    assert text["caption"] == "été 日本" and text["guidance_scale"] == "3.0" and text["seed"] == "42"


def test_nothing_is_overwritten(model_dir: Path, tmp_path: Path) -> None:
    for _ in range(2):
        rows = generate(model_dir, tmp_path, "-c", "a", "a")
    assert len(rows) == len({row["file"] for row in rows}) == 4
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    assert not list(tmp_path.glob("*.partial"))


def test_captions_come_from_a_file_too(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    rows = generate(
        model_dir, tmp_path, "-c", "zero", "--captions_file", tmp_path / "captions.txt", "--batch_size", "3"
    )
    assert [row["caption"] for row in rows] == ["zero", "one", "two"]


def test_size_can_be_chosen(model_dir: Path, tmp_path: Path) -> None:
    row = generate(model_dir, tmp_path, "-c", "a", "--height", "48", "--width", "64")[0]
    assert pixels(tmp_path / row["file"]).shape == (48, 64, 3)


def test_numerical_failure_is_reported_as_such(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    noise = text2images.initial_latents

    def broken(pipeline, jobs, height, width):
        latents = noise(pipeline, jobs, height, width)
        latents[0] = float("nan")
        return latents

    monkeypatch.setattr(text2images, "initial_latents", broken)
    with pytest.raises(SystemExit) as left:
        generate(model_dir, tmp_path, "-c", "a", "-n", "2", "--batch_size", "2")
    assert left.value.code == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["file"] is None) for row in rows] == [("non-finite", True), ("ok", False)]


def test_flagged_image_is_reported_as_such(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    def checker(self, image, device, dtype):
        return torch.zeros_like(image), [True]

    monkeypatch.setattr(text2images.StableDiffusionPipeline, "run_safety_checker", checker)
    assert generate(model_dir, tmp_path, "-c", "a")[0]["status"] == "flagged"


def test_safety_checker_of_the_checkpoint_blackens_unless_it_is_disabled(model_dir: Path, tmp_path: Path) -> None:
    edges = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**edges, image_size=16, patch_size=8, projection_dim=16)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16))
    checker.concept_embeds_weights.fill_(-2)  # a cosine is above that whatever the image
    pipeline = text2images.StableDiffusionPipeline.from_pretrained(model_dir)
    size = {"height": 16, "width": 16}
    sorter = CLIPImageProcessorPil(size=size, crop_size=size)
    pipeline.register_modules(safety_checker=checker, feature_extractor=sorter)
    pipeline.save_pretrained(tmp_path / "model")
    for flags, status in (([], "flagged"), (["--disable_safety_checker"], "ok")):
        (row,) = generate(tmp_path / "model", tmp_path / status, "-c", "a", *flags)
        assert row["status"] == status
        black = np.asarray(Image.open(tmp_path / status / row["file"])).max() == 0
        assert black == (status == "flagged")


def test_text_encoder_in_the_layout_of_older_transformers_generates_the_same(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "old")
    file = tmp_path / "old/text_encoder/model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    images = []
    for model in (model_dir, tmp_path / "old"):
        (row,) = generate(model, tmp_path / f"of {model.name}", "-c", "a lake")
        images.append(np.asarray(Image.open(tmp_path / f"of {model.name}" / row["file"])))
    assert np.array_equal(*images) and images[0].std() > 0


@pytest.mark.parametrize(
    "caption",
    ["", "..", "../../etc/passwd", "a/b\\c", ".hidden", 'quo"te: <what?>|*', "line\nbreak", "x" * 1000, "日本" * 500],
)
def test_file_names_are_safe_for_any_caption(caption: str) -> None:
    name = text2images.safe_name(caption)
    assert 0 < len(name.encode()) <= 150
    assert not set(name) & set('/\\:*?"<>|\n\0') and not name.startswith(".") and name == name.strip(" .")


def test_caption_of_the_original_is_its_own_file_name() -> None:
    caption = "The Milky Way lies in the sky, with the golden snow mountain lies below, high definition"
    assert text2images.safe_name(caption) == caption


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to generate"),
        (["-c", "a", "-n", "0"], "--images_num: must be at least 1"),
        (["-c", "a", "--height", "100"], "96 would do"),
        (["--captions_file", "/nowhere"], "/nowhere"),
        (["-c", "a", "-s", "-1"], "--seed"),
    ],
)
def test_arguments_that_cannot_work_are_refused(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        text2images.parse_args(["-m", "x", *flags])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_other_kinds_of_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(UsageError, match="StableDiffusion3Pipeline"):
        text2images.main(["-m", str(tmp_path), "-c", "a", "--output_dir", str(tmp_path / "out")])
