"""What was trained is what runs: from the student in its last step, through quant_model.pt, to the int8 UNet."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import text2images
import train_text_to_image_qat as trainer
from models import unet_inputs

BOLD = ["--use_ema", "--learning_rate", "3e-2", "--quantizer_learning_rate", "0.1"]  # every step shows


@pytest.fixture
def exported(train, tmp_path: Path, monkeypatch) -> argparse.Namespace:
    """A run of four bold steps with an average: the live student, the average, and the file that was written."""
    seen, save = argparse.Namespace(path=tmp_path / "out"), trainer.save_int8

    def spy(state: trainer.TrainState, *rest: Any) -> Path:
        seen.live = copy.deepcopy(state.student).eval()
        seen.student = copy.deepcopy(state.exported).eval()
        return save(state, *rest)

    monkeypatch.setattr(trainer, "save_int8", spy)
    seen.state = train(seen.path, *BOLD, "--max_train_steps", "4", "--gradient_checkpointing")["state_dict"]
    return seen


@torch.no_grad()
def test_int8_unet_from_the_file_computes_what_the_averaged_student_did(exported: argparse.Namespace) -> None:
    """At any batch and image size. Sums in another order move single values over a rounding border, no more."""
    for layer in exported.student.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not isinstance(layer, trainer.FakeInt8):
            layer.weight.copy_(layer.weight.half())  # kept in float, stored as fp16
    payload = text2images.read_quant_model(exported.path)
    unet = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
    for batch, height, width in [(1, 16, 16), (2, 16, 16), (3, 16, 16), (1, 8, 8), (2, 32, 32), (3, 8, 24)]:
        noisy_latents, timesteps, encoder_hidden_states = unet_inputs(batch, max(height, width))
        inputs = noisy_latents[:, :, :height, :width].contiguous(), timesteps, encoder_hidden_states
        expected = exported.student(*inputs).sample
        others = unet(*inputs)[0], exported.live(*inputs).sample, torch.zeros_like(expected)
        int8, live, nothing = ((output - expected).square().mean().sqrt() for output in others)
        assert int8 < 0.03 * nothing and int8 < 0.3 * live, (batch, height, width)


def test_scales_of_the_file_are_those_of_the_averaged_weights_and_ranges(exported: argparse.Namespace) -> None:
    live, differing = dict(exported.live.named_modules()), 0
    for name, layer in exported.student.named_modules():
        if not isinstance(layer, trainer.FakeInt8):
            continue
        weight, stored = layer.weight.detach(), exported.state
        weight = weight * trainer.per_input_channel(layer.observer.smoothing_scale, weight)
        scale = weight.abs().flatten(1).amax(dim=1) / 127
        assert torch.equal(stored[f"{name}.weight_scale"], scale.clamp(min=1e-8 / 127)), name
        grid = scale.view(-1, *[1] * (weight.dim() - 1))
        assert (stored[f"{name}.weight"] * grid - weight).abs().max() <= 0.5001 * scale.max(), name
        if isinstance(layer.observer, trainer.ActivationFakeQuantizer):
            assert stored[f"{name}.input_scale"] == layer.observer.log_scale.exp(), name
            differing += bool(layer.observer.log_scale != live[name].observer.log_scale)
            assert not torch.equal(layer.weight, live[name].weight), name
    assert differing > 30


# ---------------------------------------------------------------- a batch that is not finite


def everything(state: trainer.TrainState) -> list[torch.Tensor]:
    """Copies of all that a step may change, but for the learning rate."""
    moments = [value for moments in state.optimizer.state_dict()["state"].values() for value in moments.values()]
    average = state.average.state_dict().values()
    return [tensor.detach().clone() for tensor in (*state.student.state_dict().values(), *moments, *average)]


def test_training_batch_of_nan_changes_nothing(train, tmp_path: Path, monkeypatch) -> None:
    encode, after_step, batches, states = trainer.sample_latents, trainer.after_step, [], []

    def second_is_nan(*arguments: Any) -> torch.Tensor:
        batches.append(1)
        return encode(*arguments) * (math.nan if len(batches) == 3 + 2 else 1)  # after those of calibration

    def note(state: trainer.TrainState, *rest: Any) -> None:
        states.append(everything(state))
        after_step(state, *rest)

    monkeypatch.setattr(trainer, "sample_latents", second_is_nan)
    monkeypatch.setattr(trainer, "after_step", note)
    saved = train(tmp_path, *BOLD, "--max_train_steps", "3")
    assert saved["training"]["steps"] == len(states) == 3
    same = [[torch.equal(*pair) for pair in zip(*states[step : step + 2])] for step in (0, 1)]
    assert all(same[0]) and sum(same[1]) < len(same[1]) / 2


def test_calibration_images_of_nan_enter_no_range(train, tmp_path: Path, monkeypatch) -> None:
    flags = ["--max_train_steps", "0", "--calibration_steps"]
    expected = train(tmp_path / "one batch", *flags, "1")["state_dict"]
    encode, batches = trainer.sample_latents, []

    def second_is_nan(*arguments: Any) -> torch.Tensor:
        batches.append(1)
        return encode(*arguments) * (math.nan if len(batches) == 2 else 1)

    monkeypatch.setattr(trainer, "sample_latents", second_is_nan)
    state = train(tmp_path / "and one of nan", *flags, "2")["state_dict"]
    names = [name.removesuffix(".input_scale") for name in expected if name.endswith(".input_scale")]
    assert len(batches) == 2 and len(names) > 30
    for name in names:
        for tensor in ("input_scale", "input_zero_point", "input_factor", "weight"):
            assert torch.equal(state[f"{name}.{tensor}"], expected[f"{name}.{tensor}"]), name
