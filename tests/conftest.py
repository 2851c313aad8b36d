"""A Stable Diffusion small enough to make, train and generate with in seconds, and helpers to run the scripts."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny layers: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"

import faulthandler
import gc
import multiprocessing
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32  # pixels of an image of the tiny model
FORKS = multiprocessing.get_context("forkserver")  # starts processes that have the libraries loaded already
FORKS.set_forkserver_preload(["train_text_to_image_qat", "tensorboard", "datasets"])

pytest.register_assert_rewrite("models", "data")  # what several test files share
torch.set_num_threads(1)
# A forked data worker that collects OpenVINO's objects, left by an earlier test, hangs or crashes: it lacks their
# threads. What was there before a fork is not collected after it.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def tiny_unet() -> UNet2DConditionModel:
    """Every kind of layer that Stable Diffusion's UNet has: shortcuts, down- and upsampling, both attentions."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_tokenizer(**options: str) -> CLIPTokenizer:
    """A token for every letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **options)


def tiny_text_config(width: int, **options: Any) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextConfig(vocab_size=514, **sizes, bos_token_id=512, eos_token_id=513, pad_token_id=513, **options)


def tiny_vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        sample_size=SIZE,
        **options,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline(**scheduler: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    vae = tiny_vae()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(tiny_text_config(32)),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl_pipeline(**options: Any) -> StableDiffusionXLPipeline:
    """Two text encoders of different widths, transformers of different depth, no attention at the finest size."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )
    parts = dict(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(tiny_text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(48, projection_dim=40, hidden_act="gelu")),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )
    return StableDiffusionXLPipeline(**(parts | options), add_watermarker=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what an int8 kernel must be exact for; with REQUIRE_KERNELS=1, for CI, that fails instead."""
    if item.get_closest_marker("exact_kernels"):
        import text2images  # only here: it takes seconds

        if not text2images.kernels_are_exact("CPU"):
            refuse = pytest.fail if os.environ.get("REQUIRE_KERNELS") == "1" else pytest.skip
            refuse("OpenVINO has no exact int8 kernels on this CPU (no VNNI)")


@pytest.fixture(scope="session")
def xl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xl")
    tiny_xl_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder is neither read nor written to."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}):
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven captioned images, more than one batch and no multiple of one."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(11):
        image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((50, 40))
        image.save(folder / f"{index:04d}.jpg", quality=95)
        rows.append(f'{{"file_name": "{index:04d}.jpg", "text": "picture number {index}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, and without a network."""
    import huggingface_hub

    import evaluate

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(evaluate, "CLIP", "nobody/has-this")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # or nothing would be tried anyway
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("something was to be downloaded"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def training_in_process(model_dir: Path, data_dir: Path) -> Iterator[Callable[..., dict]]:
    """A function that runs the trainer inside this process; its signal handlers and state are undone afterwards."""
    import train_text_to_image_qat as trainer

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(output_dir: Path, *flags: str) -> dict:
        reset_accelerate()
        trainer.main(
            ["--pretrained_model_name_or_path", str(model_dir), "--train_data_dir", str(data_dir)]
            + ["--output_dir", str(output_dir), "--resolution", str(SIZE), "--train_batch_size", "2", "--use_cpu"]
            + ["--calibration_steps", "3", "--report_to", "none", "--mixed_precision", "no", *flags]
        )
        return torch.load(output_dir / "quant_model.pt", weights_only=True)

    with mock.patch.object(trainer, "use_all_cores"):  # it would undo the one thread of the tests
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset_accelerate()


@pytest.fixture
def train(model_dir: Path, data_dir: Path) -> Iterator[Callable[..., dict]]:
    """Run the trainer with flags of one's own; returns the contents of quant_model.pt."""
    with training_in_process(model_dir, data_dir) as run:
        yield run


@pytest.fixture(scope="session")
def quant_model(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quant_model.pt of the tiny model, after two training steps."""
    output_dir = tmp_path_factory.mktemp("quantized")
    with training_in_process(model_dir, data_dir) as run:
        run(output_dir, "--calibration_steps", "6", "--max_train_steps", "2")
    return output_dir / "quant_model.pt"


@pytest.fixture(scope="session")
def xl_quant_model(xl_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quant_model.pt of the tiny SDXL, only calibrated."""
    output_dir = tmp_path_factory.mktemp("xl quantized")
    with training_in_process(xl_dir, data_dir) as run:
        run(output_dir, "--max_train_steps", "0")
    return output_dir / "quant_model.pt"


def batch_of(replaced: torch.Tensor) -> dict[str, Any]:
    """What RunMonitor reads of a batch in which so many unreadable images were replaced."""
    failures = ["a.jpg: spoilt" if count else "" for count in replaced.tolist()]
    return {"replaced": replaced, "failure": failures, "captioned": torch.ones(len(replaced), dtype=torch.bool)}


def run_command(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """A script as a user runs it; its output is shown where it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(f"$ {' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result


def as_main(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    largest_file: int | None,
    hook: Callable[[Any], None] | None,
) -> None:
    """What `python train_text_to_image_qat.py` does, in the process that this is; a hook may patch the script."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(55, file=2)  # for `finish`: where it hangs, if it does
    if largest_file is not None:  # a write beyond it fails as on a full disk, with EFBIG instead of ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as it is outside of a fork server
    os.environ.update(environment)
    sys.argv = [str(ROOT / "train_text_to_image_qat.py"), *command]
    if hook is not None:
        import train_text_to_image_qat as trainer

        hook(trainer)
        trainer.main()
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture
def start(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BaseProcess]]:
    """Start the trainer on (output_dir, *flags) in a process of its own."""
    processes: list[BaseProcess] = []
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests:{ROOT}/tests/robustness")  # for what is loaded beforehand

    def run(
        output_dir: Path, *flags: str, largest_file: int | None = None, hook: Any = None, **environment: str
    ) -> BaseProcess:
        command = ["--pretrained_model_name_or_path", str(model_dir), "--train_data_dir", str(data_dir), "--use_cpu"]
        command += ["--output_dir", str(output_dir), "--resolution", str(SIZE), "--train_batch_size", "2"]
        command += ["--calibration_steps", "3", "--report_to", "none", "--mixed_precision", "no", *flags]
        log = tmp_path / f"log {len(processes)}.txt"
        process = FORKS.Process(target=as_main, args=(command, log, environment, largest_file, hook))
        process.start()
        process.log = log
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()


def finish(process: BaseProcess) -> str:
    """Wait for the end; returns what was printed."""
    process.join(60)
    text = process.log.read_text() if process.log.is_file() else ""  # killed before it could write
    print(text[-3000:])
    assert process.exitcode is not None
    return text


def wait_for(condition: Callable[[], object], process: BaseProcess) -> None:
    """Look often enough to see a checkpoint while it is being written."""
    while process.is_alive() and not condition():
        time.sleep(0.0005)
