"""The trainer: its quantizers, data order, checkpoints and refusals, in numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from diffusers.training_utils import EMAModel
from neural_compressor.torch.quantization import convert
from PIL import Image

import train_text_to_image_qat as trainer
from conftest import ROOT, SIZE, batch_of, run_command, tiny_pipeline, tiny_unet, training_in_process
from models import calibrated_unet, parse, prepared_unet, unet_inputs

# ---------------------------------------------------------------- quantizers


@pytest.mark.parametrize("shape", [(8, 16), (8, 4, 3, 3)])
def test_weight_rounding_error_is_at_most_half_a_scale_of_its_channel(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 3, 8).view(-1, *[1] * (len(shape) - 1))
    levels, scale = trainer.quantize_weight(weight)
    error = (levels * trainer.per_channel(scale, weight) - weight).abs().flatten(1).amax(dim=1)
    assert levels.dtype == torch.int8
    assert levels.flatten(1).abs().amax(dim=1).tolist() == [127] * 8  # the whole symmetric range, in every channel
    assert (error <= scale / 2 * 1.0001).all()


def test_fake_quantized_weight_is_the_dequantized_int8_weight_to_the_bit() -> None:
    weight, factors = torch.randn(8, 4, 3, 3), torch.rand(4) + 0.5
    factor = trainer.per_input_channel(factors, weight)
    levels, scale = trainer.quantize_weight(weight * factor)
    expected = levels.float() * (trainer.per_channel(scale, weight) / factor)
    assert torch.equal(trainer.FakeQuantizeWeight.apply(weight, factors), expected)


def test_weight_of_zeros_stays_zero() -> None:
    assert torch.equal(trainer.FakeQuantizeWeight.apply(torch.zeros(4, 4), torch.rand(4) + 0.5), torch.zeros(4, 4))


def test_gradient_passes_straight_through_the_rounding_of_a_weight() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    slope = torch.randn(4, 6)
    (trainer.FakeQuantizeWeight.apply(weight, torch.rand(6) + 0.5) * slope).sum().backward()
    assert torch.equal(weight.grad, slope)


def test_activation_rounding_error_is_at_most_half_a_scale_within_the_range() -> None:
    quantizer = trainer.ActivationFakeQuantizer(channels=1, channel_dim=-1)
    x = torch.linspace(-2, 3, 1000)[:, None]
    quantizer.observe(x)
    quantizer.compute_qparams()
    scale = quantizer.log_scale.exp().item()
    assert scale == pytest.approx(5 / 255, rel=0.01)
    least = -quantizer.zero_point.item() * scale  # the zero point is rounded: up to half a scale beside the range
    assert (quantizer(x) - x.clamp(least, least + 255 * scale)).abs().max().item() <= scale / 2 * 1.001 + 1e-6
    assert quantizer(torch.tensor([[-100.0], [0.0], [100.0]])).flatten().tolist() == pytest.approx(
        [-2, 0, 3], abs=scale
    )
    assert quantizer(torch.zeros(3, 1)).tolist() == [[0], [0], [0]]  # zero is exact, or padding would not be


def test_gradients_of_an_activation_follow_lsq() -> None:
    factor = torch.tensor([1.0, 4.0, 1.0, 4.0])
    log_scale, log_factor = torch.tensor(0.5).log().requires_grad_(), factor.log().requires_grad_()
    x = torch.tensor([0.6, -0.3, 1000.0, -1000.0], requires_grad=True)
    zero_point = torch.tensor(100, dtype=torch.int32)
    quantized = trainer.FakeQuantizeActivation.apply(x * factor, -1, log_factor, log_scale, zero_point)
    assert (quantized / factor).tolist() == pytest.approx([0.5, -0.5, 155 * 0.5, -100 * 0.5])
    (quantized / factor).sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1, 0, 0])  # clipped values get none
    errors = [0.5 - 0.6, -0.5 + 0.3]  # rounded minus exact, inside the range
    clipped = [(255 - 100) * 0.5, (0 - 100) * 0.5]
    assert log_factor.grad.tolist() == pytest.approx(errors + clipped, rel=1e-5)  # each channel has its own step
    assert log_scale.grad.item() == pytest.approx(sum(errors + clipped), rel=1e-5)  # the scale is part of them all


def test_fake_quantized_activation_is_that_of_straight_through_autograd() -> None:
    """Values to the bit, gradients but for the order of a sum."""
    generator, zero_point = torch.Generator().manual_seed(0), torch.tensor(100, dtype=torch.int32)
    x = (3 * torch.randn(64, 40, generator=generator)).requires_grad_()
    log_smoothing, log_scale = (
        torch.randn(40, generator=generator).requires_grad_(),
        torch.tensor(-4.6).requires_grad_(),
    )
    slope, results = torch.randn(64, 40, generator=generator), []
    for function in (
        trainer.straight_through,
        lambda x, *qparams: trainer.FakeQuantizeActivation.apply(x, -1, *qparams),
    ):
        x.grad = log_smoothing.grad = log_scale.grad = None
        output = function(x, log_smoothing, log_scale, zero_point)
        (output * slope).sum().backward()
        results.append((output, x.grad, log_smoothing.grad, log_scale.grad))
    (values, grad, *scales), (ours, our_grad, *our_scales) = results
    assert torch.equal(values, ours) and 0 < grad.count_nonzero() < grad.numel()
    assert torch.allclose(grad, our_grad, rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(scales, our_scales))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_batch_does_not_enter_a_range(bad: float) -> None:
    quantizer = trainer.ActivationFakeQuantizer(channels=2, channel_dim=-1)
    quantizer.observe(torch.tensor([[-1.0, 2.0]]))
    quantizer.observe(torch.tensor([[-50.0, bad], [70.0, 0.0]]))
    assert (quantizer.low.tolist(), quantizer.high.tolist()) == ([-1, 0], [0, 2])


def test_forward_passes_change_no_quantizer_state_outside_of_calibration() -> None:
    unet = calibrated_unet().train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.enable_gradient_checkpointing()
    unet(*(10 * part if part.is_floating_point() else part for part in unet_inputs())).sample.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_gradient_checkpointing_changes_neither_output_nor_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        unet = calibrated_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        output = unet(*unet_inputs()).sample
        output.square().mean().backward()
        results.append([output, *(parameter.grad for parameter in unet.parameters())])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results))


def test_one_input_is_quantized_once_for_all_layers_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs and ranges, and the same gradients but for the order of a sum, as each by itself."""
    results = []
    counting = mock.Mock(side_effect=trainer.fake_quantize_activation)
    monkeypatch.setattr(trainer, "fake_quantize_activation", counting)
    for consumers in (3, 1):
        unet = calibrated_unet()
        attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
        assert attention.to_q.observer.consumers == 3
        attention.to_q.observer.consumers = consumers
        counting.reset_mock()
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        sum(
            (k + 1) * layer(x).sum() for k, layer in enumerate((attention.to_q, attention.to_k, attention.to_v))
        ).backward()
        grid = attention.to_q.observer
        gradients = x.grad, grid.log_scale.grad, grid.log_smoothing.grad, attention.to_k.weight.grad
        results.append((counting.call_count, *gradients))
        assert attention.to_q.observer.cached is None  # nothing is kept in memory
    (once, *shared), (thrice, *alone) = results
    assert (once, thrice) == (1, 3)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(shared, alone))


def test_average_is_the_mean_of_all_steps_since_its_begin_by_diffusers_too() -> None:
    """Before, it is the latest weights. diffusers' EMAModel with a warm-up and no limit has the same decay."""
    begin, student = 5, nn.Linear(7, 5)
    average = trainer.AveragedModel(student, multi_avg_fn=trainer.get_swa_multi_avg_fn())
    state = trainer.TrainState(student, average=average, average_begin=begin)
    settings = {"decay": 1.0, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 1.0, "update_after_step": begin}
    theirs, weights = EMAModel(student.parameters(), **settings), []
    for _ in range(20):
        with torch.no_grad():
            student.weight.add_(torch.randn(5, 7))
        weights.append(student.weight.detach().clone())
        state.update_average()
        state.step += 1
        theirs.step(student.parameters())
        expected = torch.stack(weights[begin:]).mean(dim=0) if state.step > begin else weights[-1]
        assert torch.allclose(state.exported.weight, expected, atol=1e-6)
        assert torch.allclose(state.exported.weight, theirs.shadow_params[0], atol=1e-6)


# ---------------------------------------------------------------- compiled fake quantization


class OnCpu:
    device = torch.device("cpu")

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_fake_quantization_has_the_bits_of_the_written_one() -> None:
    """But for the gradients of steps, sums of which the compiler chooses the order."""
    generator = torch.Generator().manual_seed(0)
    for rows, channels in ((96, 40), (1, 33), (64, 64)):
        weight, x, grad = (torch.randn(rows, channels, generator=generator) for _ in range(3))
        factor = torch.rand(channels, generator=generator) + 0.5
        arguments = (weight, factor, torch.bfloat16)
        assert torch.equal(
            trainer.fake_quantize_weight.compiled(*arguments), trainer.fake_quantize_weight.eager(*arguments)
        )
        x, grad = (3 * x).bfloat16(), grad.bfloat16()
        grid = (factor, torch.tensor(0.01), torch.tensor(100, dtype=torch.int32))  # clips about two in three
        arguments = (x, *grid, torch.bfloat16)
        assert torch.equal(
            trainer.fake_quantize_activation.compiled(*arguments), trainer.fake_quantize_activation.eager(*arguments)
        )
        compiled, steps = trainer.lsq_backward.compiled(grad, x, *grid)
        expected, expected_steps = trainer.lsq_backward.eager(grad, x, *grid)
        assert torch.equal(compiled, expected) and 0 < expected.count_nonzero() < expected.numel()
        assert torch.allclose(steps, expected_steps, rtol=1e-4, atol=1e-4)


def test_fake_quantization_runs_uncompiled_where_it_does_not_pay_or_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*arguments: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(trainer.fake_quantize_activation, "compiled", no_compiler)
    assert not trainer.compile_fake_quantization(nn.Linear(2, 2), OnCpu()) and not caplog.records
    monkeypatch.setattr(trainer, "COMPILE_MIN_PARAMS", 1)
    assert not trainer.compile_fake_quantization(nn.Linear(2, 2), OnCpu())
    assert "uncompiled, which is slower: no C++ compiler" in caplog.text


@pytest.mark.full
def test_compiled_training_follows_uncompiled_training_and_resumes_to_the_same_bits(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bundled model: the mean loss of 20 steps to a thousandth."""
    losses, compute = [], trainer.compute_losses

    def noting(*arguments) -> dict[str, torch.Tensor]:
        computed = compute(*arguments)
        losses.append(computed["loss"].item())
        return computed

    monkeypatch.setattr(trainer, "compute_losses", noting)
    flags = ["--max_train_steps", "20", "--mixed_precision", "bf16", "--checkpointing_steps", "19", "--use_ema"]
    flags += ["--bias_learning_rate", "1e-6", "--quantizer_learning_rate", "1e-4"]  # bold steps magnify rounding
    with training_in_process(ROOT / "demo/tiny-stable-diffusion", data_dir) as run:
        run(tmp_path / "written", *flags)
        monkeypatch.setattr(trainer, "COMPILE_MIN_PARAMS", 1)
        whole = run(tmp_path / "compiled", *flags)
        assert "compiled the fake quantization" in caplog.text
        resumed = run(tmp_path / "compiled", *flags, "--resume_from_checkpoint", "latest")
    written, compiled = (torch.tensor(losses[start : start + 20]) for start in (0, 20))
    print(f"losses, written {written.tolist()}, compiled {compiled.tolist()}")
    assert len(losses) == 41 and compiled.mean().item() == pytest.approx(written.mean().item(), rel=1e-3)
    assert torch.allclose(compiled, written, rtol=0.02)
    assert equal_states(whole, resumed)


# ---------------------------------------------------------------- prepare and convert


def test_prepare_swaps_all_layers_but_those_kept_in_float() -> None:
    unet = prepared_unet()
    layers = {name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    fake = {name for name in layers if isinstance(unet.get_submodule(name), trainer.FakeInt8)}
    kept = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert layers - fake == kept | {name for name in layers if name.endswith("conv_shortcut")}
    weight_only = {
        name for name in fake if not isinstance(unet.get_submodule(name).observer, trainer.ActivationFakeQuantizer)
    }
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn2.to_k", f"{block}.attn2.to_v", f"{block}.ff.net.2"} <= weight_only
    assert {f"{block}.attn2.to_q", f"{block}.attn1.to_q", f"{block}.ff.net.0.proj"} <= fake - weight_only
    assert len(fake - weight_only) > len(weight_only)


def test_one_quantizer_for_an_input_that_several_layers_read() -> None:
    block = prepared_unet("--keep_float").mid_block.attentions[0].transformer_blocks[0]
    own, cross = block.attn1, block.attn2
    assert own.to_q.observer is own.to_k.observer is own.to_v.observer
    assert cross.to_k.observer is cross.to_v.observer is not cross.to_q.observer


def test_prepared_unet_computes_the_same_until_it_is_calibrated() -> None:
    torch.manual_seed(1)
    expected = tiny_unet()(*unet_inputs()).sample
    assert torch.equal(prepared_unet()(*unet_inputs()).sample, expected)


def test_smoothing_evens_out_outlier_channels() -> None:
    """A channel 200 times the others, whose weights are that much smaller, costs no precision of the others."""
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    outlier = torch.ones(16)
    outlier[3] = 200
    errors = []
    for scale in (torch.ones(16), outlier):
        layer = trainer.FakeInt8Linear.from_float(nn.Linear(16, 8), quantize_input=True)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 128).view(8, 16) / scale)
        expected = layer(x * scale)
        layer.mode = "observe"
        layer(x * scale)
        trainer.init_smoothing_scales(nn.ModuleList([layer]))
        layer.observer.compute_qparams()
        layer.mode = "quantize"
        errors.append((layer(x * scale) - expected).square().mean().sqrt().item())
    assert errors[0] < 0.02 and errors[1] < 1.5 * errors[0]


def test_smoothing_leaves_the_size_of_weights_and_unused_channels_alone() -> None:
    layer = trainer.FakeInt8Linear.from_float(nn.Linear(6, 4), quantize_input=True)
    before = layer.weight.detach().clone()
    x = torch.randn(32, 6) * torch.tensor([100.0, 1, 1, 1, 0.01, 0])
    layer.mode = "observe"
    layer(x)
    trainer.init_smoothing_scales(nn.ModuleList([layer]))
    factor = layer.observer.smoothing_scale
    assert factor[5] == 1 and factor.log().mean().item() == pytest.approx(0, abs=1e-5)
    assert factor[0] > 10 and factor[4] < 0.1
    assert torch.equal(layer.weight, before)


def test_convert_stores_int8_weights_and_half_precision_for_layers_kept_in_float() -> None:
    unet = calibrated_unet()
    conv = unet.get_submodule("down_blocks.0.resnets.0.conv1")
    original = (conv.weight * trainer.per_input_channel(conv.observer.smoothing_scale, conv.weight)).detach()
    state = convert(unet).state_dict()
    stored = state["down_blocks.0.resnets.0.conv1.weight"]
    scale = state["down_blocks.0.resnets.0.conv1.weight_scale"]
    assert stored.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.allclose(stored * scale.view(-1, 1, 1, 1), original, atol=scale.max().item() / 2 * 1.001)
    tensors = {name.rpartition(".")[2] for name in state if name.startswith("down_blocks.0.resnets.0.conv1.")}
    assert tensors == {"weight", "weight_scale", "bias", "input_scale", "input_zero_point", "input_factor"}
    tensors = {name.rpartition(".")[2] for name in state if name.startswith("down_blocks.0.resnets.0.time_emb_proj.")}
    assert tensors == {"weight", "weight_scale", "input_factor", "bias"} and state["conv_in.weight"].dim() == 4
    assert state["conv_in.weight"].dtype == torch.float16
    assert state["down_blocks.0.resnets.0.norm1.weight"].dtype == torch.float32
    assert not any(name.endswith(trainer.LEARNED_QPARAMS) for name in state)


def test_a_weight_too_large_for_fp16_stays_fp32() -> None:
    unet = calibrated_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = 1e6
    assert convert(unet).state_dict()["conv_in.weight"].dtype == torch.float32


def test_recipe_survives_its_json(tmp_path: Path) -> None:
    config = trainer.quantization_config(parse("--keep_float", "conv_in", r"mid_block\..*"), tiny_unet())
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(config.to_dict()))
    again = trainer.quantization_config(parse("--quantization_config", str(file)), tiny_unet())
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["local"]["conv_in"] == {"w_dtype": "fp32", "act_dtype": "fp32"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("conv_inn", "matches none"), ("(", "no regular expression"), (".*", "nothing to quantize")],
)
def test_recipe_refuses_patterns_that_cannot_be_meant(pattern: str, message: str) -> None:
    with pytest.raises(trainer.UsageError, match=message):
        trainer.quantization_config(parse("--keep_float", pattern), tiny_unet())


def test_recipe_refuses_a_key_that_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"global": {"w_dtyp": "fp32", "act_dtype": "fp32"}}))
    with pytest.raises(trainer.UsageError, match="--quantization_config .*w_dtyp"):
        trainer.quantization_config(parse("--quantization_config", str(file)), tiny_unet())


def test_recipe_with_no_pattern_quantizes_every_layer() -> None:
    unet = tiny_unet()
    mapping = trainer.quantization_config(parse("--keep_float"), unet)
    mapping = mapping.to_config_mapping(model_info=mapping.get_model_info(unet))
    assert {config.w_dtype for config in mapping.values()} == {"int8"}


# ---------------------------------------------------------------- data


def test_images_become_rgb_as_a_viewer_shows_them() -> None:
    grey = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert trainer.to_rgb(grey).getpixel((0, 0)) == (155, 155, 155)  # 40000 / 65535 * 255, not clipped to white
    assert trainer.to_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert trainer.to_rgb(Image.new("LA", (4, 4), (0, 128))).getpixel((0, 0)) == pytest.approx((127,) * 3, abs=1)
    assert trainer.to_rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    rotated = Image.new("RGB", (6, 4))
    exif = rotated.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    rotated.info["exif"] = exif.tobytes()
    assert trainer.to_rgb(rotated).size == (4, 6)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (3, 900), (64, 64), (1, 1)])
def test_crops_are_square_and_stay_inside(size: tuple[int, int]) -> None:
    for position in ((0, 0), (0.5, 0.5), (1, 1)):
        assert trainer.crop_to_square(Image.new("RGB", size), 64, position)[0].size == (64, 64)


def test_center_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (300, 100))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    assert np.asarray(trainer.crop_to_square(image, 50, (0.5, 0.5))[0])[:, 2:-2].reshape(-1, 3).min(axis=0)[0] > 250


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there are no images: is it the right folder"),
        ({"a.jpg": "", "a.txt": ""}, "run python create_metadata.py"),
        ({"metadata.jsonl": "{}", "metadata.csv": ""}, "delete one"),
        ({"00000.tar": ""}, "--streaming"),
        ({"metadata.jsonl": '{"file_name": "a.jpg"}'}, "no 'text' among file_name"),
        ({"metadata.jsonl": '{"file_name": "../a.jpg", "text": ""}'}, "outside the folder"),
        ({"metadata.jsonl": '{"file_name": "/etc/a.jpg", "text": ""}'}, "outside the folder"),
        ({"metadata.jsonl": "{broken"}, "after row 0: .*; mend that row"),
        ({"metadata.jsonl": "{broken", ".create_metadata.sha256": ""}, "write it again"),
        ({"metadata.jsonl": "\n"}, "has no rows"),
    ],
)
def test_metadata_that_cannot_work_is_named_with_the_remedy(tmp_path: Path, files: dict, message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(trainer.UsageError, match=message):
        trainer.read_metadata(tmp_path, "file_name", "text")


def test_csv_captions_stay_text(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jpg,null\nb.jpg,1984\n"c.jpg","a, ""b"""\n')
    captions = [caption for _, caption in trainer.read_metadata(tmp_path, "file_name", "text")]
    assert captions == ["null", "1984", 'a, "b"']


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    def rows(seed: int, numbers: range) -> list[tuple[int, int]]:
        return [key for batch in trainer.ResumableBatchSampler(11, 2, seed, numbers) for key in batch]

    whole = rows(0, range(11))  # 22 samples: two epochs
    assert sorted(row for epoch, row in whole if epoch == 0) == list(range(11))
    assert sorted(row for epoch, row in whole if epoch == 1) == list(range(11))
    assert rows(0, range(11)) == whole != rows(1, range(11))
    assert rows(0, range(4, 11)) == whole[8:]  # a resumed run
    first, second = rows(0, range(0, 10, 2)), rows(0, range(1, 10, 2))  # two processes
    halves = [first[i : i + 2] + second[i : i + 2] for i in range(0, 10, 2)]
    assert sum(halves, []) == whole[:20]


def dataset_of(rows: list[tuple[str, str]], *flags: str) -> trainer.CaptionedImages:
    return trainer.CaptionedImages(rows, [tiny_pipeline().tokenizer], parse("--resolution", "32", *flags))


def test_unreadable_image_is_replaced_and_counted(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    rows = [(str(tmp_path / "bad.jpg"), "bad"), (str(data_dir / "0001.jpg"), "good")]
    dataset = dataset_of(rows, "--proportion_empty_prompts", "0")
    sample, good = dataset[(0, 0)], dataset[(0, 1)]
    assert sample["replaced"].item() >= 1 and good["replaced"].item() == 0
    assert torch.equal(sample["input_ids"], good["input_ids"])  # the caption goes with its image


def test_too_many_unreadable_images_stop_the_run() -> None:
    watch = trainer.RunMonitor()
    losses = {"loss": torch.tensor(1.0)}
    watch.update(losses, batch_of(torch.tensor([1] * 11 + [0] * 29)))  # it may be a tenth, and bad luck
    with pytest.raises(trainer.UsageError, match="16 of 45 images could not be read, first a.jpg: spoilt; mend them"):
        watch.update(losses, batch_of(torch.tensor([1] * 5)))
    with pytest.raises(trainer.UsageError, match="1 of 2 images could not be read"):
        trainer.RunMonitor().update(losses, batch_of(torch.tensor([trainer.MAX_TRIES, 0])))


def test_samples_are_a_function_of_seed_epoch_and_row(data_dir: Path) -> None:
    rows = [(str(data_dir / "0001.jpg"), "one")]
    flags = ["--random_flip", "--seed", "5"]
    first, again = dataset_of(rows, *flags), dataset_of(rows, *flags)
    assert torch.equal(first[(3, 0)]["pixel_values"], again[(3, 0)]["pixel_values"])
    assert any(not torch.equal(first[(3, 0)]["pixel_values"], first[(e, 0)]["pixel_values"]) for e in range(4, 8))
    assert first[(0, 0)]["pixel_values"].shape == (3, 32, 32)
    assert first[(0, 0)]["pixel_values"].abs().max() <= 1


def test_empty_prompts_take_their_share(data_dir: Path) -> None:
    dataset = dataset_of([(str(data_dir / "0001.jpg"), "one")], "--proportion_empty_prompts", "0.5")
    empty = dataset.tokenize([""])[0]
    share = sum(torch.equal(dataset[(epoch, 0)]["input_ids"], empty) for epoch in range(100))
    assert 35 <= share <= 65


# ---------------------------------------------------------------- losses


def test_targets_follow_the_prediction_type() -> None:
    latents, noise, timesteps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([10, 900])
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = trainer.DDPMScheduler(prediction_type=kind)
        target = trainer.training_target(scheduler, latents, noise, timesteps)
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]
        assert torch.allclose(target, expected, atol=1e-5)


def test_min_snr_bounds_the_weight_of_easy_timesteps() -> None:
    scheduler = trainer.DDPMScheduler()
    output, target = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
    easy, hard = torch.tensor([1]), torch.tensor([990])
    snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))[1].item()
    assert trainer.task_loss(output, target, scheduler, easy, None).item() == 1
    assert trainer.task_loss(output, target, scheduler, easy, 5.0).item() == pytest.approx(5 / snr, rel=1e-4)
    assert trainer.task_loss(output, target, scheduler, hard, 5.0).item() == pytest.approx(1)


# ---------------------------------------------------------------- whole runs


def equal_states(first: dict, second: dict) -> bool:
    first, second = first["state_dict"], second["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_run_ends_with_the_same_bits(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "5", "--use_ema", "--gradient_accumulation_steps", "2", "--random_flip"]
    flags += ["--learning_rate", "3e-2", "--lr_scheduler", "cosine", "--checkpointing_steps", "2"]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "broken", *flags)
    (tmp_path / "broken" / "quant_model.pt").unlink()
    (tmp_path / "broken" / "checkpoint-4").rename(tmp_path / "broken" / "checkpoint-4.partial")  # was being written
    resumed = train(tmp_path / "broken", *flags, "--resume_from_checkpoint", "latest")
    assert equal_states(whole, resumed)
    assert whole["training"]["losses"] == resumed["training"]["losses"]


def test_run_killed_between_its_last_checkpoint_and_the_end_writes_the_same_file(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "2", "--checkpointing_steps", "2"]
    whole = train(tmp_path, *flags)
    resumed = train(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert whole["training"]["losses"] and whole["training"] == resumed["training"]
    assert whole["checksum"] == resumed["checksum"]


def test_cached_latents_train_the_same_model_and_are_encoded_once(train, data_dir, tmp_path: Path, monkeypatch) -> None:
    flags = ["--max_train_steps", "4", "--center_crop", "--checkpointing_steps", "2", "--learning_rate", "3e-2"]
    flags += ["--max_train_samples", "2", "--proportion_empty_prompts", "0.5", "--random_flip", "--use_ema"]
    flags += ["--train_batch_size", "1"]  # pairs are encoded one by one: the bits of another size may differ
    encoded, encode = [], trainer.encode
    counted = lambda pipeline, batch, device: encoded.append("latents" not in batch) or encode(pipeline, batch, device)  # noqa: E731
    monkeypatch.setattr(trainer, "encode", counted)
    plain = train(tmp_path / "plain", *flags)
    assert encoded == [True] * (3 + 4)  # of calibration and training
    encoded.clear()
    cached = train(tmp_path / "cached", *flags, "--cache_latents")
    (folder,) = (tmp_path / "cached").glob("latents-*")
    assert encoded == [True] * len(list(folder.iterdir())) + [False] * (3 + 4)
    assert equal_states(plain, cached)
    for removed in (tmp_path / "cached" / "checkpoint-4", next(folder.iterdir())):
        removed.rename(removed.with_suffix(".partial"))
    encoded.clear()
    resumed = train(tmp_path / "cached", *flags, "--cache_latents", "--resume_from_checkpoint", "latest")
    assert sum(encoded) == 1 and equal_states(cached, resumed)
    (tmp_path / "cached" / "checkpoint-4").rename(tmp_path / "cached" / "checkpoint-4.partial")
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(trainer.UsageError, match="is damaged .*: delete it and resume"):
        train(tmp_path / "cached", *flags, "--cache_latents", "--resume_from_checkpoint", "latest")


def test_cached_latents_are_not_those_of_another_dataset(train, data_dir: Path, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "1", "--center_crop", "--cache_latents"]
    for more in ([], [], ["--resolution", "16"], ["--max_train_samples", "3"]):
        train(tmp_path, *flags, *more)
    assert len(list(tmp_path.glob("latents-*"))) == 3


@pytest.mark.parametrize("flags", [["--random_flip"], ["--center_crop", "--streaming", "--max_train_steps", "1"]])
def test_latents_are_cached_only_where_a_pair_has_one_crop(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--cache_latents", *flags)
    assert left.value.code == 2 and "give --center_crop, and no --streaming" in capsys.readouterr().err


def test_full_disk_while_latents_are_cached_is_named(train, tmp_path: Path, monkeypatch) -> None:
    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(trainer.TrainingError, match=r"latents-\w+/.*.pt was not written: .*No space left"):
        train(tmp_path, "--max_train_steps", "1", "--center_crop", "--cache_latents")


def test_data_workers_do_not_change_the_result(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "2", "--random_flip"]
    alone = train(tmp_path / "alone", *flags)
    assert equal_states(alone, train(tmp_path / "workers", *flags, "--dataloader_num_workers", "2"))


def test_gradient_checkpointing_gives_the_same_weights_and_ranges(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "3", "--use_ema", "--learning_rate", "3e-2", "--quantizer_learning_rate", "0.1"]
    plain = train(tmp_path / "plain", *flags)
    checkpointed = train(tmp_path / "checkpointed", *flags, "--gradient_checkpointing")
    assert equal_states(plain, checkpointed)


def test_zero_steps_is_post_training_quantization_and_training_changes_it(train, tmp_path: Path) -> None:
    ptq = train(tmp_path / "ptq", "--max_train_steps", "0")
    qat = train(tmp_path / "qat", "--max_train_steps", "3", "--learning_rate", "1e-2")
    assert ptq["training"]["steps"] == 0 and qat["training"]["steps"] == 3
    name = "mid_block.resnets.0.conv1"
    assert not torch.equal(ptq["state_dict"][f"{name}.weight"], qat["state_dict"][f"{name}.weight"])
    assert ptq["state_dict"][f"{name}.input_scale"] != qat["state_dict"][f"{name}.input_scale"]


@pytest.mark.parametrize("power", [1, 2])
def test_every_step_has_timesteps_of_each_part_of_the_schedule(power: int) -> None:
    scheduler, generator = trainer.DDPMScheduler(num_train_timesteps=1000), torch.Generator().manual_seed(0)
    for count, parts in ((4, 1), (1, 4), (5, 2), (1, 1)):
        steps = []
        for _ in range(200):
            micro_batches = [
                trainer.sample_timesteps(scheduler, count, (i, parts), power, generator) for i in range(parts)
            ]
            steps.append(torch.cat(micro_batches))
        steps = torch.stack(steps)
        edges = (torch.arange(count * parts + 1).double() / (count * parts)) ** power * 1000
        assert (steps >= edges[:-1].floor()).all() and (steps < edges[1:]).all()
        assert 0 <= steps.min() < 20 and 980 < steps.max() < 1000  # and all of each part is used
        assert (steps < 1000 * 0.5**power).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_each_learning_rate_moves_its_own_parameters(train, tmp_path: Path) -> None:
    ptq = train(tmp_path / "ptq", "--max_train_steps", "0")["state_dict"]
    rates = ["--learning_rate", "--bias_learning_rate", "--quantizer_learning_rate"]
    for moving in rates:
        flags = [word for rate in rates for word in (rate, "1e-2" if rate == moving else "0")]
        qat = train(tmp_path / moving.strip("-"), "--max_train_steps", "2", *flags)["state_dict"]
        for name, tensor in qat.items():
            vector = name.endswith(("bias", "norm1.weight", "norm_out.weight"))
            grid = name.endswith(("conv1.input_scale", "conv1.input_factor"))
            weight = name.endswith("conv_in.weight")  # the levels of int8 weights follow the factors, too
            kind = rates[2] if grid else rates[1] if vector else rates[0] if weight else None
            if kind is not None:
                assert torch.equal(tensor, ptq[name]) == (kind != moving), (moving, name)


def test_weights_move_in_proportion_to_their_size(train, tmp_path: Path, monkeypatch) -> None:
    moving, before, make = {}, {}, trainer.create_train_state

    def remember(student, *rest):
        student.conv_in.weight.data.mul_(8)
        for name in ("conv_in", "conv_out", "down_blocks.0.resnets.0.conv1"):
            moving[name] = student.get_submodule(name).weight
            before[name] = moving[name].detach().clone()
        return make(student, *rest)

    monkeypatch.setattr(trainer, "create_train_state", remember)
    train(tmp_path, "--max_train_steps", "1", "--learning_rate", "1e-2", "--lr_scheduler", "constant")
    for name, weight in moving.items():  # by the rate, whatever the gradient: Adam's first step
        step, size = (weight - before[name]).abs(), before[name].abs().median().item()
        assert step.median().item() == pytest.approx(1e-2 * size, rel=0.01), name
    assert trainer.median_magnitude(torch.zeros(2, 2)) == 1e-3  # zeros learn, too


def test_frozen_ranges_stay_as_calibrated(train, tmp_path: Path) -> None:
    ptq = train(tmp_path / "ptq", "--max_train_steps", "0")
    qat = train(tmp_path / "qat", "--max_train_steps", "3", "--quantizer_learning_rate", "0", "--use_ema")
    grids = [name for name in ptq["state_dict"] if name.endswith(("input_scale", "input_factor"))]
    assert grids and all(torch.equal(ptq["state_dict"][name], qat["state_dict"][name]) for name in grids)


def test_factors_learn_in_the_first_third_and_the_average_begins_there(train, tmp_path: Path, monkeypatch) -> None:
    weights, factors, averages = [], [], []
    update = trainer.TrainState.update_average

    def spy(state: trainer.TrainState) -> None:
        update(state)
        conv = state.student.get_submodule("mid_block.resnets.0.conv1")
        index = next(i for i, parameter in enumerate(state.student.parameters()) if parameter is conv.weight)
        weights.append(conv.weight.detach().clone())
        factors.append(conv.observer.smoothing_scale)
        averages.append(list(state.exported.parameters())[index].clone())

    monkeypatch.setattr(trainer.TrainState, "update_average", spy)
    saved = train(tmp_path, "--max_train_steps", "9", "--use_ema", "--learning_rate", "1e-2")["state_dict"]
    same = [torch.equal(before, after) for before, after in zip(factors, factors[1:])]
    assert same == [False] * 2 + [True] * 6
    assert torch.equal(saved["mid_block.resnets.0.conv1.input_factor"], factors[-1])
    assert torch.equal(averages[2], weights[2])
    assert torch.allclose(averages[-1], torch.stack(weights[3:]).mean(dim=0), atol=1e-6)


def test_distillation_brings_the_student_closer_to_the_teacher(train, tmp_path: Path, monkeypatch) -> None:
    losses = []
    monkeypatch.setattr(trainer.Accelerator, "log", lambda self, values, step: losses.append(values["kd_loss"]))
    flags = ["--keep_float", "--max_train_samples", "2", "--learning_rate", "1e-3", "--proportion_empty_prompts", "0"]
    train(tmp_path, *flags, "--max_train_steps", "40")
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) + math.log(0.7)


def test_exported_weights_are_the_averaged_ones_with_their_own_scales(train, tmp_path: Path, monkeypatch) -> None:
    seen = {}
    save = trainer.save_int8

    def spy(state, *rest):
        conv = state.student.get_submodule("mid_block.resnets.0.conv1")
        averages = dict(zip(state.student.parameters(), state.average.parameters()))
        for name, of in {"live": lambda parameter: parameter, "average": averages.get}.items():
            factor = trainer.per_input_channel(of(conv.observer.log_smoothing).exp(), conv.weight)
            seen[name] = (of(conv.weight) * factor).detach()
        return save(state, *rest)

    monkeypatch.setattr(trainer, "save_int8", spy)
    saved = train(tmp_path, "--max_train_steps", "4", "--use_ema", "--learning_rate", "1e-2")["state_dict"]
    levels, scale = trainer.quantize_weight(seen["average"])
    assert torch.equal(saved["mid_block.resnets.0.conv1.weight"], levels)
    assert torch.equal(saved["mid_block.resnets.0.conv1.weight_scale"], scale)
    assert not torch.equal(trainer.quantize_weight(seen["live"])[1], scale)


@pytest.mark.parametrize("accumulation", ["1", "4"])
@pytest.mark.parametrize("length", [["--max_train_steps", "3"], ["--num_train_epochs", "1"]])
def test_schedule_ends_with_the_last_step(train, tmp_path: Path, monkeypatch, accumulation: str, length: list) -> None:
    rates = []
    monkeypatch.setattr(trainer.Accelerator, "log", lambda self, values, step: rates.append(values["lr"]))
    flags = ["--lr_scheduler", "linear", "--learning_rate", "1e-4", "--gradient_accumulation_steps", accumulation]
    saved = train(tmp_path, *flags, *length)
    assert rates[-1] == 0 and rates[-2] > 0
    assert len(rates) == saved["training"]["steps"]
    if "--num_train_epochs" in length:
        assert len(rates) == math.ceil(11 / (2 * int(accumulation)))


def test_memory_is_foretold_and_refused_before_the_unet_is_loaded(train, tmp_path: Path, caplog, monkeypatch) -> None:
    caplog.set_level("INFO")
    pipeline = tiny_pipeline()
    unet, text, vae = (sum(p.numel() for p in part.parameters()) for part in
                       (pipeline.unet, pipeline.text_encoder, pipeline.vae))  # fmt: skip
    monkeypatch.setattr(trainer, "unet_size", lambda args: 1000 * unet)
    for flags, copies in ((["1", "--use_ema"], 6), (["1"], 5), (["1", "--mixed_precision", "bf16"], 4.5), (["0"], 1)):
        train(tmp_path, "--max_train_steps", *flags)
        size = 4e-9 * (1000 * copies * unet + text + vae)
        assert f"about {size:.1f} GB for weights" in caplog.text and size > 1, flags
        caplog.clear()
    monkeypatch.setattr(trainer.psutil, "virtual_memory", lambda: SimpleNamespace(total=5.5 * 4000 * unet))
    monkeypatch.setattr(trainer, "load_part", refuse_unet(trainer.load_part))
    with pytest.raises(trainer.UsageError, match="GB for weights, gradients, two moments, average, teacher") as refused:
        train(tmp_path, "--max_train_steps", "1", "--use_ema")
    would_do = [f"{4e-9 * (1000 * copies * unet + text + vae):.1f} GB" for copies in (5, 1)]
    assert f"without --use_ema {would_do[0]} or with --max_train_steps 0 {would_do[1]} would do" in str(refused.value)
    monkeypatch.setattr(trainer.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000 * unet))
    with pytest.raises(
        trainer.UsageError, match="GB for weights, beside activations, and cpu has .* nothing less would"
    ):
        train(tmp_path, "--max_train_steps", "0")


def refuse_unet(load_part):
    def load(name, index, part, *rest):
        assert part != "unet", "loaded before the memory was looked at"
        return load_part(name, index, part, *rest)

    return load


def test_post_training_holds_one_copy_of_the_weights(train, tmp_path: Path, monkeypatch) -> None:
    seen = []
    save = trainer.save_int8

    def spy(state, *rest):
        seen.append(state)
        assert not any(parameter.requires_grad for name, parameter in state.student.named_parameters()
                       if not name.endswith(trainer.LEARNED_QPARAMS))  # fmt: skip
        return save(state, *rest)

    monkeypatch.setattr(trainer, "save_int8", spy)
    copied, deepcopy = [], trainer.copy.deepcopy
    monkeypatch.setattr(trainer.copy, "deepcopy", lambda part, *rest: copied.append(part) or deepcopy(part, *rest))
    train(tmp_path, "--max_train_steps", "0")
    assert seen[0].parts().keys() == {"student"} and not any(isinstance(part, nn.Module) for part in copied)


def test_a_step_that_is_not_finite_is_left_out_and_counted(train, tmp_path: Path, monkeypatch, caplog) -> None:
    calls, loss = [], trainer.log_distance

    def sometimes_nan(*tensors):
        calls.append(1)
        return loss(*tensors) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(trainer, "log_distance", sometimes_nan)
    saved = train(tmp_path, "--max_train_steps", "3", "--use_ema")
    assert "1 non-finite steps left out" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())


def test_non_finite_losses_in_a_row_end_the_run(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "log_distance", lambda ours, theirs: ours.mean() * math.nan)
    with pytest.raises(trainer.TrainingError, match="5 non-finite losses in a row"):
        train(tmp_path, "--max_train_steps", "9")


def test_oldest_checkpoints_are_deleted_and_numbers_sort_as_numbers(train, tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "11", "--checkpointing_steps", "1", "--checkpoints_total_limit", "3")
    assert [path.name for path in trainer.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert not list(tmp_path.glob("*.partial"))


def test_new_run_in_an_old_folder_keeps_its_own_checkpoints(train, tmp_path: Path) -> None:
    for steps in ("4", "2"):
        train(tmp_path, "--max_train_steps", steps, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [path.name for path in trainer.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_resuming_with_other_settings_is_refused(train, tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "1")
    with pytest.raises(trainer.UsageError, match=r"learning_rate \(then 1e-05, now 0.1\)"):
        train(tmp_path, "--max_train_steps", "3", "--learning_rate", "0.1", "--resume_from_checkpoint", "latest")


def test_checkpoint_of_another_version_is_refused_as_such(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_VERSION", "1")
    train(tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    monkeypatch.undo()
    with pytest.raises(trainer.UsageError, match="checkpoint-1 is of another version of this script: resume with that"):
        train(tmp_path, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")


def test_damaged_checkpoint_is_named(train, tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    state = tmp_path / "checkpoint-1" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(trainer.UsageError, match="checkpoint-1/state.pt is damaged"):
        train(tmp_path, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")


def test_failed_checkpoint_keeps_the_earlier_one(train, tmp_path: Path, monkeypatch) -> None:
    save = trainer.TrainState.save

    def full_disk(self, path: Path) -> None:
        if self.step == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(trainer.TrainState, "save", full_disk)
    with pytest.raises(trainer.TrainingError, match="No space left"):
        train(tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "1")
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1"]


def test_sigterm_saves_a_checkpoint_and_leaves_with_its_code(train, tmp_path: Path, monkeypatch) -> None:
    after_step = trainer.after_step

    def terminate(state, *rest):
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        after_step(state, *rest)

    monkeypatch.setattr(trainer, "after_step", terminate)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, "--max_train_steps", "5")
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in trainer.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_validation_generates_teacher_and_student_side_by_side(train, tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "1", "--validation_prompts", "one", "two", "--use_ema")
    files = sorted((tmp_path / "validation").iterdir())
    assert [path.name for path in files] == ["step-000001-prompt-0.png", "step-000001-prompt-1.png"]
    pixels = np.asarray(Image.open(files[0]), dtype=float)
    assert pixels.shape == (SIZE, 2 * SIZE, 3)
    assert 0 < np.abs(pixels[:, :SIZE] - pixels[:, SIZE:]).mean() < 2  # levels; it is 0.5


def test_all_losses_can_be_used_in_bf16(train, tmp_path: Path) -> None:
    flags = ["--task_weight", "0.5", "--feature_kd_weight", "0.1", "--snr_gamma", "5", "--mixed_precision", "bf16"]
    saved = train(tmp_path, "--max_train_steps", "2", *flags)
    losses = saved["training"]["losses"]
    expected = losses["kd_loss"] + 0.5 * losses["task_loss"] + 0.1 * losses["feature_kd_loss"]
    assert losses["loss"] == pytest.approx(expected, rel=1e-3)


def test_validation_changes_no_bit_of_the_training(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "3", "--feature_kd_weight", "1", "--validation_steps", "1"]
    plain = train(tmp_path / "plain", *flags)
    validated = train(tmp_path / "validated", *flags, "--validation_prompts", "one")
    assert equal_states(plain, validated) and plain["training"]["losses"] == validated["training"]["losses"]


def test_dataset_columns_are_checked(model_dir: Path, tmp_path: Path) -> None:
    import datasets

    images = [Image.new("RGB", (40, 40), (20 * i, 0, 0)) for i in range(3)]
    table = datasets.Dataset.from_dict({"picture": images, "words": ["a", "b", "c"]})
    table = table.cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    pipeline = tiny_pipeline()
    args = parse("--dataset_name", str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--resolution", "32")
    with pytest.raises(trainer.UsageError, match="--caption_column text is none of picture, words"):
        trainer.load_dataset(args, [pipeline.tokenizer])
    flags = ["--image_column", "picture", "--caption_column", "words", "--max_train_samples", "2"]
    args = parse("--dataset_name", str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--resolution", "32", *flags)
    dataset = trainer.load_dataset(args, [pipeline.tokenizer])
    assert len(dataset) == 2 and dataset.pair(1)[1] == ["b"]
    assert dataset[(0, 1)]["pixel_values"][0].mean().item() == pytest.approx(20 / 127.5 - 1, abs=0.01)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "510"], "504 would do"),
        (["--mixed_precision", "fp16", "--use_cpu"], "bf16"),
        (["--kd_weight", "0"], "must not all be zero"),
        (["--train_batch_size", "0"], "--train_batch_size: must be at least 1"),
        (["--train_data_dir", "/nowhere"], "either --train_data_dir"),
        (["--quantization_config", "/nowhere.json"], "no such file"),
        (["--proportion_empty_prompts", "2"], "between 0 and 1"),
        (["--report_to", "wandb", "--hub_token", "secret"], "would be shown"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_the_remedy(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        parse(*flags)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_other_kinds_of_model_are_refused(train, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(trainer.UsageError, match="StableDiffusion3Pipeline"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path))


def test_model_that_is_not_there_is_named(train, tmp_path: Path) -> None:
    with pytest.raises(trainer.UsageError, match=str(tmp_path / "nothing")):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("capabilities", "bf16_above", "told", "precision"),
    [
        ({"avx512_bf16": True}, 0, "no", "bf16"),
        ({"amx_bf16": True}, 0, "no", "bf16"),
        ({"avx512_bf16": True}, trainer.BF16_MIN_PARAMS, "no", "no"),  # a small UNet
        ({}, 0, "no", "no"),
        ({}, 0, "bf16", "bf16"),  # by accelerate launch
    ],
)
def test_bf16_is_for_large_unets_where_the_hardware_computes_in_it(
    capabilities: dict, bf16_above: int, told: str, precision: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(trainer, "BF16_MIN_PARAMS", bf16_above)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    args = parse("--pretrained_model_name_or_path", str(model_dir), "--use_cpu")
    assert trainer.choose_precision(args) == precision
    args.mixed_precision = "fp16"
    assert trainer.choose_precision(args) == "fp16"


def test_unet_is_counted_from_its_config_alone(model_dir: Path, tmp_path: Path) -> None:
    args = parse("--pretrained_model_name_or_path", str(model_dir))
    unet = trainer.UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    assert trainer.unet_size(args) == sum(parameter.numel() for parameter in unet.parameters())
    args.pretrained_model_name_or_path = str(tmp_path)  # load_pipeline says what is wrong with it
    assert trainer.unet_size(args) == 0


def test_run_is_not_resumed_in_another_precision(train, tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    with pytest.raises(trainer.UsageError, match="mixed_precision .then no, now bf16."):
        train(tmp_path, "--max_train_steps", "2", "--mixed_precision", "bf16", "--resume_from_checkpoint", "latest")


def test_cores_are_used_where_only_the_launcher_asked_for_one_thread() -> None:
    child = "import train_text_to_image_qat as t, torch; t.use_all_cores(); print('threads', torch.get_num_threads())"
    launcher = (
        "import os, subprocess, sys;"
        "environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_MIXED_PRECISION': 'no'};"
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], env=environment, text=True))"
    )
    cores = min(trainer.psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))
    # the user's own choice is kept; what only the launcher set is not
    for environment, threads in ((["OMP_NUM_THREADS=1"], 1), (["-u", "OMP_NUM_THREADS"], cores)):
        result = run_command("env", *environment, sys.executable, "-c", launcher)
        assert f"threads {threads}" in result.stdout
    # a shell that exports it after it was started: its environment does not show it
    exported = f'export OMP_NUM_THREADS=1; "{sys.executable}" -c "{child}"; true'
    result = run_command("env", "-u", "OMP_NUM_THREADS", "-u", "ACCELERATE_MIXED_PRECISION", "bash", "-c", exported)
    assert "threads 1" in result.stdout
