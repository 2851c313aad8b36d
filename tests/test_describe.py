"""text2images.py --describe: a quant_model.pt explains itself, whatever is in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import text2images
from conftest import run_command


def described(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    text2images.main(["-qm", str(path), "--describe"])
    return capsys.readouterr().out


def test_facts_are_those_of_the_file(quant_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = torch.load(quant_model, weights_only=True)
    state_dict = payload["state_dict"]
    text = described(quant_model.parent, capsys)
    rows = [line.split() for line in text.splitlines() if line.startswith(("Conv2d", "Linear", "norm", "other"))]
    assert sum(int(row[-3]) for row in rows) == sum(name.endswith(".weight") for name in state_dict)
    parameters = sum(part.numel() for name, part in state_dict.items() if name.endswith((".weight", ".bias")))
    assert sum(int(row[-2].replace(",", "")) for row in rows) == parameters
    assert sum(float(row[-1]) for row in rows) == pytest.approx(
        sum(part.nbytes for part in state_dict.values()) / 1e6, abs=0.005 * len(rows)
    )
    int8 = [name.removesuffix(".input_scale") for name in state_dict if name.endswith(".input_scale")]
    convolutions = sum(state_dict[f"{name}.weight"].dim() == 4 for name in int8)
    counts = {(row[0], " ".join(row[1:-3])): int(row[-3]) for row in rows}
    assert counts["Conv2d", "int8"] == convolutions and counts["Linear", "int8"] == len(int8) - convolutions
    weights = sum(part.dtype == torch.int8 for part in state_dict.values())
    assert counts["Conv2d", "int8 weights"] + counts["Linear", "int8 weights"] == weights - len(int8)
    assert f"{quant_model.stat().st_size / (4 * parameters):.3f} of the same UNet in fp32" in text
    assert payload["checksum"] in text and payload["base_model"] in text
    lines = {line.strip().split(maxsplit=1)[0]: line for line in text.splitlines() if line.strip()}
    assert lines["steps"].split() == ["steps", "2"] and payload["versions"]["torch"] in lines["torch"]
    assert f"kd_loss {payload['training']['losses']['kd_loss']}" in lines["losses"]
    assert lines[r".*\.time_emb_proj"].endswith("  w_dtype int8, act_dtype fp32")


@pytest.mark.parametrize(
    "changes",
    [
        {"training": None, "versions": [1, 2], "quantization": "none", "base_model": 7},
        {"training": {"\x1b[2Jsteps": "a\nb\r" * 9999, (1, 2): {"x": {"y": {}}}}, "versions": {}},
        {"quantization": {"local": {"a": None}, "global": [[[[[[[[1]]]]]]]]}},
        {"state_dict": {}},
        {"state_dict": {"weight": torch.zeros(()), "a.input_scale": torch.ones(1), "b.weight": torch.zeros(2, 2, 2)}},
    ],
)
def test_a_file_with_anything_in_it_is_described_in_plain_letters(
    quant_model: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    payload = torch.load(quant_model, weights_only=True) | changes
    payload["checksum"] = text2images.checksum(payload["state_dict"])
    torch.save(payload, tmp_path / "quant_model.pt")
    text = described(tmp_path, capsys)
    assert payload["checksum"] in text and len(text) < 10_000
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_damaged_file_and_missing_flags_get_one_line(quant_model: Path, tmp_path: Path) -> None:
    (tmp_path / "quant_model.pt").write_bytes(quant_model.read_bytes()[:-100])
    for flags, message in (
        (["-qm", tmp_path, "--describe"], "damaged or not a quant_model.pt"),
        (["--describe"], "--describe is for int8: give -qm FILE too"),
        (["-qm", quant_model, "-c", "a"], "give -m, a diffusers folder or hub id"),
    ):
        result = run_command(sys.executable, "text2images.py", *flags)
        assert result.returncode == 2 and not result.stdout
        assert message in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr
