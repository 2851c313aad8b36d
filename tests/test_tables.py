"""Every table of README and docs is what benchmarks/tables.py makes of the results, and says where it was measured."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import output
import tables
from conftest import ROOT

MACHINE = {"cpu": "A CPU", "flags": ["avx2", "avx512_vnni", "avx512_bf16"], "threads": 1}
RECORD = {
    "date": "2026-01-31 12:00",
    "commit": "0123456789",
    "dirty": False,
    "command": "python benchmarks/unet_step.py",
    "versions": {"torch": "2.13.0", "openvino": "2026.4.1", "nncf": "3.4.0"},
}
ALL = [block for document in tables.documents() for block in tables.blocks(document)]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.document.stem}-{block.name}")
def test_table_of_the_documents_is_that_of_its_files(block: tables.Block) -> None:
    assert block.problem is None, f"{block.document.relative_to(ROOT)}: {block.name}: {block.problem}"


def test_every_table_is_in_a_document_and_every_file_in_a_table() -> None:
    assert {block.name for block in ALL} == tables.TABLES.keys()
    used = {file for one in tables.TABLES.values() for file in one.files}
    there = {path.relative_to(ROOT / tables.RESULTS).as_posix() for path in (ROOT / tables.RESULTS).rglob("*.json")}
    assert there <= used


@pytest.mark.parametrize("document", tables.documents(), ids=lambda path: path.name)
def test_no_figure_stands_in_a_table_that_was_typed_by_hand(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", tables.BLOCK.sub("", document.read_text(encoding="utf-8")), flags=re.S)
    typed = [
        line for line in text.splitlines() if line.startswith("|") and re.search(r"\d\.\d|\d (s|dB|GB|MB)\b", line)
    ]
    assert typed == []


# ---------------------------------------------------------------- on a small repository


def step(name: str, seconds: float, **more: object) -> dict:
    row = {"name": name, "batch": 2, "latents": 64, "seconds": seconds, "spread": 0.01, "first_seconds": seconds}
    return row | {"peak_gib": 2.0, "file_mb": 1000 * seconds} | more


def folder(name: str, psnr: float | None, lpips: float | None = None) -> dict:
    row = {"folder": name, "unet_mb": 9.2}
    row |= {} if psnr is None else {"psnr": [psnr, psnr - 0.5, psnr + 0.5], "ssim": [0.9, 0.9, 0.9], "psnr_worst": 40}
    return row if lpips is None else row | {"lpips": [lpips, lpips, lpips]}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with one table, and the files that it is made of."""
    for module in (tables, output):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    tables.commits_since.cache_clear()
    (tmp_path / tables.RESULTS).mkdir(parents=True)
    speed = [step("diffusers fp32", 4.0), step("diffusers bf16", 2.0), step("int8", 1.0)]
    speed += [step("int8 --dtype float32", 1.5), step("int8", 99.0, batch=8)]
    write(tmp_path, "unet_step.json", rows=speed)
    close = [folder("fp32", None), folder("bf16", 52.0, 1e-4), folder("int8-qat", 55.0), folder("int8-qat-bf16", 51.0)]
    write(tmp_path, "fidelity_guidance_7.5.json", folders=close)
    (tmp_path / "README.md").write_text("# Title\n\n<!-- table: headline -->\n<!-- end table -->\n\nThe end.\n")
    return tmp_path


def write(repository: Path, file: str, record: dict | None = RECORD, **content: object) -> None:
    origin = {} if record is None else {"machine": MACHINE, "provenance": record}
    (repository / tables.RESULTS / file).write_text(json.dumps(origin | content))


def readme(repository: Path) -> str:
    assert tables.main([]) == 0
    return (repository / "README.md").read_text()


def row_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_row_joins_speed_and_fidelity_of_one_setting(repository: Path) -> None:
    text = readme(repository)
    assert text.startswith("# Title\n\n<!-- table: headline -->") and text.endswith("<!-- end table -->\n\nThe end.\n")
    in_bf16 = row_of(text, "**this repository's int8**, the rest in bf16")
    assert in_bf16 == ["1000 (0.25)", "2.0", "1.00 (0.25)", "51.00 [50.50, 51.50]", ""]
    assert row_of(text, "**this repository's int8**, the rest in fp32")[2:4] == ["1.50 (0.38)", "55.00 [54.50, 55.50]"]
    assert row_of(text, "bf16, diffusers")[3:] == ["52.00 [51.50, 52.50]", "0.00010"]
    assert "OpenVINO's own int8 (NNCF), the rest in bf16" in text.partition("Not measured yet: ")[2]
    assert "A CPU (AVX512-BF16, AVX512-VNNI), 1 thread, torch 2.13.0, openvino 2026.4.1" in text
    assert "measured 2026-01-31 at commit 0123456789." in text and "benchmarks/unet_step.py" not in text
    (repository / "docs").mkdir()
    (repository / "docs/performance.md").write_text("<!-- table: headline -->\n<!-- end table -->\n")
    readme(repository)
    text = (repository / "docs/performance.md").read_text()
    assert "measured 2026-01-31 at commit 0123456789: `python benchmarks/unet_step.py`" in text


def test_on_a_cpu_without_bf16_the_default_is_the_row_in_fp32(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MACHINE, "flags", ["avx2", "avx512_vnni"])
    write(repository, "unet_step.json", rows=[step("diffusers fp32", 4.0), step("int8", 3.0)])
    text = readme(repository)
    assert row_of(text, "**this repository's int8**, the rest in fp32")[2] == "3.00 (0.75)"
    assert row_of(text, "**this repository's int8**, the rest in bf16")[:3] == ["", "", ""]


def test_check_finds_a_changed_cell_a_changed_file_and_nothing_else(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = readme(repository)
    capsys.readouterr()
    assert tables.main(["--check"]) == 0 and "README.md: headline: up to date" in capsys.readouterr().out
    (repository / "README.md").write_text(text.replace("1.00 (0.25)", "0.90 (0.23)"))
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "README.md: headline: differs from its files: run python benchmarks/tables.py"
    ]
    assert "0.90 (0.23)" in (repository / "README.md").read_text()  # nothing is changed by --check
    assert readme(repository) == text
    write(repository, "fidelity_guidance_7.5.json", folders=[folder("bf16", 50.0)])
    assert tables.main(["--check"]) == 1


def test_missing_files_leave_out_rows_and_are_named(repository: Path) -> None:
    (repository / tables.RESULTS / "unet_step.json").unlink()
    text = readme(repository)
    assert "s/step" in text.partition("Not measured yet: ")[2] and "s/step" not in text.partition("<sub>")[0]
    (repository / tables.RESULTS / "fidelity_guidance_7.5.json").unlink()
    assert "Not measured yet: this table." in readme(repository) and "| UNet" not in readme(repository)


def test_results_without_provenance_say_so_and_another_engines_are_not_taken(repository: Path) -> None:
    write(repository, "unet_step.json", None, rows=[step("int8", 7.0)])
    write(repository, "fidelity_guidance_7.5.json", None, folders=[folder("bf16", 50.0)])
    text = readme(repository)
    assert "7.00" not in text and "fidelity_guidance_7.5.json): measured before provenance was recorded." in text


def test_rows_of_another_run_name_theirs(repository: Path) -> None:
    other = {"machine": {"cpu": "Another CPU", "threads": 2}, "provenance": RECORD | {"commit": "9876543210"}}
    rows = [step("diffusers fp32", 4.0), step("int8", 1.0), step("diffusers bf16", 2.0, **other)]
    write(repository, "unet_step.json", rows=rows)
    (repository / "README.md").write_text("<!-- table: unet-step -->\n<!-- end table -->\n")
    assert re.search(r"diffusers bf16: Another CPU, 2 threads, .* at commit 9876543210", readme(repository))


def test_a_newer_commit_is_counted_but_is_no_difference(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]

    def commit(name: str) -> None:
        (repository / name).write_text(name)
        for command in (["add", "."], [*identity, "commit", "-qm", name]):
            subprocess.run(["git", "-C", repository, *command], check=True)

    subprocess.run(["git", "-C", repository, "init", "-q"], check=True)
    commit("text2images.py")
    first = output.provenance()["commit"]
    write(repository, "unet_step.json", RECORD | {"commit": first}, rows=[step("int8", 1.0)])
    readme(repository)
    for name in ("train_text_to_image_qat.py", "unrelated.py"):
        commit(name)
    tables.commits_since.cache_clear()
    capsys.readouterr()
    assert tables.main(["--check"]) == 0
    shown = capsys.readouterr().out
    assert f"unet_step.json of {first}, 1 commit to " in shown  # the unrelated one does not count
    assert "fidelity_guidance_7.5.json of 0123456789, an unknown number of commits to " in shown


@pytest.mark.parametrize("text", ["<!-- table: headline -->\n", "<!-- table: nothing -->\n<!-- end table -->\n"])
def test_a_marker_without_an_end_or_a_table_is_named(
    text: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "README.md").write_text(text)
    assert tables.main([]) == 1 and (repository / "README.md").read_text() == text
    assert len(capsys.readouterr().out.splitlines()) == 1
