"""The bundled model, quantized by the commands as they are, generates fp32's images; a worse quantizer fails here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import text2images
from conftest import ROOT, run_command

MODEL = ROOT / "demo/tiny-stable-diffusion"
BOUND = 51  # dB, mean of 8 pairs: calibration alone has 53.8; with 7 bits of the weights 49.1, with halved ranges 31.9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, not trained: quant_model.pt, and what fp32 generates."""
    work = tmp_path_factory.mktemp("quality")
    run("demo/scenes.py", "--output_dir", work / "scenes", "--count", "40")
    run("create_metadata.py", "--image_path", work / "scenes")
    flags = ["--resolution=64", "--max_train_steps=0", "--calibration_steps=10", "--use_cpu", "--report_to=none"]
    model = ["--pretrained_model_name_or_path", MODEL, "--train_data_dir", work / "scenes"]
    run("train_text_to_image_qat.py", *model, *flags, "--output_dir", work / "calibrated")
    captions = (ROOT / "demo/captions.txt").read_text(encoding="utf-8").splitlines()[:8]
    (work / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
    generate(work, "fp32")
    return work


def run(*command: str | Path, expected: int = 0) -> None:
    assert run_command(sys.executable, *command).returncode == expected


def generate(work: Path, name: str, *flags: str | Path) -> None:
    settings = ["--num_inference_steps=20", "--batch_size=8", "--dtype=float32", "--output_dir", work / name]
    run("text2images.py", "-m", MODEL, "--captions_file", work / "captions.txt", *flags, *settings)


@pytest.mark.exact_kernels
def test_int8_images_are_those_of_fp32(work: Path) -> None:
    generate(work, "int8", "-qm", work / "calibrated")
    run("evaluate.py", work / "fp32", work / "int8", "--min_psnr", str(BOUND))


@pytest.mark.exact_kernels
def test_one_bit_less_of_the_weights_fails_the_bound(work: Path) -> None:
    payload = torch.load(work / "calibrated/quant_model.pt", weights_only=True)
    for tensor in payload["state_dict"].values():
        if tensor.dtype == torch.int8:
            tensor.copy_(2 * (tensor / 2).round().clamp(-63, 63))
    payload["checksum"] = text2images.checksum(payload["state_dict"])
    torch.save(payload, work / "worse.pt")
    generate(work, "worse", "-qm", work / "worse.pt")
    run("evaluate.py", work / "fp32", work / "worse", "--min_psnr", str(BOUND), expected=1)
