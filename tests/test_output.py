"""Where the figures of the benchmarks come from is in every file that they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import output


def commit_all(folder: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a commit"]):
        subprocess.run(["git", "-C", folder, *command], check=True)


def test_results_name_cpu_versions_commit_date_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = output.ROOT / "benchmarks/x.py", tmp_path / "secret" / "x.json"
    monkeypatch.setattr(sys, "argv", [str(inside), "--output", str(outside), f"--work_dir={tmp_path}/work", "a b"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    output.write_json({"rows": [1]}, outside)
    written = json.loads(outside.read_text())
    assert written["rows"] == [1] and not list(outside.parent.glob("*.partial"))
    machine, provenance = written["machine"], written["provenance"]
    assert machine["cpu"] and machine["threads"] >= 1 and machine["cores"] >= 1
    assert set(machine["flags"]) <= set(output.FLAGS)
    command = "OMP_NUM_THREADS=1 python benchmarks/x.py --output x.json --work_dir=work 'a b'"
    assert provenance["command"] == command
    assert provenance["versions"]["torch"] and len(provenance["date"]) == len("2026-01-31 12:00")


def test_a_changed_file_is_recorded_and_results_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "ROOT", tmp_path)
    results = tmp_path / "benchmarks/results/x.json"
    results.parent.mkdir(parents=True)
    (tmp_path / "script.py").write_text("1")
    results.write_text("{}")
    commit_all(tmp_path)
    results.write_text("{ }")
    clean = output.provenance()
    assert len(clean["commit"]) == 10 and not clean["dirty"]
    (tmp_path / "script.py").write_text("2")
    assert output.provenance()["dirty"]


@pytest.mark.parametrize("path", ["", None])
def test_without_git_or_a_repository_results_are_written_all_the_same(
    path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "ROOT", tmp_path)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    output.write_json({}, tmp_path / "x.json")
    provenance = json.loads((tmp_path / "x.json").read_text())["provenance"]
    assert provenance["commit"] is None and provenance["dirty"] is None


def test_rows_of_another_run_keep_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    monkeypatch.setattr(output, "provenance", lambda: {"commit": "one"})
    output.write_json({"rows": [{"batch": 1, "seconds": 1}, {"batch": 2, "seconds": 2}]}, path)
    monkeypatch.setattr(output, "provenance", lambda: {"commit": "two"})
    output.write_json({"rows": [*output.kept_rows(path, {"batch": 2}), {"batch": 2, "seconds": 3}]}, path)
    written = json.loads(path.read_text())
    assert written["provenance"] == {"commit": "two"}
    assert [row.get("provenance") for row in written["rows"]] == [{"commit": "one"}, None]


def test_a_work_dir_that_an_earlier_commit_began_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in ("one", "two", "two"):
        origin = {"date": commit, "commit": commit, "dirty": False}
        monkeypatch.setattr(output, "provenance", lambda origin=origin: dict(origin))
        output.note_start(tmp_path / commit)
    output.write_json({}, tmp_path / "same.json", tmp_path / "two")
    output.write_json({}, tmp_path / "other.json", tmp_path / "one")
    assert "work_dir_began" not in json.loads((tmp_path / "same.json").read_text())["provenance"]
    assert json.loads((tmp_path / "other.json").read_text())["provenance"]["work_dir_began"]["commit"] == "one"
