"""Files that are damaged or made to do harm: nothing runs, hangs or fills the memory; one line says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch
import torch.nn as nn

import text2images
import train_text_to_image_qat as trainer
from conftest import ROOT, run_command, tiny_pipeline, tiny_unet
from fuzz_quant_model import read_archive, with_checksum, write_archive
from text2images import UsageError

# ---------------------------------------------------------------- quant_model.pt: what only chance does to it


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    payload = text2images.read_quant_model(path)
    return payload["state_dict"], payload["unet_config"]


def test_a_file_cut_anywhere_is_refused(quant_model: Path, tmp_path: Path) -> None:
    data, cut = quant_model.read_bytes(), tmp_path / "cut.pt"
    for length in [*random.Random(0).sample(range(len(data)), 50), len(data) - 1, len(data) - 98]:
        cut.write_bytes(data[:length])
        with pytest.raises(UsageError, match="damaged"):
            text2images.read_quant_model(cut)


def test_a_flipped_bit_is_noticed_or_harmless(quant_model: Path, model_dir: Path, tmp_path: Path) -> None:
    """Wherever it is: in the weights, the pickle, the zip directory, the padding or the trailer."""
    data, flipped = quant_model.read_bytes(), tmp_path / "flipped.pt"
    state_dict, config = contents(quant_model)
    base = json.loads((model_dir / "unet" / "config.json").read_text())
    with zipfile.ZipFile(quant_model) as archive:
        size_of_pickle, start_of_directory = archive.getinfo("archive/data.pkl").file_size, archive.start_dir
    rng = random.Random(0)
    spans = [(0, size_of_pickle), (0, len(data)), (start_of_directory, len(data)), (len(data) - 98, len(data))]
    places = [rng.randrange(*span) for span in 25 * spans]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        flipped.write_bytes(changed)
        try:
            payload = text2images.read_quant_model(flipped)
            text2images.check_architecture(payload, base, "base")
        except UsageError:
            refused += 1
            continue
        assert payload["unet_config"] == config
        assert payload["state_dict"].keys() == state_dict.keys()
        assert all(torch.equal(payload["state_dict"][name], tensor) for name, tensor in state_dict.items())
    assert refused > len(places) / 3


# ---------------------------------------------------------------- quant_model.pt: what an author can do to it


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def nested(depth: int) -> bytes:
    """A pickle of {(...((),),...): 1}, whose key takes a stack frame a level to hash."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def doubled(depth: int, wrap: bytes) -> bytes:
    """A pickle whose size doubles a level: t = (t, t), or [t, t], as `wrap` says; memo 0 holds t."""
    return b")q\x00" + (wrap % {b"t": b"h\x00h\x00"} + b"q\x00") * depth + b"0h\x00"


def with_expanded_tensor(path: Path, quant_model: Path, elements: int) -> None:
    payload = torch.load(quant_model, weights_only=True)
    payload["state_dict"]["conv_in.bias"] = torch.zeros(1).expand(elements)
    torch.save(payload, path)


def tensor_of(elements: int) -> bytes:
    """A pickle of a tensor of so many numbers, in a storage that claims to hold them."""
    number = b"\x8a\x08" + struct.pack("<q", elements)
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"tQ"
    rest = b"K\0(" + number + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtR."
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + storage + rest


def zip_bomb(path: Path, forged: bool) -> None:
    """400 MB of pickle in 2 MB; forged: behind the zip64 trailer of torch.save."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"N" * (4 * 10**8))
    if forged:
        data = path.read_bytes()[:-22]
        start = zipfile.ZipFile(path).start_dir
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(data) - start, start)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(data), 1)
        full = 2**32 - 1
        path.write_bytes(data + end + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, full, full, 0))


def original_recipe(path: Path) -> None:
    """What the original's torch.save(model.state_dict()) left: tensors of PyTorch's own quantized kinds."""
    weight = torch.quantize_per_channel(torch.randn(4, 4, 3, 3), torch.rand(4), torch.zeros(4), 0, torch.qint8)
    torch.save(OrderedDict({"conv_in.weight": weight, "conv_in.scale": torch.tensor(0.1)}), path)


def write_hostile_files(quant_model: Path, folder: Path, trace: Path) -> dict[str, str]:
    """{name: a part of the message it must get}, and the files beside each other in `folder`."""
    expected: dict[str, str] = {}

    def new(name: str, message: str) -> Path:
        expected[name] = message
        return folder / name

    def new_pickle(name: str, message: str, pickled: bytes) -> None:
        write_archive(new(name, message), pickled, read_archive(quant_model)[1])

    touch = Call(Path.touch, trace)
    for name, call in {
        "code": touch,
        "system": Call(os.system, f"touch '{trace}'"),
        "eval": Call(eval, f"open({str(trace)!r}, 'w')"),
        "bytearray": Call(bytearray, 10**12),  # this and the next ones are fine by torch.load(weights_only=True)
        "tensor": Call(torch.Tensor, 2**40),
        "storage": Call(torch.UntypedStorage, 2**34),
    }.items():
        new_pickle(name, "could run code (it names", pickle.dumps({"format": "sd-unet-int8", "x": call}, 2))
    new("plain pickle", "damaged").write_bytes(pickle.dumps(touch))
    torch.save(nn.Linear(2, 2), new("module", "could run code (it names"))
    original_recipe(new("original", "Intel's original example"))

    new_pickle("hash for ever", "damaged", b"\x80\x02}" + doubled(60, b"%(t)b\x86") + b"K\x01s.")
    new_pickle("deep key", "damaged", nested(400_000))
    laughs = b"\x80\x02}(X\x06\x00\x00\x00formatX\x0c\x00\x00\x00sd-unet-int8X\x0e\x00\x00\x00format_version"
    new_pickle("laughs", "damaged", laughs + doubled(60, b"](%(t)be") + b"u.")
    new_pickle("long pickle", "damaged", b"\x80\x02" + b"\x8f0" * 600_000 + b"}.")
    many = {f"data/{'x' * 100}{number}": b"" for number in range(9000)}
    write_archive(new("directory", "damaged"), read_archive(quant_model)[0], many)
    zip_bomb(new("bomb", "damaged"), forged=False)
    zip_bomb(new("forged bomb", "damaged"), forged=True)
    with_expanded_tensor(new("repeated", "conv_in.bias' is no plain tensor"), quant_model, 2**40)
    new_pickle("terabytes", "damaged", tensor_of(2**40))
    new_pickle("negative", "damaged", tensor_of(-1))

    payload = torch.load(quant_model, weights_only=True)
    config, state_dict = payload["unet_config"], payload["state_dict"]
    for key, value in {
        "layers_per_block": 10**9,
        "block_out_channels": (2**40, 2**41),
        "down_block_types": ("DownBlock2D",) * 10**4,
        "transformer_layers_per_block": [[[10**9]]],
        "act_fn": "os.system",
    }.items():
        file = new(f"config {key}", f"whose UNet has {key} ")
        torch.save({**payload, "unet_config": {**config, key: value}}, file)
    for name, changes, message in [
        ("base model", {"base_model": "a\nb\x1b[2J", "unet_config": {}}, r"from 'a\nb\x1b[2J', whose UNet has"),
        ("no config", {"unet_config": None}, "no unet_config"),
        ("newer", {"format_version": 2}, "format version 2; this script reads 1: update it"),
        ("version", {"format_version": list(range(10**4))}, "format version [0, 1, 2, 3, 4, 5, ...]"),
    ]:
        torch.save({**payload, **changes}, new(name, message))
    scale, bias = "mid_block.resnets.0.conv1.weight_scale", "conv_out.bias"
    for name, changes, message in [
        ("nan", {scale: state_dict[scale] * float("nan")}, f"{scale} is not a positive number"),
        ("negative scale", {scale: -state_dict[scale]}, f"{scale} is not a positive number"),
        ("inf", {bias: state_dict[bias] + float("inf")}, f"{bias} holds values that are not finite"),
        ("zero point", {scale[:-12] + "input_zero_point": torch.tensor(256, dtype=torch.int32)}, "not within 0..255"),
        ("shape", {bias: state_dict[bias][:2].clone()}, f"{bias} is float32 [2], not float32 [4]"),
        ("kind", {scale: state_dict[scale].half()}, f"{scale} is float16 [64], not float32 [64]"),
        ("extra", {"mid_block.more": torch.ones(1)}, "mid_block.more is not part of it"),
        ("name", {"a\x1b[2J": torch.ones(1)}, r"'a\x1b[2J' is no plain tensor"),
        ("no layer", {"conv_norm_out.input_scale": torch.ones(1)}, "conv_norm_out is neither Linear nor Conv2d"),
        (
            "bomb",
            {"conv_out.weight_scale": torch.ones(10**6), "conv_out.input_factor": torch.ones(64)},
            "conv_out.input_factor is float32 [64], not float32 [32]",
        ),
    ]:
        changed = with_checksum({**payload, "state_dict": {**state_dict, **changes}})
        torch.save(changed, new(name, message))
    del state_dict[bias]
    torch.save(with_checksum(payload), new("missing", f"{bias} is missing"))
    whole = {**payload, "state_dict": dict(tiny_unet().state_dict())}
    torch.save(with_checksum(whole), new("float", "not one layer is int8"))
    return expected


DRIVER = """
import json, resource, sys, time, text2images
for path in sys.argv[2:]:
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text2images.main(["-m", sys.argv[1], "-qm", path, "-c", "a", "--output_dir", path + " images"])
        message = "generated"
    except text2images.UsageError as error:
        message = str(error)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(json.dumps([message, time.process_time() - began, growth / 1024]))
"""


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_hostile_quant_models_get_one_line_each(quant_model: Path, model_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was here"
    expected = write_hostile_files(quant_model, tmp_path, trace)
    result = run_command(sys.executable, "-c", DRIVER, model_dir, *(tmp_path / name for name in expected))
    assert result.returncode == 0
    assert not trace.exists()
    for (name, part), line in zip(expected.items(), result.stdout.splitlines(), strict=True):
        message, seconds, mebibytes = json.loads(line)
        assert part in message and message.isprintable() and len(message) < 400, (name, message)
        assert seconds < 5 and mebibytes < 100, (name, seconds, mebibytes)
        assert not list((tmp_path / f"{name} images").iterdir())


def test_a_hostile_file_ends_the_command_with_2(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was here"
    write_archive(tmp_path / "q.pt", pickle.dumps(Call(Path.touch, trace), 2), {})
    result = run_command(sys.executable, "text2images.py", "-m", model_dir, "-qm", tmp_path / "q.pt", "-c", "a")
    assert result.returncode == 2 and result.stdout == "" and not trace.exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("text2images.py: error: -qm ") and "could run code" in line


def fuzz(*command: str | Path, timeout: float) -> dict[str, int]:
    command = (sys.executable, "-W", "ignore", "tests/robustness/fuzz_quant_model.py", *command)
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert child.returncode == 0, child.stderr[-5000:]
    print(child.stdout)
    return json.loads(child.stdout)


def test_fuzzed_quant_models_are_refused_or_harmless(model_dir: Path, quant_model: Path) -> None:
    """The first 60 variants, which are always the same; a variant that does harm ends the process."""
    outcomes = fuzz("--executions", "60", model_dir, quant_model, timeout=300)
    accepted = sum(count for outcome, count in outcomes.items() if outcome.startswith("accepted"))
    assert outcomes["executions"] == 60 and 5 < accepted < 30 and len(outcomes) > 8


@pytest.mark.full
def test_fuzzed_quant_models_for_ten_minutes(model_dir: Path, quant_model: Path) -> None:
    outcomes = fuzz("--seconds", "600", "--first", "1000000", model_dir, quant_model, timeout=720)
    assert outcomes["executions"] > 1000 and outcomes["accepted, with a new checksum"] > 10


# ---------------------------------------------------------------- a name that is gone


@pytest.mark.parametrize("script", [text2images, trainer])
def test_the_model_that_has_left_the_hub_is_replaced_by_its_copy(script, tmp_path: Path, monkeypatch, caplog) -> None:
    asked = []

    def load_config(name: str, **options: Any) -> dict[str, str]:
        asked.append(name)
        return {"_class_name": "NoMore"}

    monkeypatch.setattr(text2images.StableDiffusionPipeline, "load_config", load_config)
    caplog.set_level("INFO")
    parts = SimpleNamespace(pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5", dtype="float32")
    parts.quantized_model_name_or_path = parts.disable_safety_checker = parts.revision = parts.cache_dir = None
    parts.config = parts.lora = None
    with pytest.raises(script.UsageError, match="NoMore"):
        script.load_pipeline(parts) if script is text2images else script.load_pipeline(parts, None)
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"] and "has left the hub" in caplog.text


# ---------------------------------------------------------------- captions are data


NASTY = ["..", "/", "\\", "~", ":", "|", ".", " ", "\0", "\n", "\x1b[2J", "\x85", "\u2028", "\u202e", "\u2066"]
NASTY += ["\ufeff", "\ud83d", "\U0001f40e", "\u200d", "a", "\u00e9", "e\u0301", "\u65e5\u672c" * 40, "x" * 140]
NASTY += ["con", "NUL", "com1", "LPT\u00b9", "conin$", ".png", "C:", "%2e%2e", "$HOME", "-rf", "_", "*", "?", '"', "<"]
NASTY += [">", "\t", "\u00a0"]
DEVICES = ("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "COM1", "LPT1", "LPT\u00b9")  # reserved on Windows


def test_no_caption_leaves_the_folder_or_makes_a_name_that_a_system_refuses(tmp_path: Path) -> None:
    rng = random.Random(0)
    captions = [*NASTY, *("".join(rng.choices(NASTY, k=rng.randrange(1, 9))) for _ in range(1500))]
    for count, caption in enumerate(captions):
        name = text2images.safe_name(caption)
        assert 0 < len(name.encode()) <= 150, ascii(caption)  # also: no half of a surrogate pair
        assert name == name.strip(" .") and not set(name) & set('/\\:*?"<>|'), ascii(caption)
        assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name), ascii(caption)
        assert not any(unicodedata.bidirectional(letter)[:2] in ("RL", "LR", "PD", "FS") for letter in name)
        stem = name.split(".")[0].rstrip().upper()
        assert stem not in DEVICES, ascii(caption)
        assert text2images.safe_name(name) == name
        path = text2images.free_path(tmp_path, f"{name} fp32 seed 42")
        assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve() and not path.exists()
        if count % 10 == 0:
            path.touch()
    assert len(list(tmp_path.iterdir())) == len(captions[::10])


def test_captions_that_are_not_utf8_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        text2images.parse_args(["-m", "x", "-c", os.fsdecode(b"caf\xe9")])
    assert left.value.code == 2 and "--captions must be UTF-8" in capsys.readouterr().err


def test_a_caption_of_any_kind_is_generated_and_told_as_it_was(model_dir: Path, tmp_path: Path) -> None:
    captions = ["../../x", "nul\0byte", "\u202egnp.exe", "con.txt", "x" * 100_000, "\x1b[2J", "{0}%s$HOME`id`"]
    flags = ["--num_inference_steps", "1", "--batch_size", str(len(captions)), "--output_dir", str(tmp_path / "out")]
    text2images.main(["-m", str(model_dir), "-c", *captions, *flags])
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["caption"] for row in rows] == captions
    assert all((tmp_path / "out" / row["file"]).is_file() for row in rows)
    assert os.listdir(tmp_path) == ["out"] and len(os.listdir(tmp_path / "out")) == 2 * len(captions) + 1


# ---------------------------------------------------------------- what the trainer reads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "recursion"),
        ('{"local": {"conv_in": 5}}', "recipe.json"),
        ('{"global": {"white_list": [7]}}', "'7' matches none"),
        ('{"local": {"(([a-z_0-9.]+)+)+!": {}}}', "could take for ever"),
        ('{"local": {".*.*.*.*.*.*!": {}}}', "could take for ever"),
        ('{"local": {".?.?.?.?.?.?.?.?.?.?.?.?.?.?.?.?!": {}}}', "could take for ever"),
    ],
)
def test_hostile_recipes_are_refused_in_time(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    flags = ["--pretrained_model_name_or_path", "x", "--dataset_name", "y"]
    args = trainer.parse_args([*flags, "--quantization_config", str(tmp_path / "recipe.json")])
    began = time.process_time()  # which other processes do not add to
    with pytest.raises(trainer.UsageError, match=message):
        trainer.quantization_config(args, tiny_unet())
    assert time.process_time() - began < 5


def test_damaged_checkpoints_are_named_before_anything_is_trained(train, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "1", "--checkpointing_steps", "1"]
    train(tmp_path, *flags)
    state, settings = tmp_path / "checkpoint-1" / "state.pt", tmp_path / "checkpoint-1" / "settings.json"
    good, trace = {path: path.read_bytes() for path in (state, settings)}, tmp_path / "was here"
    flipped = bytearray(good[state])
    flipped[len(flipped) // 2] ^= 1  # in the middle of a weight: only the sum of the record tells
    damaged = [(state, bytes(flipped), "state.pt is damaged"), (state, good[state][:-5000], "state.pt is damaged")]
    damaged += [(state, pickle.dumps(Call(Path.touch, trace), 2), "state.pt is damaged")]
    damaged += [
        (settings, text, "settings.json is damaged") for text in (b"", b"{", b"[1]", b"[" * 200_000, b"\xff", b"7")
    ]
    damaged += [(settings, b"{}", "is of another version of this script"), (settings, None, "settings.json is damaged")]
    for path, data, message in damaged:
        path.write_bytes(data) if data is not None else path.unlink()
        with pytest.raises(trainer.UsageError, match=message):
            train(tmp_path, *flags, "--resume_from_checkpoint", "latest")
        path.write_bytes(good[path])
    assert not trace.exists()
    train(tmp_path, *flags, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("line", ["[" * 200_000, "7", "null", '{"file_name": 7, "text": "a"}', "[" + "9" * 5000 + "]"])
def test_hostile_metadata_gets_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(trainer.UsageError) as refused:
        trainer.read_metadata(tmp_path, "file_name", "text")
    assert str(refused.value).startswith(f"{tmp_path}/metadata.jsonl") and "\n" not in str(refused.value)


def test_postscript_named_jpg_is_not_handed_to_ghostscript(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(postscript)
    calls = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *arguments: calls.append(arguments))
    with PIL.Image.open(tmp_path / "a.jpg") as image:  # Pillow by itself would
        assert image.format == "EPS"
    rows = [(str(tmp_path / "a.jpg"), "bad"), (str(data_dir / "0001.jpg"), "good")]
    flags = ["--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--resolution", "32"]
    dataset = trainer.CaptionedImages(rows, [tiny_pipeline().tokenizer], trainer.parse_args(flags))
    assert dataset[(0, 0)]["replaced"].item() >= 1 and not calls
