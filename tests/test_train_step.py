"""The training benchmark, on the bundled model: its JSON, and that its variants compute what they are named for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_step
from conftest import ROOT

FLAGS = ["--unet", str(ROOT / "demo/tiny-stable-diffusion/unet"), "--edge", "8", "--gradient_checkpointing"]


def test_rows_of_another_setting_stay_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "train_step.json"
    for batch in ("1", "2", "1"):
        train_step.main([*FLAGS, "--rounds", "1", "--measure", "time", "--batch_size", batch, "--output", str(output)])
    result = json.loads(output.read_text())
    assert {"cpu", "cores", "threads"} <= result["machine"].keys()
    assert [row["batch"] for row in result["rows"]] == [2] * 6 + [1] * 6
    encodings = [row for row in result["rows"] if row["name"] == train_step.ENCODING]
    assert len(encodings) == 2 and all(row["seconds"] > 0 for row in encodings)
    for row in (row for row in result["rows"] if row not in encodings):
        parts = [row[part] for part in ("student_forward", "teacher", "backward", "optimizer_and_ema")]
        assert row["seconds"] == pytest.approx(sum(parts), rel=0.05) and row["spread"] == 0
    last = {row["name"]: row for row in result["rows"][-6:]}
    ours, base = last[train_step.OURS], last[train_step.BASE]
    assert last[train_step.PLAIN]["teacher"] < 0.5 * base["teacher"]  # there is none; nothing of its is timed
    assert ours["ratio_to_plain_and_teacher"] == pytest.approx(ours["seconds"] / base["seconds"], rel=0.02)


def test_variants_share_their_weights_and_differ_as_named() -> None:
    names = [train_step.PLAIN, train_step.OURS, train_step.ORIGINAL]
    args = argparse.Namespace(
        unet=ROOT / "demo/tiny-stable-diffusion/unet", mixed_precision="no", gradient_checkpointing=False
    )
    plain, ours, original = (variant.student for variant in train_step.make_variants(names, args, own_teacher=False))
    weight = plain.mid_block.resnets[0].conv1.weight
    assert ours.mid_block.resnets[0].conv1.weight is weight is original.mid_block.resnets[0].conv1.layer.weight
    inputs = train_step.make_inputs(plain, 1, 16)
    with torch.no_grad():
        original(*inputs)  # its observers start at nothing
        expected, int8, wrapped = (unet(*inputs).sample for unet in (plain, ours, original))
    errors = [((output - expected).norm() / expected.norm()).item() for output in (int8, wrapped)]
    assert 1e-4 < errors[0] < errors[1] < 0.5


def test_memory_is_that_of_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = [*FLAGS, "--output", str(tmp_path / "unused.json")]
    assert 0.3 < train_step.peak_gib(train_step.BASE, flags) < 3
    monkeypatch.setattr(train_step.resource, "setrlimit", lambda *limits: None)  # of the process of the tests
    monkeypatch.setattr(train_step, "make_variants", mock.Mock(side_effect=RuntimeError("can't allocate memory")))
    train_step.main([*flags, "--peak_of", train_step.BASE])
    assert capsys.readouterr().out == "null\n"
