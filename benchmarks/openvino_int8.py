#!/usr/bin/env python
"""text2images.py with OpenVINO's own int8 UNet: NNCF's post-training quantization, its defaults for transformers.

Takes text2images.py's flags, without -qm. NNCF calibrates on what the fp32 UNet is called with while it generates 16
captions of --scenes in 20 steps each, with seeds that no measured image has. benchmarks/fidelity.py compares the images
with fp32's.

    python benchmarks/openvino_int8.py -m demo/tiny-stable-diffusion -c "a lake" --output_dir demo/output/nncf
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch.nn as nn

from output import ROOT

sys.path.insert(0, str(ROOT))

import text2images  # noqa: E402

CAPTIONS, STEPS, FIRST_SEED = 16, 20, 10_000  # of calibration


class NncfUNet(text2images.OpenVINOUNet):
    """A UNet that NNCF quantized, run as ours is: by OpenVINO, compiled for the sizes of its inputs."""

    def __init__(self, model: Any, config: dict[str, Any], settings: dict[str, Any]) -> None:
        self.stand_in_for(config)
        self.model, self.settings = model, settings
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        self.megabytes = sum(node.data.nbytes for node in constants) / 1e6

    def compile_for(self, shapes: list[list[int]]) -> None:
        model = self.model.clone()
        model.reshape(dict(enumerate(shapes)))
        compiled = text2images.openvino_core().compile_model(model, "CPU", self.settings)
        self.shapes, self.compiled = shapes, [compiled.create_infer_request()]


def calibration_inputs(pipeline: Any, scenes: Path, args: argparse.Namespace) -> list[list[Any]]:
    """(latents, timestep, text encoding) of every call of the UNet, as numpy arrays."""
    inputs: list[list[Any]] = []

    def note(unet: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sample, timestep = given
        inputs.append([sample.numpy(), timestep.reshape(1).float().numpy(), named["encoder_hidden_states"].numpy()])

    hook = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    settings = argparse.Namespace(**{**vars(args), "num_inference_steps": STEPS})
    rows = (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:CAPTIONS]
    for number, row in enumerate(rows):
        request = text2images.ImageRequest(json.loads(row)["text"], FIRST_SEED + number)
        text2images.generate(pipeline, [request], settings)
    hook.remove()
    return inputs


def load_pipeline(scenes: Path, args: argparse.Namespace) -> Any:
    """text2images.py's pipeline, with the UNet that NNCF made of the fp32 one."""
    from nncf import Dataset, ModelType, quantize

    exact = text2images.load_pipeline(argparse.Namespace(**{**vars(args), "dtype": "float32"}))
    exact.set_progress_bar_config(disable=True)
    inputs = calibration_inputs(exact, scenes, args)
    model = text2images.unet_to_openvino(exact.unet.requires_grad_(False))
    model = quantize(model, Dataset(inputs), subset_size=len(inputs), model_type=ModelType.TRANSFORMER)
    pipeline = text2images.load_pipeline(args)
    pipeline.unet = NncfUNet(model, dict(exact.unet.config), text2images.openvino_settings(args))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    text = "folder of captioned images, made by make demo"
    parser.add_argument("--scenes", type=Path, default=ROOT / "demo/scenes", help=text)
    own, flags = parser.parse_known_args(argv)
    args = text2images.parse_args(flags)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(own.scenes, args)
    size = {"unet_mb": round(pipeline.unet.megabytes, 1)}
    metadata = text2images.run_metadata(pipeline, args) | {"precision": "int8", **size}
    seeds = range(args.seed, args.seed + args.images_num)
    requests = [text2images.ImageRequest(caption, seed) for caption in args.captions for seed in seeds]
    for generated in text2images.generate_all(pipeline, requests, args):
        text2images.save_image(generated, metadata, args)


if __name__ == "__main__":
    main()
