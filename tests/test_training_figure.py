"""training.png, and the curve that survives a restart."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import train_text_to_image_qat as trainer
from conftest import training_in_process

FLAGS = "--max_train_steps 6 --checkpointing_steps 2 --checkpoints_total_limit 9 --validation_steps 3".split()
PROMPTS = ["--validation_prompts", "a $x^2$ 日本", "b"]


@pytest.fixture(scope="module")
def unbroken(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    with training_in_process(model_dir, data_dir) as run:
        run(folder, *FLAGS, *PROMPTS)
    return folder


def curve_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "curve.json").read_text())


def test_a_resumed_run_goes_on_with_the_same_curve(train: Callable[..., dict], unbroken: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("checkpoint-2", "validation"):
        shutil.copytree(unbroken / name, resumed / name)
    train(resumed, *FLAGS, *PROMPTS, "--resume_from_checkpoint", "latest")
    curve = curve_of(resumed / "checkpoint-6")
    assert curve == curve_of(unbroken / "checkpoint-6")
    assert [point["step"] for point in curve["points"]] == [1, 2, 3, 4, 5, 6]
    assert (curve["saved"], curve["validated"]) == ([2, 4, 6], [3, 6])
    assert (resumed / "training.png").read_bytes() == (unbroken / "training.png").read_bytes()
    assert not list(resumed.glob("*.partial"))


def test_points_are_what_the_steps_were(unbroken: Path) -> None:
    state = torch.load(unbroken / "checkpoint-6" / "state.pt", weights_only=True)
    curve = curve_of(unbroken / "checkpoint-6")
    last = curve["points"][-1]
    assert {name: last[f"loss {name}"] for name in state["losses"]} == state["losses"]
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert [last[f"rate {name}"] for name in trainer.RATES] == rates[-3:]
    names = sorted(name for name in state["student"] if name.endswith("log_scale"))
    scales = {state["student"][name].item() for name in names}
    change = 100 * (np.exp([after - before for after, before in zip(sorted(scales), sorted(curve["start"]))]) - 1)
    assert len(curve["start"]) == len(scales) and curve["points"][0]["scales greatest"] > 0
    assert last["scales least"] <= last["scales median"] <= last["scales greatest"]
    assert last["scales least"] <= change.min() + 1e-9 and change.max() <= last["scales greatest"] + 1e-9


def test_noting_and_drawing_change_no_bit_of_the_training(
    train: Callable[..., dict], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.load(unbroken / "quant_model.pt", weights_only=True)["checksum"]
    monkeypatch.setattr(trainer.TrainingCurve, "update", lambda *_: None)
    monkeypatch.setattr(trainer, "draw_training", lambda *_: None)
    assert train(tmp_path / "undrawn", *FLAGS)["checksum"] == drawn


def test_scales_drift_is_measured_in_percent_of_calibration() -> None:
    scales = [nn.Parameter(torch.tensor(value)) for value in (0.0, 1.0, -2.0)]
    curve = trainer.TrainingCurve(scales, [scale.item() for scale in scales])
    with torch.no_grad():
        for scale, factor in zip(scales, (1.5, 0.9, 1.1)):
            scale += math.log(factor)
    curve.update(1, {}, {})
    (point,) = curve.points
    values = [point[f"scales {name}"] for name in ("least", "median", "greatest")]
    assert values == pytest.approx([-10, 10, 50], abs=1e-4)


def test_a_long_curve_stays_short_and_keeps_its_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CURVE_POINTS", 4)
    losses = np.random.default_rng(0).normal(size=101).tolist()
    curve = trainer.TrainingCurve()
    for step, loss in enumerate(losses, 1):
        curve.update(step, {"loss": loss}, {"weights": 1e-5})
        assert len(curve.points) < 8
        if step == 53:
            curve.save(tmp_path / "curve.json")
    assert sum(point["steps"] for point in curve.points) == 101 and curve.points[-1]["step"] == 101
    end = 0
    for point in curve.points:
        begin, end = end, point["step"]
        assert end - begin == point["steps"] <= curve.stride
        assert point["loss loss"] == pytest.approx(np.mean(losses[begin:end]))
    resumed = trainer.TrainingCurve.of(nn.Module(), tmp_path)
    for step, loss in enumerate(losses[53:], 54):
        resumed.update(step, {"loss": loss}, {"weights": 1e-5})
    assert resumed == curve


def test_figure_shows_losses_rates_drift_marks_and_images(tmp_path: Path) -> None:
    curve = trainer.TrainingCurve([nn.Parameter(torch.zeros(()))], [0.0], validated=[1, 2, 3, 9], saved=[2, 4])
    for step in range(1, 11):
        losses = {"kd_loss": -step, "task_loss": math.nan if step == 4 else 2.0 * step, "loss": -step}
        curve.update(step, losses, {"weights": 1e-5, "biases": 0.0 if step > 5 else 1e-4})
    args = argparse.Namespace(output_dir=tmp_path, validation_prompts=["a $ caption", "日本"])
    for step in (1, 9):  # those of steps 2 and 3 are gone
        trainer.validation_path(args, step, 0).parent.mkdir(exist_ok=True)
        for prompt in range(2):
            Image.new("RGB", (64, 32), (step, 0, 0)).save(trainer.validation_path(args, step, prompt))
    figure = trainer.training_figure(curve, args)
    axes = {each.get_title().split(":")[0]: each for each in figure.axes}
    assert list(axes)[:4] == [
        "kd_loss",
        "task_loss",
        "learning rates",
        "activation scales, change since calibration, %",
    ]
    raw, mean = axes["task_loss"].lines[:2]
    assert raw.get_xdata().tolist() == list(range(1, 11)) and math.isnan(raw.get_ydata()[3])
    assert np.isfinite(mean.get_ydata()).all()
    assert [line.get_xdata()[0] for line in axes["kd_loss"].lines[2:6]] == [1, 2, 3, 9]
    assert list(axes["kd_loss"].lines[6].get_xdata()) == [2, 4]
    assert [int(each.get_title()[5]) for each in figure.axes[4:]] == [1, 9, 1, 9]
    trainer.draw_training(curve, args)
    assert Image.open(tmp_path / "training.png").size == (1100, 960)


def test_a_figure_that_cannot_be_written_costs_a_warning(
    train: Callable[..., dict], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.png").mkdir()
    with caplog.at_level(logging.WARNING, logger="train"):
        train(tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "2")
    assert f"{tmp_path}/training.png was not written: Is a directory" in caplog.text
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, logger="train"):
        train(tmp_path, "--max_train_steps", "2")
    assert "pip install matplotlib" in caplog.text


@pytest.mark.parametrize("damage", [None, "[]", "{}", '{"start": 1'])
def test_a_damaged_curve_begins_anew(tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture) -> None:
    if damage is not None:
        (tmp_path / "curve.json").write_text(damage)
    with caplog.at_level(logging.WARNING, logger="train"):
        curve = trainer.TrainingCurve.of(nn.Module(), tmp_path)
    assert "training.png begins anew" in caplog.text and curve == trainer.TrainingCurve()


def test_without_training_there_is_no_figure(train: Callable[..., dict], tmp_path: Path) -> None:
    train(tmp_path, "--max_train_steps", "0")
    assert not (tmp_path / "training.png").exists()
