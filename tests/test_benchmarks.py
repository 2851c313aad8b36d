"""The speed benchmarks run, on a model that is too small to be worth timing, and write what they say they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import run_command


def check_rows(path: Path, names: list[str]) -> list[dict]:
    report = json.loads(path.read_text())
    assert report["machine"]["cpu"] and report["machine"]["threads"] >= 1
    assert [row["name"] for row in report["rows"]] == names
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["spread"] >= 0 and row["peak_gib"] > 0.1 and row["ratio_to_fp32"] > 0
    assert report["rows"][0]["ratio_to_fp32"] == 1
    return report["rows"]


def test_unet_step_measures_and_profiles_every_variant(model_dir: Path, tmp_path: Path) -> None:
    names, output = ["diffusers fp32", "diffusers bf16", "int8", "original recipe"], tmp_path / "step.json"
    command = [sys.executable, "benchmarks/unet_step.py", "--model", model_dir / "unet", "--rounds", "2"]
    command += ["--work_dir", tmp_path / "work", "--output", output, "--profile"]
    run = run_command(*command, "--shape", "4x8", "--variants", *names)
    assert run.returncode == 0
    check_rows(output, names)
    profile = json.loads(output.read_text())["profiles"]["int8"]
    assert any("I8" in line["operator"] for line in profile)
    assert [line["seconds"] for line in profile] == sorted((line["seconds"] for line in profile), reverse=True)
    assert all(line["operator"] in run.stdout and line["calls"] > 0 for line in profile)
    assert run_command(*command, "--shape", "2x8", "--variants", "diffusers fp32").returncode == 0
    rows = json.loads(output.read_text())["rows"]  # another shape leaves the rows of this one where they are
    assert [row["batch"] for row in rows] == [4, 4, 4, 4, 2]
    odd = run_command(*command, "--shape", "3x8", "--variants", "int8")
    assert odd.returncode == 2 and "give an even batch" in odd.stderr


def test_end_to_end_times_processes_and_goes_on_after_an_interruption(
    model_dir: Path, quant_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "end.json"
    command = [sys.executable, "benchmarks/end_to_end.py", "--model", model_dir, "--quant_model", quant_model]
    command += ["--work_dir", tmp_path / "work", "--steps", "2", "--output", output]
    assert run_command(*command, "--variants", "int8").returncode == 0
    first = check_rows(output, ["fp32", "int8"])
    assert all(0 < row["first_step_seconds"] < row["seconds"] for row in first)
    assert run_command(*command, "--variants", "int8").returncode == 0
    assert check_rows(output, ["fp32", "int8"]) == first and len(list((tmp_path / "work/pictures").glob("*.png"))) == 4


def test_steps_finds_the_error_of_some_steps_and_of_all(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "steps.json"
    command = [sys.executable, "benchmarks/steps.py", "-m", model_dir, "-qm", quant_model, "--output", output]
    run = run_command(*command, "--starts", "3", "--num_inference_steps", "4", "--groups", "0", "1", "3")
    assert run.returncode == 0, run.stderr
    every, weights, *groups = json.loads(output.read_text())["rows"]
    assert [(row["first"], row["last"]) for row in (every, weights, *groups)] == [
        (0, 3),
        (0, 3),
        (0, 0),
        (1, 2),
        (3, 3),
    ]
    assert every["percent"] == 100 and weights["weights_alone"] and 0 < weights["error"] < every["error"]
    assert all(0 < row["error"] < every["error"] for row in groups)
    refused = run_command(*command, "--num_inference_steps", "4", "--groups", "0", "4")
    assert refused.returncode == 2 and "--groups must ascend" in refused.stderr
