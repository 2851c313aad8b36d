"""text2images.py: int8 layers against integers, the file against what may be wrong with it, names, seeds, reports."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.models.clip import CLIPImageProcessorPil

import text2images
import train_text_to_image_qat as trainer
from conftest import ROOT, SIZE, run_command
from test_train_text_to_image_qat import calibrated_unet, unet_inputs
from text2images import UsageError

needs_kernels = pytest.mark.skipif(not text2images.kernels_are_exact(), reason="this CPU has no exact int8 kernels")


STORED = {"linear": (24, 40), "conv": (24, 16, 3, 3), "strided": (24, 16, 3, 3), "grouped": (24, 8, 3, 3)}
STORED["no bias"] = STORED["conv"]


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def filled(layer: text2images.Int8Layer, use_kernels: bool) -> text2images.Int8Layer:
    generator = torch.Generator().manual_seed(1)
    layer.weight = random_weight(layer.weight.shape)
    layer.weight_scale = torch.rand(len(layer.weight), generator=generator) * 0.01 + 1e-4
    layer.bias = None if layer.bias is None else torch.randn(len(layer.weight), generator=generator)
    layer.input_scale, layer.input_zero_point = torch.tensor(0.03), torch.tensor(77, dtype=torch.int32)
    layer.input_factor = torch.rand(layer.input_factor.shape, generator=generator) + 0.5
    layer.make_ready(use_kernels, torch.float32, torch.device("cpu"))
    return layer


def new_layers(kind: str) -> list[text2images.Int8Layer]:
    """The same layer by kernel and by reference path."""
    if kind == "linear":
        made = [text2images.Int8Linear(torch.empty(24, 40), torch.empty(24)) for _ in range(2)]
    else:
        groups = 2 if kind == "grouped" else 1
        stride = 2 if kind == "strided" else 1
        conv = nn.Conv2d(16, 24, 3, stride, 1, groups=groups, bias=kind != "no bias")
        made = [text2images.Int8Conv2d(conv) for _ in range(2)]
    return [filled(layer, use_kernels) for layer, use_kernels in zip(made, (True, False))]


# ---------------------------------------------------------------- int8 layers


@needs_kernels
@pytest.mark.parametrize("kind", ["linear", "conv", "strided", "grouped", "no bias"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_kernels_compute_what_the_reference_path_does(kind: str, batch: int) -> None:
    kernel, reference = new_layers(kind)
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 9, 40) if kind == "linear" else (batch, 16, 6 + 2 * batch, 10)
    x = torch.randn(shape, generator=generator) * 3
    expected = reference(x)
    assert torch.allclose(kernel(x), expected, atol=1e-4 * expected.abs().max().item())


def test_reference_path_follows_the_convention_of_the_file() -> None:
    layer = new_layers("linear")[1]
    x = torch.randn(3, 40) * 3
    levels = (torch.round(x / (0.03 * layer.input_factor)) + 77).clamp(0, 255) - 77
    fresh = text2images.Int8Linear(torch.empty(24, 40), torch.empty(24))
    weight = filled(fresh, use_kernels=False).weight
    assert torch.allclose(layer(x), F.linear(levels * 0.03, weight, layer.bias), atol=1e-5)


@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("paired", [False, True])
def test_compiled_layers_compute_what_the_kernels_do(paired: bool) -> None:
    conv, linear = new_layers("strided")[0], filled(text2images.Int8Linear(torch.empty(12, 24), None), True)
    conv.input_quantizer.paired = linear.input_quantizer.paired = paired
    x = torch.randn(2, 16, 12, 10)

    def layers(x: torch.Tensor) -> torch.Tensor:
        return linear(F.silu(conv(x)).permute(0, 2, 3, 1))

    expected = layers(x)
    compiled = torch.compile(layers, fullgraph=True)(x)
    assert torch.allclose(compiled, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("use_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("kind", ["linear", "conv", "strided", "grouped", "no bias"])
def test_high_precision_is_the_float_layer_of_the_same_weights(kind: str, use_kernels: bool) -> None:
    layer = new_layers(kind)[0 if use_kernels else 1]
    factor = layer.input_factor.view(-1, *[1] * (len(STORED[kind]) - 2))
    weight = text2images.dequantize(random_weight(STORED[kind]), layer.weight_scale)
    if kind == "linear":
        x = torch.randn(5, 40)
        plain = F.linear(x / factor, weight, layer.bias)
    else:
        x = torch.randn(2, 16, 8, 8)
        plain = F.conv2d(x / factor, weight, layer.bias, *layer.geometry)
    assert not torch.allclose(layer(x), plain, atol=1e-3)
    layer.high_precision = True
    assert torch.allclose(layer(x), plain, atol=1e-4)


@needs_kernels
def test_steps_of_high_precision_run_uncompiled() -> None:
    layer, x, programs = new_layers("conv")[0], torch.randn(2, 16, 8, 8), []

    def compiler(program: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        programs.append(program)
        return program.forward

    unet = nn.Sequential(layer)
    compiled, switch = torch.compile(unet.forward, backend=compiler), text2images.PrecisionSwitch(unet, 1)
    for high_precision, expected in ((True, 0), (False, 1), (True, 1), (False, 1)):
        switch.set(high_precision)
        assert torch.allclose(compiled(x), unet(x), atol=1e-5)
        assert layer.high_precision is high_precision and len(programs) == expected


def test_first_and_last_steps_are_those_of_high_precision(quant_model: Path, model_dir: Path, tmp_path: Path) -> None:
    flags = ["-m", model_dir, "-qm", quant_model, "-c", "x", "--output_dir", tmp_path, "--num_inference_steps", 6]
    args = text2images.parse_args([*map(str, flags), "--high_precision_steps", "2"])
    pipeline = text2images.load_pipeline(args)
    seen: list[bool] = []
    layer = next(layer for layer in pipeline.unet.modules() if isinstance(layer, text2images.Int8Layer))
    layer.register_forward_hook(lambda *_: seen.append(layer.high_precision))
    for _ in range(2):  # a second picture begins anew
        text2images.paint(pipeline, [text2images.Job("x", 0, 1)], args)
    assert seen == 2 * [True, True, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_point", [0, 77, 128, 255])
def test_fast_rounding_is_rounding(zero_point: int, dtype: torch.dtype) -> None:
    ends = [-1e30, -5e6, -1e3, 1e3, 5e6, 1e30, 0.0, -0.0]
    x = torch.cat([torch.arange(-260, 260, 0.25), torch.randn(2000) * 50, torch.tensor(ends)]).to(dtype)
    x = x.view(2, 4, -1, 1).to(memory_format=torch.channels_last)  # a quarter of it lies half-way between two levels
    before = x.clone()
    quantizer = text2images.InputQuantizer(1.0, zero_point, torch.tensor([1.0, 2.0, 0.5, 0.3]).view(-1, 1, 1))
    levels = quantizer.to_levels(x)
    expected = torch.clamp(torch.round(x.float() / quantizer.steps) + zero_point, 0, 255)
    assert levels.dtype == torch.uint8 and torch.equal(levels.float(), expected)
    assert levels.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)


def test_one_input_is_quantized_once_for_all_its_readers() -> None:
    quantizer = text2images.InputQuantizer(0.1, 3, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.randn(4, 4)
    (first,) = quantizer.quantize(x)
    assert quantizer.quantize(x)[0] is first
    assert quantizer.quantize(x + 1)[0] is not first
    assert first.tolist() == (torch.round(x / (0.1 * torch.arange(1, 5))) + 3).clamp(0, 255).tolist()


def pair_of_inputs(kind: str, batch: int, change: float) -> torch.Tensor:
    """A batch without captions, and the same with: changed a little, each sample by as much as its number says."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 9, 40) if kind == "linear" else (batch, 16, 8, 10)
    first, changes = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return torch.cat([first, first + change * changes * torch.arange(1, batch + 1).view(-1, *[1] * (len(shape) - 1))])


@pytest.mark.parametrize("use_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("kind", ["linear", "conv", "strided", "grouped", "no bias"])
def test_paired_guidance_quantizes_what_captions_change(kind: str, use_kernels: bool) -> None:
    layer, x = new_layers(kind)[0 if use_kernels else 1], pair_of_inputs(kind, batch=3, change=0.05)
    plain = layer(x)
    layer.high_precision = True
    exact = layer(x)
    layer.high_precision, layer.input_quantizer.paired = False, True
    layer.input_quantizer.seen = lambda: None  # levels of the same input, quantized in the other way
    paired = layer(x)

    def error_of_changes(output: torch.Tensor) -> float:
        (ours, theirs), (without, with_captions) = output.chunk(2), exact.chunk(2)
        return ((theirs - ours) - (with_captions - without)).square().mean().sqrt().item()

    assert torch.equal(paired.chunk(2)[0], plain.chunk(2)[0])
    assert error_of_changes(paired) < 0.1 * error_of_changes(plain)
    for sample in range(3):  # alone it is the same: what else is in the batch does not count
        pair = [sample, sample + 3]
        assert torch.allclose(layer(x[pair]), paired[pair], atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("kind", ["linear", "conv", "strided", "grouped", "no bias"])
def test_paired_kernels_compute_what_the_reference_path_does(kind: str) -> None:
    layers, x = new_layers(kind), pair_of_inputs(kind, batch=2, change=0.3)
    for layer in layers:
        layer.input_quantizer.paired = True
    expected = layers[1](x)
    assert torch.allclose(layers[0](x), expected, atol=1e-4 * expected.abs().max().item())
    same = torch.cat([x.chunk(2)[0]] * 2)  # nothing changes: no division by 0
    first, second = layers[0](same).chunk(2)
    assert torch.equal(first, second)


def test_paired_guidance_brings_guided_predictions_closer(quant_model: Path, model_dir: Path) -> None:
    flags = [*map(str, ["-m", model_dir, "-qm", quant_model, "-c", "a red bird", "--dtype", "float32"])]
    pipelines = [
        text2images.load_pipeline(text2images.parse_args(flags + more)) for more in (["--no_paired_guidance"], [])
    ]
    args = text2images.parse_args([*flags, "--high_precision_steps", "99", "--num_inference_steps", "4"])
    seen: list[torch.Tensor] = []
    guided = []
    for pipeline, steps in ((pipelines[0], 99), (pipelines[0], 0), (pipelines[1], 0)):
        args.high_precision_steps = steps
        hook = pipeline.unet.register_forward_hook(lambda *call: seen.append(call[-1][0]))
        text2images.paint(pipeline, [text2images.Job("a red bird", 0, 1), text2images.Job("rain", 0, 2)], args)
        hook.remove()
        without, with_captions = seen[0].chunk(2)  # later steps start from other latents
        guided.append(without + 7.5 * (with_captions - without))
        seen.clear()
    exact, plain, paired = guided
    assert (paired - exact).square().mean() < 0.5 * (plain - exact).square().mean()


@needs_kernels
def test_rows_without_places_can_be_paired() -> None:
    layers = new_layers("linear")  # as the time embedding's, [B, C]
    for layer in layers:
        layer.input_quantizer.paired = True
    x = torch.randn(6, 40)
    assert torch.allclose(layers[0](x), layers[1](x), atol=1e-4)


def test_attention_reads_unpaired_inputs(quant_model: Path, model_dir: Path) -> None:
    unet = text2images.load_pipeline(
        text2images.parse_args(["-m", str(model_dir), "-qm", str(quant_model), "-c", "x"])
    ).unet
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, text2images.Int8Layer)}
    unpaired = {name for name, layer in layers.items() if not layer.input_quantizer.paired}
    assert unpaired and unpaired < set(layers)
    assert unpaired == {name for name in layers if name.endswith(("to_q", "to_k", "to_v"))}


@pytest.mark.parametrize(
    ("flags", "paired"), [([], True), (["--guidance_scale", "1"], False), (["--no_paired_guidance"], False)]
)
def test_guidance_is_paired_in_int8_where_there_is_guidance(
    quant_model: Path, model_dir: Path, flags: list[str], paired: bool
) -> None:
    args = text2images.parse_args(["-m", str(model_dir), "-qm", str(quant_model), "-c", "y", *flags])
    assert text2images.run_facts(text2images.load_pipeline(args), args)["paired_guidance"] is paired
    args = text2images.parse_args(["-m", str(model_dir), "-c", "y"])  # not without int8
    assert text2images.run_facts(text2images.load_pipeline(args), args)["paired_guidance"] is False


def test_no_paired_guidance_without_int8_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        text2images.parse_args(["-m", "x", "-c", "y", "--no_paired_guidance"])
    assert stopped.value.code == 2 and "give -qm too" in capsys.readouterr().err


def test_layers_share_a_quantizer_only_where_their_grids_are_equal() -> None:
    attention = nn.Module()
    attention.is_cross_attention = False
    for name, last in (("to_q", 1.0), ("to_k", 1.0), ("to_v", 2.0)):
        layer = text2images.Int8Linear(torch.empty(4, 3), None)
        layer.input_quantizer = text2images.InputQuantizer(0.1, 3, torch.tensor([1.0, 1.0, last]))
        attention.add_module(name, layer)
    text2images.share_input_quantizers(attention)
    assert attention.to_q.input_quantizer is attention.to_k.input_quantizer
    assert attention.to_v.input_quantizer.factor[2] == 2


@pytest.mark.parametrize("use_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize(("batch", "edge"), [(1, SIZE // 2), (3, SIZE // 2), (2, SIZE)])
def test_int8_unet_computes_what_the_fake_quantized_student_did(
    monkeypatch, use_kernels: bool, batch: int, edge: int
) -> None:
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
        monkeypatch.setattr(text2images, "kernels_are_exact", lambda: use_kernels)
        int8 = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
        for name, (x, y) in expected.items():  # every layer, on the very input that its fake twin had
            assert torch.allclose(int8.get_submodule(name)(x), y, atol=1e-5 * y.abs().max().item(), rtol=1e-4), name
        difference = (int8(*inputs)[0] - fake).square().mean().sqrt()
    # Sums in another order put some value on the other side of a rounding border, and layer after layer more of
    # them: two exact implementations drift apart, by no more than quantization itself costs.
    assert len(expected) == 74 and difference <= quantization_error


@needs_kernels
def test_inputs_stay_floats_where_every_layer_is_int8(train, tmp_path: Path) -> None:
    train(tmp_path, "--keep_float", "--max_train_steps", "0")
    payload = text2images.read_quant_model(tmp_path)
    unet = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
    inputs, _ = text2images.to_unet_dtype(unet, unet_inputs(), {})
    assert all(torch.equal(given, kept) for given, kept in zip(unet_inputs(), inputs))


@pytest.mark.parametrize("size", [1.0, 2.5, 4.0, 6.0])
def test_attention_in_blocks_errs_little_more_than_pytorchs(size: float) -> None:
    """Rows and keys are no multiples of the block; large scores are where bf16 is coarse."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 40) * by for n, by in ((300, size), (1100, size), (1100, 1)))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    coarse = [tensor.bfloat16() for tensor in (query, key, value)]
    ours, theirs = text2images.attend(*coarse), F.scaled_dot_product_attention(*coarse)
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()
    assert torch.equal(text2images.fast_attend(*coarse), ours)


def test_attention_of_a_score_that_no_16th_key_tells_of_is_pytorchs() -> None:
    query, key, value = torch.randn(3, 1, 1, 1100, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    query[..., 7, :], key[..., 33, :] = 30.0, 30.0  # e to the power of 5692 is no number
    assert torch.equal(text2images.attend(query, key, value), F.scaled_dot_product_attention(query, key, value))
    assert torch.isfinite(text2images.attend(query, key, value)).all()


def test_long_self_attention_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    block = BasicTransformerBlock(64, 2, 32, cross_attention_dim=48).bfloat16().eval()
    context = torch.randn(2, 7, 48).bfloat16()
    for length, same in ((1000, True), (1024, False)):
        x = torch.randn(2, length, 64).bfloat16()
        with torch.no_grad():
            block.attn1.set_processor(AttnProcessor2_0())
            expected = block(x, encoder_hidden_states=context)
            block.attn1.set_processor(text2images.LongSelfAttention())
            given = block(x, encoder_hidden_states=context)
        assert torch.equal(given, expected) == same  # short ones are left to diffusers
        assert (given - expected).float().norm() < 0.003 * expected.float().norm()


# ---------------------------------------------------------------- files that are not what they should be


def changed(quant_model: Path, path: Path, **changes) -> Path:
    payload = torch.load(quant_model, weights_only=True)
    payload.update(changes)
    if "checksum" not in changes:
        payload["checksum"] = text2images.checksum(payload["state_dict"])
    torch.save(payload, path)
    return path


def test_int8_unet_holds_nothing_of_the_file_in_memory(quant_model: Path) -> None:
    payload = text2images.read_quant_model(quant_model)
    unet = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
    of_file = {part.untyped_storage().data_ptr() for part in payload["state_dict"].values()}
    tensors = [part for module in unet.modules() for part in vars(module).values() if isinstance(part, torch.Tensor)]
    tensors += [*unet.parameters(), *(part for part in unet.buffers() if part.layout == torch.strided)]
    assert not of_file & {part.untyped_storage().data_ptr() for part in tensors}


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


# ---------------------------------------------------------------- painting


def paint(model_dir: Path, output_dir: Path, *flags: str | Path) -> list[dict]:
    short = ["--num_inference_steps", "4", "--output_dir", str(output_dir)]
    text2images.main(["-m", str(model_dir), *short, *map(str, flags)])
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)


def test_picture_depends_on_its_own_seed_only(model_dir: Path, tmp_path: Path) -> None:
    batched = paint(model_dir, tmp_path / "batched", "-c", "a", "b", "-n", "2", "-s", "7", "--batch_size", "3")
    alone = paint(model_dir, tmp_path / "alone", "-c", "b", "-n", "1", "-s", "8")
    assert [(row["caption"], row["seed"]) for row in batched] == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    difference = pixels(tmp_path / "batched" / batched[3]["file"]) - pixels(tmp_path / "alone" / alone[0]["file"])
    assert np.abs(difference).max() <= 1
    other = pixels(tmp_path / "batched" / batched[2]["file"]) - pixels(tmp_path / "alone" / alone[0]["file"])
    assert np.abs(other).mean() > 1


def test_int8_picture_is_close_to_the_full_precision_one(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    fp32 = paint(model_dir, tmp_path, "-c", "a")[0]
    int8 = paint(model_dir, tmp_path, "-c", "a", "-qm", quant_model, "--dtype", "float32")[1]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8")
    assert (fp32["seed"], fp32["steps"], fp32["scheduler"]) == (int8["seed"], int8["steps"], int8["scheduler"])
    mse = np.square(pixels(tmp_path / fp32["file"]) - pixels(tmp_path / int8["file"])).mean()
    assert 0 < mse < 255**2 / 10**3  # better than 30 dB, and not the same weights


@needs_kernels
@pytest.mark.parametrize("cpu", ["AVX2", "AVX512_CORE"])
def test_older_cpus_say_so_and_paint_the_same_picture(
    model_dir: Path, quant_model: Path, tmp_path: Path, monkeypatch, cpu: str
) -> None:
    """Their kernels saturate: with them, pictures are 31 to 32 dB from the right ones."""
    flags = ["-m", model_dir, "-qm", quant_model, "-c", "a", "--dtype", "float32", "--num_inference_steps", "4"]
    command = [sys.executable, "text2images.py", *flags, "--output_dir", tmp_path / "older"]
    older = run_command(*command, ONEDNN_MAX_CPU_ISA=cpu)
    assert older.returncode == 0
    (line,) = [line for line in older.stderr.splitlines() if "layers in int8" in line]
    assert line.endswith("by the reference path at float speed (no exact int8 kernels here)")
    text2images.main([*map(str, flags), "--output_dir", str(tmp_path / "kernels")])
    monkeypatch.setattr(text2images, "kernels_are_exact", lambda: False)
    text2images.main([*map(str, flags), "--output_dir", str(tmp_path / "reference")])
    picture = pixels(tmp_path / "older" / "a int8 seed 42.png") / 255
    for name, least in (("kernels", 40), ("reference", 60)):  # dB; was 47 and equal to the bit
        error = np.square(picture - pixels(tmp_path / name / "a int8 seed 42.png") / 255).mean()
        assert -10 * np.log10(error + 1e-12) > least


def test_bfloat16_run_is_close_and_reported(model_dir: Path, tmp_path: Path) -> None:
    fp32 = paint(model_dir, tmp_path, "-c", "a")[0]
    bf16 = paint(model_dir, tmp_path, "-c", "a", "--dtype", "bfloat16")[1]
    assert bf16["precision"] == "bf16"
    assert np.abs(pixels(tmp_path / fp32["file"]) - pixels(tmp_path / bf16["file"])).mean() < 4


def test_grid_holds_every_picture_of_its_caption(model_dir: Path, tmp_path: Path) -> None:
    rows = paint(model_dir, tmp_path, "-c", "a", "-n", "3")
    grid = Image.open(tmp_path / "a fp32.png")
    assert grid.size == (2 * SIZE, 2 * SIZE)
    for index, row in enumerate(rows):
        corner = (index % 2 * SIZE, index // 2 * SIZE)
        part = grid.crop((*corner, corner[0] + SIZE, corner[1] + SIZE))
        assert np.array_equal(np.asarray(part), pixels(tmp_path / row["file"]))


def test_facts_are_in_the_row_and_in_the_picture(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    flags = ["--guidance_scale", "3", "--scheduler", "pndm", "--negative_prompt", "fog", "-qm", quant_model]
    row = paint(model_dir, tmp_path, "-c", "été 日本", *flags)[0]
    expected = {"caption": "été 日本", "seed": 42, "status": "ok", "steps": 4, "guidance_scale": 3.0}
    expected |= {"scheduler": "PNDMScheduler", "negative_prompt": "fog", "precision": "int8"}
    assert expected.items() <= row.items()
    assert row["seconds"] > 0 and row["peak_memory_gib"] > 0.1
    assert row["unet_mb"] == round(quant_model.stat().st_size / 1e6, 1)
    text = Image.open(tmp_path / row["file"]).text
    assert text["caption"] == "été 日本" and text["guidance_scale"] == "3.0" and text["seed"] == "42"


def test_nothing_is_overwritten(model_dir: Path, tmp_path: Path) -> None:
    for _ in range(2):
        rows = paint(model_dir, tmp_path, "-c", "a", "a")
    assert len(rows) == len({row["file"] for row in rows}) == 4
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    assert not list(tmp_path.glob("*.partial"))


def test_captions_come_from_a_file_too(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    rows = paint(model_dir, tmp_path, "-c", "zero", "--captions_file", tmp_path / "captions.txt", "--batch_size", "3")
    assert [row["caption"] for row in rows] == ["zero", "one", "two"]


def test_size_can_be_chosen(model_dir: Path, tmp_path: Path) -> None:
    row = paint(model_dir, tmp_path, "-c", "a", "--height", "48", "--width", "64")[0]
    assert pixels(tmp_path / row["file"]).shape == (48, 64, 3)


def test_numerical_failure_is_reported_as_such(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    noise = text2images.initial_latents

    def broken(pipeline, jobs, height, width):
        latents = noise(pipeline, jobs, height, width)
        latents[0] = float("nan")
        return latents

    monkeypatch.setattr(text2images, "initial_latents", broken)
    with pytest.raises(SystemExit) as left:
        paint(model_dir, tmp_path, "-c", "a", "-n", "2", "--batch_size", "2")
    assert left.value.code == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["file"] is None) for row in rows] == [("non-finite", True), ("ok", False)]


def test_flagged_picture_is_reported_as_such(model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    def checker(self, image, device, dtype):
        return torch.zeros_like(image), [True]

    monkeypatch.setattr(text2images.StableDiffusionPipeline, "run_safety_checker", checker)
    assert paint(model_dir, tmp_path, "-c", "a")[0]["status"] == "flagged"


def test_safety_checker_of_the_checkpoint_blackens_unless_it_is_disabled(model_dir: Path, tmp_path: Path) -> None:
    edges = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**edges, image_size=16, patch_size=8, projection_dim=16)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16))
    checker.concept_embeds_weights.fill_(-2)  # a cosine is above that whatever the picture
    pipeline = text2images.StableDiffusionPipeline.from_pretrained(model_dir)
    size = {"height": 16, "width": 16}
    sorter = CLIPImageProcessorPil(size=size, crop_size=size)
    pipeline.register_modules(safety_checker=checker, feature_extractor=sorter)
    pipeline.save_pretrained(tmp_path / "model")
    for flags, status in (([], "flagged"), (["--disable_safety_checker"], "ok")):
        (row,) = paint(tmp_path / "model", tmp_path / status, "-c", "a", *flags)
        assert row["status"] == status
        black = np.asarray(Image.open(tmp_path / status / row["file"])).max() == 0
        assert black == (status == "flagged")


def test_text_encoder_in_the_layout_of_older_transformers_paints_the_same(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "old")
    file = tmp_path / "old/text_encoder/model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    pictures = []
    for model in (model_dir, tmp_path / "old"):
        (row,) = paint(model, tmp_path / f"of {model.name}", "-c", "a lake")
        pictures.append(np.asarray(Image.open(tmp_path / f"of {model.name}" / row["file"])))
    assert np.array_equal(*pictures) and pictures[0].std() > 0


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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no count of this kind")
def test_memory_of_large_tensors_is_kept_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)  # the trainer's: hardly any pages, whatever is done
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    use = "torch.ones(1 << 24)"  # 64 MiB: 16384 pages
    steps = ["import resource, torch, text2images", "text2images.keep_freed_memory()", *[use] * 4]
    program = "; ".join([*steps, f"before = {faults}", use, f"print({faults} - before)"])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < 1000


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to paint"),
        (["-c", "a", "-n", "0"], "--images_num must be at least 1"),
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
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(UsageError, match="StableDiffusionXLPipeline"):
        text2images.main(["-m", str(tmp_path), "-c", "a", "--output_dir", str(tmp_path / "out")])
