#!/usr/bin/env python
"""What was tried and is not in the scripts: other quantizers, other calibrations. Each is put in place of the script's
own part, and the script run with the flags that follow.

    python benchmarks/alternatives.py published train_text_to_image_qat.py --pretrained_model_name_or_path ...

A plus sign joins several. benchmarks/fidelity.py measures them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusers import DDIMScheduler
from torch.ao.quantization import FakeQuantize, default_fake_quant, default_per_channel_weight_fake_quant

import text2images as painter
import train_text_to_image_qat as trainer

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- other calibrations


def without_smoothing() -> None:
    """Plain min-max: one step size for large and small channels alike."""
    trainer.init_smoothing_scales = lambda unet: None


@torch.no_grad()
def calibrate_by_painting(student, pipeline, dataset, accelerator, args) -> None:
    """In place of trainer.calibrate: the widest ranges met while the student paints 20 captions with guidance."""
    trainer.set_mode(student, "observe")
    scheduler = DDIMScheduler.from_config(pipeline.noise_scheduler.config)
    scheduler.set_timesteps(20)
    edge = args.resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    for batch in range(5):
        generator = trainer.generator_for(args.seed, "calibration", batch)
        rows = torch.randint(len(dataset), (4,), generator=generator).tolist()
        input_ids = dataset.tokenize([""] * 4 + [dataset.rows[row][1] for row in rows])
        encoder_hidden_states = pipeline.text_encoders[0](input_ids[:, 0])[0]
        latents = torch.randn((4, student.config.in_channels, edge, edge), generator=generator)
        for timestep in scheduler.timesteps:
            with accelerator.autocast():
                output = student(torch.cat([latents] * 2), timestep, encoder_hidden_states).sample.float()
            unconditional, conditional = output.chunk(2)
            output = unconditional + 7.5 * (conditional - unconditional)
            latents = scheduler.step(output, timestep, latents).prev_sample
    trainer.finish_calibration(student)


def painting() -> None:
    trainer.calibrate = calibrate_by_painting


class LeastErrorQuantizer(trainer.ActivationFakeQuantizer):
    """Clips where the squared error over a sample of the observed inputs is least, instead of never."""

    ROWS, SHARES = 64, torch.linspace(0.3, 1, 71)

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(channels, channel_dim)
        self.sample: list[torch.Tensor] = []

    def observe(self, x: torch.Tensor) -> None:
        super().observe(x)
        rows = x.detach().movedim(self.channel_dim, -1).flatten(0, -2).float()
        self.sample.append(rows[torch.linspace(0, len(rows) - 1, self.ROWS).long()])

    @torch.no_grad()
    def compute_qparams(self) -> None:
        low, high = (self.low / self.smoothing_scale).min(), (self.high / self.smoothing_scale).max()
        x = torch.cat(self.sample) / self.smoothing_scale
        least = math.inf
        for share in self.SHARES:
            scale = share * (high - low).clamp(min=1e-8) / 255
            zero_point = torch.round(-share * low / scale).clamp(0, 255)
            error = ((torch.round(x / scale) + zero_point).clamp(0, 255) - zero_point) * scale - x
            if error.square().mean() < least:
                least = error.square().mean()
                self.log_scale.copy_(scale.log())
                self.zero_point.copy_(zero_point)
        self.sample.clear()


def least_error() -> None:
    trainer.ActivationFakeQuantizer = LeastErrorQuantizer


# ---------------------------------------------------------------- other trainings


def random_timesteps() -> None:
    """Each picture's drawn by itself, not one from each part of the schedule."""
    trainer.sample_timesteps = lambda scheduler, count, part, power, generator: (
        torch.rand(count, generator=generator).double() ** power * scheduler.config.num_train_timesteps
    ).long()


def even_timesteps() -> None:
    """Late ones are not drawn more often."""
    trainer.TIMESTEP_EXPONENT = 1


def fixed_factors() -> None:
    """Channel factors stay as calibrated."""
    trainer.SMOOTHING_LR_RATIO = 0


def one_rate() -> None:
    """The learning rate is that of all weights, whatever their size."""
    trainer.median_magnitude = lambda weight: 1.0


def mean_squared_error() -> None:
    """The plain mean, to which the last timesteps add most, as the loss."""
    trainer.log_distance = F.mse_loss


# ---------------------------------------------------------------- the published recipe


class PublishedLayer(nn.Module):
    """A Linear or Conv2d as neural-compressor 2.x trains it: input, weight and output fake-quantized, ranges that move
    with every forward pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.input, self.output = (default_fake_quant(reduce_range=False) for _ in range(2))
        self.quantized_weight = default_per_channel_weight_fake_quant()

    @classmethod
    def from_float(cls, layer: nn.Linear | nn.Conv2d, quantize_input: bool) -> PublishedLayer:
        return cls(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = self.input(x.float()), self.quantized_weight(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            return self.output(self.layer._conv_forward(x, weight, self.layer.bias).float())
        return self.output(F.linear(x, weight, self.layer.bias).float())


def publish(unet: nn.Module) -> None:
    """Make every Linear and Conv2d a PublishedLayer."""
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            trainer.replace_module(unet, name, PublishedLayer(layer))


def published() -> None:
    """Every layer a PublishedLayer, to be trained with the original's flags; painted with the ranges it ended with."""
    trainer.FAKE_INT8 = {"Linear": PublishedLayer, "Conv2d": PublishedLayer}
    trainer.log_distance = F.mse_loss
    calibrate = trainer.calibrate

    def observe(student: nn.Module, *rest: Any) -> None:
        if rest[-1].max_train_steps:  # ranges come from the training itself
            return
        for module in student.modules():
            if isinstance(module, FakeQuantize):
                module.disable_fake_quant()
        calibrate(student, *rest)
        for module in student.modules():
            if isinstance(module, FakeQuantize):
                module.enable_fake_quant()

    def save(run: trainer.TrainState, config: Any, pipeline: Any, args: Any) -> None:
        torch.save(run.exported.state_dict(), args.output_dir / "quant_model.pt")

    def build(state_dict: dict[str, torch.Tensor], *rest: Any) -> nn.Module:
        unet = painter.UNet2DConditionModel.from_config(state_dict.pop("config"))
        publish(unet)
        unet.load_state_dict(state_dict)
        for module in unet.modules():
            if isinstance(module, FakeQuantize):
                module.disable_observer()
        return unet.eval()

    def read(path: Path) -> dict[str, Any]:
        model = sys.argv[sys.argv.index("-m") + 1]
        config = painter.UNet2DConditionModel.load_config(model, subfolder="unet")
        return torch.load(painter.quant_model_file(path), weights_only=True) | {"config": config}

    trainer.calibrate, trainer.save_int8 = observe, save
    painter.read_quant_model, painter.load_int8_unet = read, build
    painter.check_architecture = lambda *rest: None


# ---------------------------------------------------------------- what OpenVINO offers by itself


class NncfUNet(painter.OpenVINOUNet):
    """A UNet that nncf quantized, run as ours is: by OpenVINO, compiled for the sizes of its inputs."""

    def __init__(self, model: Any, config: dict[str, Any], settings: dict[str, Any]) -> None:
        self.stand_in_for(config)
        self.model, self.settings = model, settings
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        self.megabytes = sum(node.data.nbytes for node in constants) / 1e6

    def compile_for(self, shapes: list[list[int]]) -> None:
        model = self.model.clone()
        model.reshape(dict(enumerate(shapes)))
        compiled = painter.openvino_core().compile_model(model, "CPU", self.settings)
        self.shapes, self.compiled = shapes, [compiled.create_infer_request()]


def unet_inputs_of_paintings(pipeline: painter.StableDiffusionPipeline, args: argparse.Namespace) -> list[list[Any]]:
    """What the UNet is called with while 16 captions of the training pictures are painted in 20 steps each."""
    inputs: list[list[Any]] = []

    def note(unet: nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        sample, timestep = given
        inputs.append([sample.numpy(), timestep.reshape(1).float().numpy(), named["encoder_hidden_states"].numpy()])

    hook = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = argparse.Namespace(**{**vars(args), "num_inference_steps": 20})
    rows = (ROOT / "demo/scenes/metadata.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    for number, row in enumerate(rows):
        request = painter.ImageRequest(json.loads(row)["text"], 10_000 + number)  # a seed that no measured picture has
        painter.generate(pipeline, [request], settings)
    hook.remove()
    return inputs


def nncf() -> None:
    """OpenVINO's own int8: nncf's post-training quantization with its defaults for transformers."""
    load_pipeline, run_metadata = painter.load_pipeline, painter.run_metadata

    def metadata(pipeline: painter.StableDiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
        size = {"unet_mb": round(pipeline.unet.megabytes, 1)}
        return run_metadata(pipeline, args) | {"precision": "int8", **size}

    def load(args: argparse.Namespace) -> painter.StableDiffusionPipeline:
        from nncf import Dataset, ModelType, quantize

        exact = load_pipeline(argparse.Namespace(**{**vars(args), "dtype": "float32"}))
        inputs = unet_inputs_of_paintings(exact, args)
        model = painter.unet_to_openvino(exact.unet.requires_grad_(False))
        model = quantize(model, Dataset(inputs), subset_size=len(inputs), model_type=ModelType.TRANSFORMER)
        pipeline = load_pipeline(args)
        pipeline.unet = NncfUNet(model, dict(exact.unet.config), painter.openvino_settings(args))
        return pipeline

    painter.load_pipeline, painter.run_metadata = load, metadata


ALTERNATIVES: dict[str, Callable[[], None]] = {
    "without_smoothing": without_smoothing,
    "painting": painting,
    "least_error": least_error,
    "random_timesteps": random_timesteps,
    "even_timesteps": even_timesteps,
    "fixed_factors": fixed_factors,
    "one_rate": one_rate,
    "mean_squared_error": mean_squared_error,
    "published": published,
    "nncf": nncf,
}


def main() -> None:
    names, script, *flags = sys.argv[1:]
    for name in names.split("+"):
        ALTERNATIVES[name]()
    {"train_text_to_image_qat.py": trainer, "text2images.py": painter}[script].main(flags)


if __name__ == "__main__":
    main()
