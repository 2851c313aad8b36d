"""Several processes, over gloo on this machine: equal weights, one writer, and no process that waits for a dead one."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import train_text_to_image_qat as trainer
from conftest import ROOT, SIZE, finish, run_command, wait_for

TORCHRUN = [Path(sys.executable).parent / "torchrun"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def pair(start: Callable[..., BaseProcess], outputs: list[Path], *flags: str, hook: Any = None) -> list[BaseProcess]:
    """Two processes that train together, with the environment that a launcher would give them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "PID_FILE": str(outputs[0]) + ".pid"} for rank in (0, 1)]
    return [start(output, *flags, hook=hook, **common, **rank) for output, rank in zip(outputs, ranks)]


def watch_ranks(script: Any) -> None:
    """Note what each rank holds and writes; rank 0 converts only when rank 1 has gone."""
    rank, log = os.environ["RANK"], Path(os.environ["PID_FILE"])
    distill, save_checkpoint, save_int8 = script.distill, script.save_checkpoint, script.save_int8
    if rank == "1":
        log.write_text(str(os.getpid()))

    def noted_distill(state: Any, *rest: Any) -> None:
        ranges = {name: tensor.clone() for name, tensor in state.student.state_dict().items() if "observer" in name}
        distill(state, *rest)
        average = list(state.average.parameters())
        state_after = {"calibrated": ranges, "student": state.student.state_dict(), "average": average}
        torch.save({**state_after, "losses": state.losses}, f"{log}.rank{rank}")

    def noted_checkpoint(*arguments: Any) -> None:
        print(f"rank {rank} writes a checkpoint")
        save_checkpoint(*arguments)

    def late_int8(*arguments: Any) -> Path:
        other, began = int(log.read_text()), time.monotonic()
        while psutil.pid_exists(other) and psutil.Process(other).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - began < 60, "rank 1 waits for the conversion"
            time.sleep(0.1)
        print("rank 1 has gone")
        return save_int8(*arguments)

    script.distill, script.save_checkpoint, script.save_int8 = noted_distill, noted_checkpoint, late_int8


def test_two_processes_train_as_one_with_twice_the_accumulation(start, train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "4", "--use_ema", "--random_flip", "--learning_rate", "3e-2", "--feature_kd_weight"]
    flags += ["0.1", "--gradient_checkpointing", "--checkpointing_steps", "3", "--calibration_steps", "25"]
    output = tmp_path / "two"
    processes = pair(start, [output, output], *flags, hook=watch_ranks)
    logs = [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]
    assert "rank 1 has gone" in logs[0]
    assert "rank 0 writes a checkpoint" in logs[0] and "writes" not in logs[1] and "wrote" not in logs[1]

    first, second = (torch.load(f"{output}.pid.rank{rank}", weights_only=True) for rank in (0, 1))
    assert first["calibrated"] and first["losses"] == second["losses"]
    for part in ("calibrated", "student"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first["average"], second["average"]))

    # the sum of two gradients does not depend on their order: the tolerance is zero
    two = torch.load(output / "quant_model.pt", weights_only=True)
    one = train(tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    assert one["checksum"] == two["checksum"]
    assert one["training"]["losses"] == pytest.approx(two["training"]["losses"], rel=1e-6)

    resume = ["--gradient_accumulation_steps", "2", "--resume_from_checkpoint", str(output / "checkpoint-3")]
    assert train(tmp_path / "resumed", *flags, *resume)["checksum"] == one["checksum"]  # by one process


def nan_on_rank_1(script: Any) -> None:
    watch_ranks(script)
    encode, batches = script.sample_latents, []

    def second_is_nan(*arguments: Any) -> torch.Tensor:
        batches.append(1)
        return encode(*arguments) * (math.nan if os.environ["RANK"] == "1" and len(batches) == 2 else 1)

    script.sample_latents = second_is_nan


def test_batch_of_nan_in_one_process_is_left_out_by_both(start, tmp_path: Path) -> None:
    output, flags = tmp_path / "two", ["--max_train_steps", "3", "--use_ema", "--learning_rate", "3e-2"]
    processes = pair(start, [output, output], *flags, hook=nan_on_rank_1)
    logs = [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]
    assert "1 non-finite steps left out" in logs[0]
    first, second = (torch.load(f"{output}.pid.rank{rank}", weights_only=True) for rank in (0, 1))
    for name, tensor in first["student"].items():
        assert torch.equal(tensor, second["student"][name]) and torch.isfinite(tensor).all(), name


def test_streams_are_shared_by_two_processes(start, tmp_path: Path) -> None:
    from data import pair as sample
    from data import write_tar

    for shard in range(2):
        levels = range(6 * shard, 6 * shard + 6)
        write_tar(
            tmp_path / f"{shard:05d}.tar", {k: v for level in levels for k, v in sample(f"{level}", level).items()}
        )
    flags = ["--train_data_dir", str(tmp_path), "--streaming", "--max_train_steps", "2", "--checkpointing_steps", "1"]
    output = tmp_path / "out"
    processes = pair(start, [output, output], *flags)
    logs = [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]
    whole = torch.load(output / "quant_model.pt", weights_only=True)["checksum"]
    (output / "quant_model.pt").unlink()
    resume = ["--resume_from_checkpoint", str(output / "checkpoint-1")]
    processes = pair(start, [output, output], *flags, *resume)
    logs += [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]
    assert torch.load(output / "quant_model.pt", weights_only=True)["checksum"] == whole
    assert "streaming from 2 files" in logs[0] and "streaming" not in logs[1]


def test_signal_to_one_process_stops_all_at_the_same_step(start, tmp_path: Path) -> None:
    processes = pair(start, [tmp_path / "out"] * 2, "--max_train_steps", "500", "--checkpointing_steps", "1000")
    wait_for(lambda: processes[0].log.is_file() and "2/500" in processes[0].log.read_text(), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    logs = [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [143, 143]
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"stopped by SIGTERM at step {saved.name.split('-')[1]}:" in logs[0]


def test_signal_that_comes_while_the_processes_compare_theirs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    accelerator = argparse.Namespace(num_processes=2, device="cpu")
    arriving = [signal.SIGTERM]
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda told, op: [signal.raise_signal(arriving.pop()) for _ in arriving[:1]]
    )
    try:
        stop = trainer.ShutdownSignal(accelerator)
        assert [stop.poll(), stop.poll()] == [0, signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_dead_process_ends_the_others(start, tmp_path: Path) -> None:
    processes = pair(start, [tmp_path / "out"] * 2, "--max_train_steps", "500", "--checkpointing_steps", "1000")
    wait_for(lambda: processes[0].log.is_file() and "2/500" in processes[0].log.read_text(), processes[0])
    processes[1].kill()
    began = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode == 1 and time.monotonic() - began < 60


def test_processes_that_see_different_checkpoints_are_refused(start, train, tmp_path: Path) -> None:
    train(tmp_path / "a", "--max_train_steps", "1", "--checkpointing_steps", "1")
    flags = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    processes = pair(start, [tmp_path / "a", tmp_path / "b"], *flags)
    logs = [finish(process) for process in processes]
    assert [process.exitcode for process in processes] == [2, 2]
    assert all("differs between processes: put it on a shared disk" in log for log in logs)


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP", "Megatron_LM"])
def test_engines_that_split_the_model_are_refused(train, tmp_path: Path, monkeypatch, engine: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(trainer.UsageError, match=f"set up for {engine}; this script supports plain data parallelism"):
        train(tmp_path, "--max_train_steps", "1")


def test_end_of_the_launcher_counts_as_sigterm(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "LAUNCHER", -1)  # no process has this number
    with pytest.raises(SystemExit) as left:
        train(tmp_path, "--max_train_steps", "5")
    assert left.value.code == 143 and (tmp_path / "checkpoint-1").is_dir()


# ---------------------------------------------------------------- by the launchers themselves


def launched(model_dir: Path, data_dir: Path, output: Path, *flags: str) -> list[str | Path]:
    command = ["train_text_to_image_qat.py", "--pretrained_model_name_or_path", model_dir, "--train_data_dir", data_dir]
    command += ["--resolution", str(SIZE), "--train_batch_size", "2", "--use_cpu", "--calibration_steps", "3"]
    return [*command, "--report_to", "none", "--mixed_precision", "no", "--output_dir", output, *flags]


def trainers(output: Path) -> list[psutil.Process]:
    """The processes that run the script for this output folder, without their launchers."""
    commands = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    launchers = {"torchrun", "accelerate"}
    return [
        process
        for process, command in commands.items()
        if str(output) in command and not launchers & {Path(part).name for part in command}
    ]


def torchrun_pair(output: Path, command: list[str | Path]) -> list[subprocess.Popen]:
    """The README's two machines, both of them this one."""
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "int8"]
    processes = []
    for node in range(2):
        with open(f"{output}.{node}.log", "w") as log:
            node_command = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *rendezvous, *command]
            processes.append(subprocess.Popen([str(p) for p in node_command], cwd=ROOT, stdout=log, stderr=log))
    return processes


@pytest.mark.full
def test_torchrun_on_one_and_on_two_machines_trains_alike(train, model_dir, data_dir, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "3", "--use_ema", "--learning_rate", "3e-2"]
    command = [*TORCHRUN, "--nproc_per_node", "2", *launched(model_dir, data_dir, tmp_path / "local", *flags)]
    assert run_command(*command).returncode == 0
    nodes = torchrun_pair(tmp_path / "nodes", launched(model_dir, data_dir, tmp_path / "nodes", *flags))
    assert [node.wait(300) for node in nodes] == [0, 0]
    expected = train(tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")["checksum"]
    for name in ("local", "nodes"):
        assert torch.load(tmp_path / name / "quant_model.pt", weights_only=True)["checksum"] == expected


@pytest.mark.full
def test_process_killed_on_one_machine_ends_the_run_on_both(model_dir, data_dir, tmp_path: Path) -> None:
    output = tmp_path / "out"
    nodes = torchrun_pair(output, launched(model_dir, data_dir, output, "--max_train_steps", "5000"))
    logs = [Path(f"{output}.{node}.log") for node in range(2)]
    try:
        began = time.monotonic()
        while not any("2/5000" in log.read_text() for log in logs):
            assert time.monotonic() - began < 300
            time.sleep(0.2)
        victims = trainers(output)
        assert len(victims) == 2
        victims[1].kill()
        began = time.monotonic()
        codes = [node.wait(60) for node in nodes]
        print(f"both torchruns ended after {time.monotonic() - began:.1f} s with {codes}")
        assert all(codes) and time.monotonic() - began < 60 and not trainers(output)
    finally:
        for process in [*nodes, *trainers(output)]:
            process.kill()


@pytest.mark.full
def test_accelerate_set_up_for_fsdp_gets_a_sentence(model_dir, data_dir, tmp_path: Path) -> None:
    command = launched(model_dir, data_dir, tmp_path / "out", "--max_train_steps", "1")
    result = run_command("accelerate", "launch", "--use_fsdp", "--num_processes", "1", *command)
    assert result.returncode != 0 and "this script supports plain data parallelism only" in result.stderr
    assert "Traceback" not in result.stderr.split("this script supports")[0] and not (tmp_path / "out").exists()


@pytest.mark.full
def test_accelerate_launch_stops_with_a_checkpoint(model_dir, data_dir, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = launched(model_dir, data_dir, output, "--max_train_steps", "5000", "--checkpointing_steps", "5000")
    with open(tmp_path / "log", "w") as log:
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", *map(str, command)]
        process = subprocess.Popen(launcher, cwd=ROOT, stdout=log, stderr=log)
    try:
        while "2/5000" not in (tmp_path / "log").read_text():
            assert process.poll() is None
            time.sleep(0.2)
        process.terminate()  # it dies and tells nobody
        process.wait(60)
        began = time.monotonic()
        while trainers(output):
            assert time.monotonic() - began < 60
            time.sleep(0.2)
        assert len(list(output.glob("checkpoint-*"))) == 1
        assert "stopped by SIGTERM at step" in (tmp_path / "log").read_text()
    finally:
        for left in [process, *trainers(output)]:
            left.kill()
