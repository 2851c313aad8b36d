"""benchmarks/fidelity.py, in small: every row is of the flags it is named for, OpenVINO's own int8 among them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import fidelity
import tables
from conftest import ROOT, run_command

MODEL = ROOT / "demo/tiny-stable-diffusion"


@pytest.mark.exact_kernels
def test_report_has_a_row_of_each_variant(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    scenes, output = tmp_path / "scenes", tmp_path / "fidelity.json"
    assert run_command(sys.executable, "demo/scenes.py", "--output_dir", scenes, "--count", "8").returncode == 0
    assert run_command(sys.executable, "create_metadata.py", "--image_path", scenes).returncode == 0
    (tmp_path / "captions.txt").write_text("the Milky Way over green mountains and a forest\n", encoding="utf-8")
    short = ["--captions_file", tmp_path / "captions.txt", "--images_num", "2", "--num_inference_steps", "4"]
    names = ["openvino-int8", "int8-ptq"]
    command = [sys.executable, "benchmarks/fidelity.py", "--train_data_dir", scenes, *short, "--variants", *names]
    # trained beforehand, by fewer batches than the 200 of the default
    trained, flags = tmp_path / "work/trained max_train_steps=0", ["--max_train_steps=0", "--calibration_steps=4"]
    flags += ["--train_data_dir", scenes, "--resolution=64", "--use_cpu", "--report_to=none", "--output_dir", trained]
    model = ["--pretrained_model_name_or_path", MODEL]
    assert run_command(sys.executable, "train_text_to_image_qat.py", *model, *flags).returncode == 0
    (trained / "seconds.json").write_text("1.5")
    assert run_command(*command, "--work_dir", tmp_path / "work", "--output", output).returncode == 0
    rows = tables.by_name(json.loads(output.read_text())["folders"], "folder")
    assert list(rows) == ["fp32", *names] and rows["int8-ptq"]["training_seconds"] == 1.5
    assert rows["int8-ptq"]["psnr"][0] > 45 > rows["openvino-int8"]["psnr"][0] > 20
    assert rows["openvino-int8"]["unet_mb"] < 0.5 * rows["fp32"]["unet_mb"]
    shutil.rmtree(tmp_path / "work")


def test_variants_of_the_tables_are_those_that_the_benchmark_measures() -> None:
    assert set(tables.VARIANTS) | set(tables.SEED_VARIANTS) | {"fp32"} == set(fidelity.VARIANTS)
    compared = {before for before, _, _ in tables.GAINS}
    assert compared <= set(fidelity.BASELINES) <= set(fidelity.VARIANTS)
