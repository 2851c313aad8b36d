"""Killed, stopped and out of disk: what is left, and that a resumed run ends as the unbroken one."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from conftest import finish, wait_for


def being_written(folder: Path, since: float) -> bool:
    """Whether an unfinished checkpoint is there, other than those that earlier kills left."""
    try:
        return any(path.stat().st_mtime >= since for path in folder.glob("broken */checkpoint-*.partial"))
    except FileNotFoundError:  # it got its name meanwhile
        return False


def kill_and_resume(start: Callable[..., BaseProcess], folder: Path, kills: int, steps: int) -> dict[str, int]:
    """Kill runs, half of them while they write a checkpoint, and resume them; compare every one that gets to its end.

    Returns how many were killed while a checkpoint was half-written, before the first one, and so on.
    """
    flags = ["--max_train_steps", str(steps), "--use_ema", "--gradient_accumulation_steps", "2", "--random_flip"]
    flags += ["--dataloader_num_workers", "2", "--learning_rate", "3e-2", "--lr_scheduler", "cosine"]
    flags += ["--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    began = time.monotonic()
    finish(start(folder / "whole", *flags))
    whole = torch.load(folder / "whole" / "quant_model.pt", weights_only=True)
    seconds = time.monotonic() - began
    moments, counts = random.Random(0), {"killed": 0, "half-written": 0, "no checkpoint yet": 0, "finished": 0}
    output = folder / "broken 0"
    while counts["killed"] < kills or not (output / "quant_model.pt").is_file():
        process, since = start(output, *flags), time.time()
        if counts["killed"] < kills:
            if counts["killed"] % 2:
                wait_for(functools.partial(being_written, folder, since), process)
                time.sleep(moments.uniform(0, 0.02))
            else:
                process.join(moments.uniform(0, seconds))
            process.kill()
        finish(process)
        if process.exitcode == -signal.SIGKILL:
            counts["killed"] += 1
            counts["half-written"] += being_written(folder, since)
            counts["no checkpoint yet"] += not list(output.glob("checkpoint-*[0-9]"))
        else:
            assert process.exitcode == 0
            counts["finished"] += 1
            resumed = torch.load(output / "quant_model.pt", weights_only=True)
            assert resumed["checksum"] == whole["checksum"]
            assert resumed["training"] == whole["training"]
            assert not list(output.glob("*.partial"))
            if counts["killed"] < kills:
                output = folder / f"broken {counts['finished']}"
    print(counts)
    return counts


def test_killed_run_resumes_to_the_same_bits(start, tmp_path: Path) -> None:
    counts = kill_and_resume(start, tmp_path, kills=2, steps=5)
    assert counts["killed"] == 2 and counts["half-written"] >= 1


@pytest.mark.full
def test_run_killed_at_20_moments_resumes_to_the_same_bits(start, tmp_path: Path) -> None:
    counts = kill_and_resume(start, tmp_path, kills=20, steps=40)
    assert counts["killed"] == 20 and counts["half-written"] >= 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_with_a_checkpoint_and_its_code(start, tmp_path: Path, number: signal.Signals) -> None:
    flags = ["--max_train_steps", "500", "--checkpointing_steps", "1000", "--dataloader_num_workers", "2"]
    process = start(tmp_path / "out", *flags)
    wait_for(lambda: process.log.is_file() and "1/500" in process.log.read_text(), process)
    os.kill(process.pid, number)
    text = finish(process)
    assert process.exitcode == 128 + number
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert len(saved) == 1 and f"stopped by {number.name} at step {saved[0].split('-')[1]}:" in text


def test_full_disk_keeps_the_previous_checkpoint(start, tmp_path: Path) -> None:
    output, flags = tmp_path / "out", ["--max_train_steps", "3", "--checkpointing_steps", "1", "--use_ema"]
    finish(start(output, *flags, "--max_train_steps", "1"))
    state = output / "checkpoint-1" / "state.pt"
    before = state.read_bytes()
    process = start(output, *flags, "--resume_from_checkpoint", "latest", largest_file=len(before) - 100_000)
    text = finish(process)
    assert process.exitcode == 1
    message = text[text.index("train_text_to_image_qat.py: error: ") :].splitlines()[0]
    assert "checkpoint-2 was not written (" in message and "File too large" in message
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"] and state.read_bytes() == before
    assert finish(start(output, *flags, "--resume_from_checkpoint", "latest")) and (output / "checkpoint-3").is_dir()


def test_full_disk_at_the_end_leaves_no_half_of_a_model(start, tmp_path: Path) -> None:
    process = start(tmp_path / "out", "--max_train_steps", "0", largest_file=200_000)
    text = finish(process)
    assert process.exitcode == 1
    assert "quant_model.pt was not written ([Errno 27] File too large" in text
    assert not list((tmp_path / "out").glob("quant_model.pt*"))
