"""The speed benchmarks run, on a model that is too small to be worth timing, and write what they say they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conftest import run_command


def check_rows(path: Path, names: list[str]) -> list[dict]:
    report = json.loads(path.read_text())
    assert report["machine"]["cpu"] and report["machine"]["threads"] >= 1
    assert [row["name"] for row in report["rows"]] == names
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["spread"] >= 0 and row["peak_gib"] > 0.1 and row["ratio_to_fp32"] > 0
    assert all(row["ratio_to_fp32"] == 1 for row in report["rows"] if row["name"].endswith("fp32"))
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
    command = [sys.executable, "benchmarks/end_to_end.py", "--model", model_dir, "--work_dir", tmp_path / "work"]
    command += ["--steps", "2", "12", "--output", output, "--variants", "int8"]
    assert run_command(*command).returncode == 0  # makes a quant_model.pt
    first = check_rows(output, ["fp32", "int8", "fp32", "int8"])
    for row in first:
        parts = row["start_seconds"] + row["steps"] * row["step_seconds"] + row["text_and_vae_seconds"]
        assert 0 < row["start_seconds"] < row["seconds"] == pytest.approx(parts, abs=0.02)
    assert first[0]["step_seconds"] == first[2]["step_seconds"]
    first_run = json.loads(output.read_text())["first_run"]
    assert first_run["seconds"] > first[1]["start_seconds"] and first_run["kept_gb"] > 0
    assert json.loads(output.read_text())["provenance"]["command"].startswith("OMP_NUM_THREADS=1 python benchmarks/end")
    assert run_command(*command, "--quant_model", quant_model).returncode == 0  # nothing is measured again
    again = check_rows(output, ["fp32", "int8", "fp32", "int8"])
    assert again == first and len((tmp_path / "work/images/results.jsonl").read_text().splitlines()) == 5
