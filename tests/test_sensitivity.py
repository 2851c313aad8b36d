"""benchmarks/sensitivity.py: its short cut against whole runs, its figures, and the recipe that the trainer takes."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sensitivity
import train_text_to_image_qat as trainer
from conftest import SIZE, tiny_unet
from models import parse, unet_inputs


@torch.no_grad()
def test_replay_gives_what_a_whole_run_with_the_changed_layer_gives() -> None:
    unet = tiny_unet().eval()
    replay = sensitivity.Replay(unet, unet_inputs())
    assert set(replay.macs) == {name for name, _ in trainer.Int8Config().get_model_info(unet)}
    assert replay.macs["conv_in"] == 2 * 32 * (SIZE // 2) ** 2 * 4 * 9  # outputs x inputs of each
    for name in reversed(replay.macs):  # from the end, where everything before is skipped
        original = unet.get_submodule(name)
        layer = copy.deepcopy(original)
        layer.weight.mul_(1.5)
        changed = replay.changed(name, layer)
        assert unet.get_submodule(name) is original
        unet.set_submodule(name, layer)
        assert torch.equal(unet(*unet_inputs()).sample, changed), name
        assert not torch.equal(replay.output, changed), name
        unet.set_submodule(name, original)
    assert torch.equal(unet(*unet_inputs()).sample, replay.output)
    assert replay.before["conv_in"] == 0 and replay.before["conv_out"] == len(replay.done) > 5  # something is saved


@torch.no_grad()
def test_a_layer_whose_input_alone_is_quantized_keeps_its_weights() -> None:
    for layer, x in ((torch.nn.Linear(6, 5), torch.randn(3, 6)), (torch.nn.Conv2d(6, 5, 3), torch.randn(2, 6, 4, 4))):
        fake = trainer.FAKE_INT8[type(layer).__name__].from_float(layer, quantize_input=True)
        fake.observer.observe(x)
        fake.observer.compute_qparams()
        trainer.set_mode(fake, "quantize")
        quantized = sensitivity.InputOnly(fake)(x)
        assert torch.equal(quantized, layer(fake.observer(x)))
        assert not torch.equal(quantized, layer(x)) and not torch.equal(quantized, fake(x))


def test_guidance_cancels_what_its_branches_have_in_common() -> None:
    expected = torch.tensor([1.0, 1.0, 3.0, 3.0])
    alike, unlike = torch.tensor([0.1, 0.1, 0.1, 0.1]), torch.tensor([-0.1, -0.1, 0.1, 0.1])
    errors = [sensitivity.relative_errors(expected + error, expected, 4.0) for error in (alike, unlike)]
    square = 1 + 4 * (3 - 1)  # of the guided output, before it is squared
    assert errors[0].tolist() == pytest.approx([0.04 / 20, (0.1 / square) ** 2], rel=1e-4)
    assert errors[1].tolist() == pytest.approx([0.04 / 20, (0.7 / square) ** 2], rel=1e-4)


def test_budget_goes_to_the_layers_that_err_most_for_their_arithmetic() -> None:
    def row(layer: str, macs: float, error: float, weights: float) -> dict:
        return {"layer": layer, "macs_percent": macs, "int8": {"guided": error}, "weights": {"guided": weights}}

    rows = [row("conv_in", 4, 8, 4), row("conv_out", 3, 9, 0.1), row("mid_block.resnets.0.conv1", 30, 10, 1)]
    rows.append(row("mid_block.resnets.0.conv2", 1, 1, 1))
    spent = sensitivity.kinds(sensitivity.spend(rows, 5), unet := tiny_unet())
    named = {name: kind for name, kind in spent.items() if kind != "int8"}
    assert named == {"conv_out": "int8 weights", "mid_block.resnets.0.conv2": "float"}  # conv_in does not fit any more
    assert "float" in sensitivity.kinds(sensitivity.spend(rows, 8), unet)["conv_in"]


def test_report_and_recipe(model_dir: Path, data_dir: Path, train, tmp_path: Path, monkeypatch) -> None:
    calibrate = trainer.calibrate
    few = {"calibration_steps": 4, "train_batch_size": 2}
    monkeypatch.setattr(
        trainer, "calibrate", lambda *rest: calibrate(*rest[:-1], argparse.Namespace(**{**vars(rest[-1]), **few}))
    )
    captions, output = tmp_path / "captions.txt", tmp_path / "sensitivity.json"
    captions.write_text("a picture\n\nanother picture\na third\n")
    what = ["--pretrained_model_name_or_path", str(model_dir), "--train_data_dir", str(data_dir)]
    what += ["--captions_file", str(captions), "--resolution", str(SIZE), "--output", str(output)]
    what += ["--images_num", "2", "--timesteps", "1", "--num_inference_steps", "4", "--float_budget", "9"]
    sensitivity.main(what)
    report = json.loads(output.read_text())
    rows = {row["layer"]: row for row in report["layers"]}
    errors = [row["int8"]["guided"] for row in report["layers"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert sum(row["macs_percent"] for row in rows.values()) == pytest.approx(100)
    assert rows["conv_in"]["default"] == "float" and rows["mid_block.resnets.0.conv1"]["default"] == "int8"
    sums = {key: sum(row[key]["output"] for row in rows.values()) for key in ("int8", "input", "weights")}
    assert sums["int8"] == pytest.approx(sums["input"] + sums["weights"], rel=0.2)  # independent errors add up
    assert sum(errors) == pytest.approx(report["all_layers"]["int8"]["guided"], rel=0.5)
    assert report["all_layers"]["default"]["guided"] < report["all_layers"]["int8"]["guided"]
    with Image.open(tmp_path / "sensitivity.png") as image:
        assert image.getpixel((590, 82)) == (0xD9, 0x5F, 0x02)  # the first bar

    recipe = tmp_path / "sensitivity_float_9.json"
    chosen = sensitivity.kinds(
        trainer.quantization_config(parse("--quantization_config", str(recipe)), tiny_unet()), tiny_unet()
    )
    in_float = [name for name, kind in chosen.items() if kind != "int8"]
    assert 8 < sum(rows[name]["macs_percent"] for name in in_float) <= 9
    state = train(tmp_path / "trained", "--max_train_steps", "0", "--quantization_config", str(recipe))["state_dict"]
    for name, kind in chosen.items():
        assert (f"{name}.input_scale" in state) == (kind == "int8"), name
        assert (state[f"{name}.weight"].dtype == torch.int8) == (kind != "float"), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--float_budget", "0"], "between 0 and 100"),
        (["--timesteps", "60"], "--timesteps at most --num_inference_steps"),
        (["--train_data_dir", "nowhere"], "run make demo"),
    ],
)
def test_arguments_that_cannot_work_are_refused(flags: list[str], message: str, data_dir: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        sensitivity.parse_args(["--output", "x.json", "--train_data_dir", str(data_dir), *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err
