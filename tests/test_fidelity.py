"""What benchmarks/alternatives.py puts in place of the scripts' own parts does what it is named for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import alternatives
import fidelity
import train_text_to_image_qat as trainer
from conftest import run_command


def test_least_error_clips_an_outlier_that_min_max_spends_the_range_on() -> None:
    x = torch.randn(2**18, 1, generator=torch.Generator().manual_seed(0))
    x[0] = 8.0
    errors = []
    for kind in (trainer.ActivationFakeQuantizer, alternatives.LeastErrorQuantizer):
        quantizer = kind(channels=1, channel_dim=-1)
        quantizer.ROWS = len(x)
        quantizer.observe(x)
        quantizer.compute_qparams()
        errors.append((quantizer(x) - x).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


FULL = [pytest.param(name, marks=pytest.mark.full) for name in alternatives.ALTERNATIVES if name != "published"]


@pytest.mark.parametrize("name", ["published", *FULL])
def test_alternative_trains_and_paints(name: str, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    alternative = [sys.executable, "benchmarks/alternatives.py", name]
    flags = ["--train_data_dir", data_dir, "--resolution=32", "--use_cpu", "--report_to=none", "--calibration_steps=2"]
    flags += [
        "--train_batch_size=2",
        "--keep_float",
        "--quantizer_learning_rate=0",
        f"--max_train_steps={name == 'published':d}",
    ]
    model = ["--pretrained_model_name_or_path", model_dir]
    trained = run_command(*alternative, "train_text_to_image_qat.py", *model, *flags, "--output_dir", tmp_path / "qat")
    assert trained.returncode == 0, trained.stderr
    flags = ["-qm", tmp_path / "qat", "-c", "a lake", "--num_inference_steps=2", "--dtype=float32"]
    painted = run_command(*alternative, "text2images.py", "-m", model_dir, *flags, "--output_dir", tmp_path / "int8")
    assert painted.returncode == 0, painted.stderr
    assert list((tmp_path / "int8").glob("*.png"))


def test_every_variant_names_an_alternative_that_is_there() -> None:
    joined = (variant.alternative for variant in fidelity.VARIANTS.values() if variant.alternative is not None)
    assert {name for names in joined for name in names.split("+")} == alternatives.ALTERNATIVES.keys()
