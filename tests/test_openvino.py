"""text2images.py in OpenVINO: the numbers of the reference path, what is kept on disk, what is sent (nothing)."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import text2images
from conftest import SIZE, run_command
from models import KINDS, generate, new_layer, pair_of_inputs, pixels, some_input, unet_inputs
from text2images import UsageError

CPU = torch.device("cpu")


def decibels(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR of images 0..255; equal ones have 120."""
    return 10 * np.log10(255**2 / (np.square(first - second).mean() + 255**2 * 1e-12))


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output.float() - expected).norm() / expected.norm()).item()


def run_openvino(model: object, *inputs: torch.Tensor) -> torch.Tensor:
    compiled = text2images.openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs])[0])


# ---------------------------------------------------------------- the same numbers


@pytest.mark.exact_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["int8", "paired", "int8 weights alone"])
def test_layer_in_openvino_computes_what_the_reference_path_does(kind: str, how: str) -> None:
    layer = new_layer(kind, quantize_input=how != "int8 weights alone", paired=how == "paired")
    x = pair_of_inputs(kind, batch=3, change=0.3) if how == "paired" else some_input(kind, batch=2)
    with torch.no_grad():
        expected = layer(x)
        in_bf16 = new_layer(kind, quantize_input=False)(x.bfloat16())
        in_fp32 = new_layer(kind, quantize_input=False)(x)
    model = text2images.trace(layer, {"x": x}, {"x": list(x.shape)}, "y")
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("FakeQuantize") == {"int8": 1, "paired": 2, "int8 weights alone": 0}[how]
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert any(node.get_element_type().get_type_name() == "i8" for node in constants)
    given = run_openvino(model, x)
    # A value on a rounding border may fall to its other side, which moves the outputs that it enters by one step.
    assert torch.isclose(given, expected, atol=1e-4 * expected.abs().max().item()).float().mean() > 0.95
    assert relative(given, expected) < relative(in_bf16, in_fp32)


@pytest.fixture(scope="module")
def settings(quant_model: Path, model_dir: Path) -> list[str]:
    return ["-m", str(model_dir), "-qm", str(quant_model), "-c", "x", "--dtype", "float32"]


def openvino_unet(settings: list[str], *flags: str) -> text2images.OpenVINOUNet:
    args = text2images.parse_args([*settings, *flags])
    return text2images.OpenVINOUNet(text2images.read_quant_model(args.quantized_model_name_or_path), args)


@pytest.fixture(scope="module")
def references(quant_model: Path) -> dict[str, nn.Module]:
    payload = text2images.read_quant_model(quant_model)
    unets = {
        name: text2images.build_int8_unet(payload, torch.float32, CPU, name == "paired") for name in ("paired", "plain")
    }
    unets["float"] = text2images.build_int8_unet(payload, torch.float32, CPU)
    for layer in unets["float"].modules():
        if isinstance(layer, text2images.Int8Layer):
            layer.quantize_input = False
    return unets


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 16), (4, 8, 24), (2, 10, 14), (6, 15, 9)])
def test_unet_in_openvino_fits_any_batch_and_size(
    settings: list[str], references: dict[str, nn.Module], batch: int, height: int, width: int
) -> None:
    """Without rounding, which lets small differences grow, the two are equal but for the order of their sums."""
    sample, timesteps, text = unet_inputs(batch, max(height, width))
    inputs = sample[:, :, :height, :width].contiguous(), timesteps[:1], text
    unet = openvino_unet(settings)
    unet.quantize_inputs = False
    expected = references["float"](*inputs)[0]
    assert torch.allclose(unet(*inputs)[0], expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.exact_kernels
@torch.no_grad()
@pytest.mark.parametrize("name", ["paired", "plain"])
def test_int8_unet_in_openvino_errs_as_the_reference_does(
    settings: list[str], references: dict[str, nn.Module], name: str
) -> None:
    """Sums in another order put values on the other side of a rounding border, and layer after layer more of them: the
    two drift apart, by no more than quantization itself costs."""
    sample, timesteps, text = unet_inputs(6)
    inputs = torch.cat([sample[:3]] * 2), timesteps[:1], text
    unet = openvino_unet(settings, *([] if name == "paired" else ["--no_paired_guidance"]))
    given, expected, exact = unet(*inputs)[0], references[name](*inputs)[0], references["float"](*inputs)[0]
    assert relative(given, expected) < relative(expected, exact)
    for sample in range(6):
        assert relative(given[sample], exact[sample]) < 1.3 * relative(expected[sample], exact[sample])


def test_the_last_layers_compute_in_fp32_in_a_model_in_bf16(settings: list[str]) -> None:
    core = text2images.openvino_core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO computes in fp32 on this CPU")
    model = core.read_model(openvino_unet(settings, "--dtype", "bfloat16").model_file())
    sample, _, text = unet_inputs()
    model.reshape({0: list(sample.shape), 1: [1], 2: list(text.shape)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    run = [
        (facts["layerType"].astype(str), facts["runtimePrecision"].astype(str))
        for facts in (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    ]
    norms, convs = ([precision for kind, precision in run if kind == wanted] for wanted in ("MVN", "Convolution"))
    assert norms[-1] == convs[-1] == "f32" and set(norms[:-1]) == {"bf16"} and "f32" not in convs[1:-1]


@torch.no_grad()
@pytest.mark.parametrize("quantize_input", [False, True])
def test_a_group_norm_is_divided_and_marked_unless_int8_follows(quantize_input: bool, tmp_path: Path) -> None:
    norm, conv = nn.GroupNorm(4, 16), new_layer("conv")
    conv = conv if quantize_input else nn.Conv2d(16, 4, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 16, 6, 7) + 1
    assert torch.allclose(text2images.DividedGroupNorm(norm)(x), norm(x), atol=1e-5)
    last = nn.Sequential(nn.SiLU(), text2images.DividedGroupNorm(norm), nn.SiLU(), conv)
    model = text2images.trace(last, {"x": x}, {"x": [-1, 16, -1, -1]}, "y")
    text2images.save_openvino_unet(model, tmp_path / "unet.xml")
    marks = (tmp_path / "unet.xml").read_text().count('name="precise"')
    assert marks == (0 if quantize_input else 9)


@pytest.mark.exact_kernels
def test_image_is_that_of_the_reference_path(model_dir: Path, quant_model: Path, tmp_path: Path) -> None:
    """Nearer than the images in bf16 and fp32 are to each other."""
    flags = ["-c", "a lake", "-n", "4", "--batch_size", "3"]  # the last batch is smaller
    runs = {"openvino": ["-qm", quant_model, "--dtype", "float32"], "fp32": [], "bf16": ["--dtype", "bfloat16"]}
    runs["torch"] = [*runs["openvino"], "--engine", "torch"]
    generated = {}
    for name, more in runs.items():
        rows = generate(model_dir, tmp_path / name, *flags, *more)
        generated[name] = np.stack([pixels(tmp_path / name / row["file"]) for row in rows])
    assert decibels(generated["openvino"], generated["torch"]) > decibels(generated["bf16"], generated["fp32"])
    assert decibels(generated["openvino"], generated["fp32"]) > decibels(generated["torch"], generated["fp32"]) - 1


@pytest.mark.exact_kernels
@pytest.mark.parametrize("cpu", ["AVX2", "AVX512_CORE", "AVX2_VNNI"])
def test_older_cpus_generate_the_same_image_and_say_how(
    model_dir: Path, quant_model: Path, tmp_path: Path, cpu: str
) -> None:
    """Without VNNI OpenVINO's int8 kernels saturate; then the layers' inputs stay float."""
    if cpu == "AVX2_VNNI" and "avx_vnni" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this CPU has no AVX-VNNI, so AVX2_VNNI means AVX2 here")
    flags = ["-m", model_dir, "-qm", quant_model, "-c", "a", "--dtype", "float32", "--num_inference_steps", "4"]
    command = [sys.executable, "text2images.py", *flags, "--output_dir", tmp_path / "older"]
    older = run_command(*command, ONEDNN_MAX_CPU_ISA=cpu)
    assert older.returncode == 0
    (line,) = [line for line in older.stderr.splitlines() if "layers in int8" in line]
    saturates = ", in float, as its int8 kernels saturate here (no VNNI)"
    assert line.endswith("by OpenVINO on CPU" + (saturates if cpu != "AVX2_VNNI" else ""))
    text2images.main([*map(str, flags), "--output_dir", str(tmp_path / "newer")])
    name = "a int8 seed 42.png"
    assert decibels(pixels(tmp_path / "older" / name), pixels(tmp_path / "newer" / name)) > 50


def test_a_signal_after_unets_have_come_and_gone_reaches_its_handler(settings: list[str]) -> None:
    """With a Core each, freed in this order, the process died of it."""
    first, second = openvino_unet(settings), openvino_unet(settings)
    del first, second
    gc.collect()
    arrived, handler = [], signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda *_: arrived.append(1))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, handler)
    assert arrived


# ---------------------------------------------------------------- which engine, which device


def test_without_openvino_the_reference_path_generates_and_one_line_says_so(
    settings: list[str], tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    caplog.set_level("WARNING")
    text2images.main([*settings, "--num_inference_steps", "1", "--output_dir", str(tmp_path)])
    (line,) = [record.message for record in caplog.records if "OpenVINO" in record.message]
    assert "--engine torch" in line and "pip install" in line
    with pytest.raises(UsageError, match="does not import.*pip install"):
        text2images.main([*settings, "--engine", "openvino", "--output_dir", str(tmp_path)])


def test_a_device_that_is_not_there_is_refused_with_those_that_are(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device GPU.77: OpenVINO cannot use it; there is CPU"):
        text2images.main([*settings, "--device", "GPU.77", "--output_dir", str(tmp_path)])


def test_cuda_is_taken_where_it_is_there_unless_openvino_is_asked_for(settings: list[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, engine in [([], "torch"), (["--engine", "openvino"], "openvino"), (["--device", "GPU"], "openvino")]:
        assert text2images.choose_engine(text2images.parse_args([*settings, *flags])) == engine


# ---------------------------------------------------------------- what is kept on disk


@pytest.fixture
def own_file(quant_model: Path, model_dir: Path, tmp_path: Path) -> list[str]:
    """The settings of a run with a quant_model.pt that has no OpenVINO form yet."""
    shutil.copy(quant_model, tmp_path / "quant_model.pt")
    return ["-m", str(model_dir), "-qm", str(tmp_path / "quant_model.pt"), "-c", "x", "--dtype", "float32"]


@pytest.fixture
def count_conversions(monkeypatch) -> Iterator[list[int]]:
    convert, made = text2images.unet_to_openvino, []
    monkeypatch.setattr(text2images, "unet_to_openvino", lambda unet: made.append(1) or convert(unet))
    yield made


def output_of(settings: list[str]) -> torch.Tensor:
    sample, timesteps, text = unet_inputs(2)
    return openvino_unet(settings)(sample, timesteps[:1], text)[0]


def test_the_form_is_made_once_and_a_damaged_one_anew(own_file: list[str], tmp_path: Path, count_conversions) -> None:
    expected = output_of(own_file)
    kept = sorted(path for path in (tmp_path / "quant_model.openvino").rglob("*") if path.is_file())
    assert {path.name for path in kept} == {"SHA256SUMS.json", "unet.xml", "unet.bin", "unet.blob"}
    assert torch.equal(output_of(own_file), expected) and len(count_conversions) == 1
    for path, conversions in [(path, path.name in ("unet.xml", "unet.bin")) for path in kept]:
        count_conversions.clear()
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
        if conversions:  # it is read only where another size is compiled
            for blob in (tmp_path / "quant_model.openvino").rglob("unet.blob"):
                blob.unlink()
        assert torch.equal(output_of(own_file), expected)
        assert len(count_conversions) == conversions, path
    assert not list((tmp_path / "quant_model.openvino").rglob("*.partial"))


def test_what_a_killed_run_left_goes_after_an_hour(own_file: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "quant_model.openvino"
    for age in (0, 4000):
        left = folder / f".openvino.{age}.partial"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    output_of(own_file)
    assert [path.name for path in folder.glob(".openvino.*")] == [".openvino.0.partial"]


def test_forms_of_earlier_contents_go(own_file: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "quant_model.openvino"
    for name in ("0123456789abcdef-0123456789abcdef", "not ours"):
        (folder / name).mkdir(parents=True)
    output_of(own_file)
    checksum = torch.load(tmp_path / "quant_model.pt", weights_only=True)["checksum"]
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 3 and names[2] == "not ours"
    assert all(name.startswith(checksum[:16]) for name in names[:2])


def test_weights_stay_int8_and_floats_fp16_on_disk(own_file: list[str], tmp_path: Path) -> None:
    weights = openvino_unet(own_file).model_file().with_suffix(".bin").stat().st_size
    state_dict = text2images.read_quant_model(tmp_path / "quant_model.pt")["state_dict"]
    held = sum(tensor.nbytes for tensor in state_dict.values())
    assert weights < 1.05 * held  # constants such as ranges come on top, which count in a tiny model alone


def test_other_contents_and_another_kind_of_graph_meet_no_stale_form(own_file: list[str]) -> None:
    args = text2images.parse_args(own_file)
    payload = text2images.read_quant_model(args.quantized_model_name_or_path)
    names = {text2images.graph_name(payload, args)}
    config = {**payload["unet_config"], "norm_eps": 1e-4}
    for other in ({**payload, "checksum": "other"}, {**payload, "unet_config": config}):
        names.add(text2images.graph_name(other, args))
    names.add(text2images.graph_name(payload, text2images.parse_args([*own_file, "--no_paired_guidance"])))
    assert len(names) == 4


def test_a_file_that_is_replaced_while_it_is_in_use_does_not_get_the_form_of_the_other(
    own_file: list[str], quant_model: Path, tmp_path: Path
) -> None:
    unet = openvino_unet(own_file)
    payload = torch.load(quant_model, weights_only=True)
    payload["state_dict"]["conv_out.bias"] += 1
    torch.save(payload | {"checksum": text2images.checksum(payload["state_dict"])}, tmp_path / "quant_model.pt")
    with pytest.raises(UsageError, match="start again"):
        unet.model_file()


@pytest.mark.skipif(os.name == "nt", reason="XDG_CACHE_HOME is not of Windows")
def test_where_the_file_lies_read_only_the_users_cache_folder_is_used(
    own_file: list[str], tmp_path: Path, monkeypatch, count_conversions
) -> None:
    (tmp_path / "quant_model.openvino").write_text("no folder can be made here, whoever one is")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = output_of(own_file)
    assert len(list((tmp_path / "cache/sd-unet-int8").rglob("unet.blob"))) == 1
    assert torch.equal(output_of(own_file), expected) and len(count_conversions) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "quant_model.openvino"))
    with pytest.raises(UsageError, match="or set XDG_CACHE_HOME"):
        output_of(own_file)


# ---------------------------------------------------------------- what leaves the house

WATCHED = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("network:", event, arguments[-1], file=sys.stderr, flush=True)
        raise OSError("no network here")
sys.addaudithook(watch)
"""


def test_nothing_is_sent_anywhere(own_file: list[str], tmp_path: Path) -> None:
    """Making OpenVINO's form included; the same import by itself does try, or this test would show nothing."""
    home = {"HOME": str(tmp_path / "home"), "CI": "", "TF_BUILD": "", "JENKINS_URL": ""}
    (tmp_path / "home").mkdir()
    flags = [*own_file, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    ours = run_command(sys.executable, "-c", f"{WATCHED}import text2images; text2images.main({flags})", **home)
    assert ours.returncode == 0 and "this is done once" in ours.stderr and "network:" not in ours.stderr
    assert not list((tmp_path / "home").rglob("openvino*"))  # nor is the user's own setting touched
    if importlib.util.find_spec("openvino_telemetry"):
        bare = "import openvino, time; time.sleep(3)"
        assert "network:" in run_command(sys.executable, "-c", WATCHED + bare, **home).stderr


# ---------------------------------------------------------------- the whole pipeline as OpenVINO models


def test_without_the_tokenizers_save_openvino_says_what_to_install(
    settings: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with pytest.raises(UsageError, match="requirements-openvino-genai.txt"):
        text2images.main([*settings, "--save_openvino", str(tmp_path / "saved"), "--output_dir", str(tmp_path)])
    assert not (tmp_path / "saved").exists()


def test_a_folder_that_exists_is_not_overwritten(settings: list[str], tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        text2images.parse_args([*settings, "--save_openvino", str(tmp_path)])
    assert stopped.value.code == 2 and "name another folder" in capsys.readouterr().err


GENAI = """
import sys, torch, openvino, openvino_genai, numpy
class Noise(openvino_genai.Generator):
    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
    def next(self):
        return torch.randn(1, generator=self.generator).item()
    def randn_tensor(self, shape):
        return openvino.Tensor(torch.randn(list(shape), generator=self.generator).numpy())
folder, caption, edge, out = sys.argv[1:]
pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
size = {"height": int(edge), "width": int(edge), "num_inference_steps": 20, "guidance_scale": 7.5}
numpy.save(out, pipeline.generate(caption, generator=Noise(42), **size).data[0])
"""


@pytest.mark.exact_kernels
@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is None, reason="openvino-genai is not installed")
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_openvino_genai_generates_from_the_saved_folder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("openvino_tokenizers")
    xl = "XL" in kind
    model, file = (
        request.getfixturevalue(name) for name in (("xl_dir", "xl_quant_model") if xl else ("model_dir", "quant_model"))
    )
    flags = ["-m", str(model), "-c", "a lake", "--num_inference_steps", "20", "--output_dir", str(tmp_path)]
    text2images.main([*flags, "-qm", str(file), "--save_openvino", str(tmp_path / "saved")])
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == kind and all(value is not None for value in index.values())
    out = tmp_path / "genai.npy"
    run = run_command(sys.executable, "-c", GENAI, tmp_path / "saved", "a lake", str(SIZE), out)
    assert run.returncode == 0
    assert 'name="precise"' in (tmp_path / "saved/unet/openvino_model.xml").read_text()
    text2images.main(flags)
    fp32 = np.asarray(Image.open(tmp_path / "a lake fp32 seed 42.png"), dtype=float)
    assert decibels(np.load(out).astype(float), fp32) > 40
