"""evaluate.py: its figures against ones worked out by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate

FACTS = {"status": "ok", "steps": 4, "guidance_scale": 3.0, "negative_prompt": None, "scheduler": "DDIMScheduler"}
FACTS |= {"precision": "int8", "dtype": "fp32", "unet_mb": 7.0, "peak_memory_gib": 1.0}


def folder(path: Path, pictures: dict[tuple[str, int], np.ndarray], **facts) -> Path:
    path.mkdir()
    with open(path / "results.jsonl", "w") as file:
        for number, ((caption, seed), pixels) in enumerate(pictures.items()):
            Image.fromarray(pixels).save(path / f"{number}.png")
            row = {"caption": caption, "seed": seed, "file": f"{number}.png", "seconds": 2.0, **FACTS, **facts}
            file.write(json.dumps(row) + "\n")
    return path


def pictures(count: int, shift: int = 0) -> dict[tuple[str, int], np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for index in range(count):
        pixels = rng.integers(20, 200, (16, 16, 3), dtype=np.uint8)
        made[("a caption", index)] = pixels + np.uint8(shift)
    return made


def test_psnr_of_a_known_difference() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert evaluate.psnr(black, grey) == pytest.approx(-20 * np.log10(0.2))
    assert evaluate.psnr(black, black) == evaluate.MAX_PSNR


def test_interval_holds_the_mean_and_narrows_with_the_sample() -> None:
    values = np.random.default_rng(1).normal(50, 2, 400).tolist()
    mean, low, high = evaluate.interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)  # 95 % of a normal mean
    wide = evaluate.interval(values[:25])
    assert wide[2] - wide[1] > 3 * (high - low)


def test_report_of_three_folders(tmp_path: Path, capsys) -> None:
    reference = folder(tmp_path / "fp32", pictures(6), precision="fp32", seconds=8.0)
    near = folder(tmp_path / "near", pictures(5, shift=1))
    far = folder(tmp_path / "far", pictures(6, shift=10))
    evaluate.main([str(reference), str(far), str(near)])
    summary = json.loads((near / "report.json").read_text())
    assert summary["pairs"] == 5
    assert "fp32: 1 of 6 pictures have no partner" in capsys.readouterr().out
    rows = {Path(row["folder"]).name: row for row in summary["folders"]}
    assert rows["near"]["psnr"] == pytest.approx([-20 * np.log10(1 / 255)] * 3)
    assert rows["far"]["psnr"] == pytest.approx([-20 * np.log10(10 / 255)] * 3)
    assert rows["near"]["speedup"] == 4
    assert rows["near"]["ssim"][0] > rows["far"]["ssim"][0] > 0.9
    assert summary["differences"][0]["psnr"] == pytest.approx([20.0] * 3)
    sheet = Image.open(near / "contact_sheet.png")
    assert sheet.size == (3 * 256, 3 * (256 + 16))
    assert sheet.getpixel((600, 100)) == (8, 8, 8)  # a difference of one level, times 8


def test_gate_of_min_psnr(tmp_path: Path) -> None:
    reference, other = folder(tmp_path / "a", pictures(2)), folder(tmp_path / "b", pictures(2, shift=10))
    evaluate.main([str(reference), str(other), "--min_psnr", "28"])
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(reference), str(other), "--min_psnr", "28.2"])
    assert left.value.code == 1


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    reference = folder(tmp_path / "a", pictures(2))
    with pytest.raises(evaluate.UsageError, match="painted with steps 9, not 4"):
        evaluate.main([str(reference), str(folder(tmp_path / "b", pictures(2), steps=9))])
    stranger = folder(tmp_path / "c", {("another", 0): np.zeros((16, 16, 3), np.uint8)})
    with pytest.raises(evaluate.UsageError, match="no caption and seed is in all"):
        evaluate.main([str(reference), str(stranger)])
    with open(reference / "results.jsonl", "a") as file:
        file.write((reference / "results.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(evaluate.UsageError, match="two pictures of 'a caption' with seed 0"):
        evaluate.main([str(reference), str(reference)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(reference), str(tmp_path / "empty")])
    assert left.value.code == 2
