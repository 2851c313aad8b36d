"""amx_attention.cpp and vnni_attention.cpp: what they compute, by all their instructions, and where they are used."""

from __future__ import annotations

import argparse
import ctypes
import functools
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

import text2images
import unet_step
from conftest import ROOT

COMPILER = shutil.which(os.environ.get("CXX") or "c++")
SOURCES = text2images.ATTENTION_KERNELS
# As text2images.py builds it for this CPU; for CPUs without AMX; with AMX's tiles emulated; for CPUs without AVX-512.
BUILDS = {"native": "", "AVX512-BF16": "-mno-amx-bf16", "AVX-VNNI": "-march=alderlake"}
BUILDS["emulated AMX"] = f"-DEMULATED_TILES='\"{ROOT}/tests/emulated_tiles.h\"'"
BF16_KERNELS = [("native", "bf16"), ("AVX512-BF16", "bf16"), ("emulated AMX", "bf16")]
KERNELS = [*BF16_KERNELS, ("native", "f32"), ("AVX-VNNI", "f32")]


NOT_HERE = "no C++ compiler, or no such instructions"


def runs_here(precision: str, build: str = "native") -> bool:
    here = "avx_vnni" in text2images.cpu_flags() if build == "AVX-VNNI" else SOURCES[precision].runs_here()
    return COMPILER is not None and here


def in_precisions(*precisions: str) -> pytest.MarkDecorator:
    """A case for each that this CPU has instructions for."""
    cases = [
        pytest.param(precision, marks=pytest.mark.skipif(not runs_here(precision), reason=NOT_HERE))
        for precision in precisions or SOURCES
    ]
    return pytest.mark.parametrize("precision", cases)


@dataclass
class Kernel:
    library: ctypes.CDLL
    precision: str

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its output in fp32, from inputs of its own precision."""
        q, k, v = (tensor.to(SOURCES[self.precision].dtype) for tensor in (q, k, v))
        output = torch.full_like(q, 12345.0)
        text2images.attend(self.library, *map(text2images.as_array, (q, k, v, output)))
        return output.float()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ctypes.CDLL]:
    """The library of each build and precision, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("attention")
    openvino = Path(text2images.import_openvino().__file__).parent

    @functools.cache
    def library(build: str, precision: str) -> ctypes.CDLL:
        compiler = folder / "compiler"  # as far as text2images.py can see
        compiler.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" {BUILDS[build]}\n')
        compiler.chmod(0o755)
        path = folder / f"{build} {precision}.so"
        text2images.build_attention(SOURCES[precision].source, str(compiler), openvino, path)
        return ctypes.CDLL(str(path))

    return library


@pytest.fixture(params=KERNELS, ids=" ".join)
def kernel(request: pytest.FixtureRequest, libraries: Callable[[str, str], ctypes.CDLL]) -> Kernel:
    build, precision = request.param
    if not runs_here(precision, build):
        pytest.skip(NOT_HERE)
    return Kernel(libraries(build, precision), precision)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(output - expected) / torch.linalg.norm(expected))


def random_inputs(width: int, queries: int, keys: int, heads: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(width * queries + keys)
    return tuple(torch.randn(2, length, heads, width, generator=generator) for length in (queries, keys, keys))


@pytest.mark.parametrize("width", text2images.ATTENTION_WIDTHS)
@pytest.mark.parametrize("lengths", [(1, 1), (31, 31), (33, 77), (77, 33), (1000, 1000), (70, 257), (5, 513)], ids=str)
@pytest.mark.parametrize("size", [0.01, 1.0, 8.0])
def test_attention_errs_hardly_more_than_pytorchs_in_bf16_and_by_a_tenth_of_that_in_fp32(
    kernel: Kernel, width: int, lengths: tuple[int, int], size: float
) -> None:
    """In bf16, than one that rounds inputs and outputs only."""
    q, k, v = random_inputs(width, *lengths)
    q = q * size
    expected, output = exact(q, k, v), kernel(q, k, v)
    if kernel.precision == "bf16":
        pytorchs = exact(*(x.bfloat16() for x in (q, k, v))).bfloat16()
        assert error(output, expected) <= 1.3 * error(pytorchs, expected) + 2e-3
    else:
        assert error(output, expected) <= 1e-3


@pytest.mark.parametrize("width", [40, 160])
def test_scores_of_200_and_more_neither_overflow_nor_vanish(kernel: Kernel, width: int) -> None:
    """One key dominates, or all but that one do."""
    q, k, v = torch.ones(1, 64, 1, width), torch.zeros(1, 400, 1, width), random_inputs(width, 1, 400, 1)[2][:1]
    k[0, :, 0, 0] = 1.0
    for dominant, value in ((7, 4096.0), (300, 2048.0), (399, 1e30)):
        k[0, :, 0, 1] = -value
        k[0, dominant, 0, 1] = value
        for sign in (1, -1):  # and all but that key, by the same weight
            output = kernel(sign * q, k, v)
            assert error(output, exact(sign * q, k, v)) < {"bf16": 5e-3, "f32": 1e-3}[kernel.precision]
            assert torch.isfinite(output).all()


def test_equal_scores_give_the_mean(kernel: Kernel) -> None:
    q, k, v = random_inputs(64, 50, 1000)
    v = v.bfloat16().float()
    for equal in (torch.zeros_like(k), torch.full_like(k, 3.0), torch.full_like(k, -1e4)):
        expected = v.double().mean(dim=1, keepdim=True).expand_as(q)
        limit = {"bf16": 2e-3, "f32": 1e-3}[kernel.precision]  # of numbers of size 1
        assert (kernel(q, equal, v) - expected).abs().max() < limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_spoils_what_it_does_in_pytorch(kernel: Kernel, bad: float, place: str) -> None:
    """In fp32, all queries of a head whose keys or values are not finite."""
    inputs = dict(zip("qkv", random_inputs(40, 70, 90)))
    inputs[place][1, 5, 2, 11] = bad
    output, expected = kernel(**inputs), exact(**inputs)
    finite = torch.isfinite(expected).all(dim=-1)
    if kernel.precision == "f32" and place != "q":
        finite[1, :, 2] = False
    assert torch.equal(torch.isfinite(output).all(dim=-1), finite)
    assert error(output[finite], expected[finite]) < 0.01


def test_a_width_without_kernel_is_refused(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="width 48"):
        kernel(*random_inputs(48, 40, 40))


@pytest.mark.parametrize("kernel", BF16_KERNELS, ids=" ".join, indirect=True)
def test_of_bf16_inputs_it_errs_as_pytorchs_does(kernel: Kernel) -> None:
    q, k, v = (x.bfloat16() for x in random_inputs(80, 33, 300))
    expected = exact(q, k, v)
    pytorchs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert error(kernel(q, k, v), expected) <= 1.2 * error(pytorchs, expected)


def test_threads_and_batches_change_nothing(kernel: Kernel) -> None:
    q, k, v = random_inputs(40, 300, 1100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernel(q, k, v)
        torch.set_num_threads(3)
        assert torch.equal(kernel(q, k, v), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(kernel(*(x[1:].contiguous() for x in (q, k, v))), one[1:])


# ---------------------------------------------------------------- in text2images.py


def attention_model(queries: int, keys: int, width: int, mask: bool = False):
    """OpenVINO's model of one attention, as diffusers has it: [B, L, 2 heads, D] in and out."""
    ov = text2images.import_openvino()
    ops, order = ov.opset13, np.array([0, 2, 1, 3])
    lengths = {"q": queries, "k": keys, "v": keys}
    inputs = [ops.parameter([1, length, 2, width], ov.Type.f32, name=name) for name, length in lengths.items()]
    transposed = [ops.transpose(tensor, ops.constant(order)) for tensor in inputs]
    more = [ops.constant(np.zeros((queries, keys), np.float32))] if mask else []
    attention = ops.scaled_dot_product_attention(*transposed, *more, causal=False)
    return ov.Model([ops.multiply(ops.transpose(attention, ops.constant(order)), ops.constant(np.float32(2)))], inputs)


def operations(model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@in_precisions()
@pytest.mark.parametrize(
    ("queries", "keys", "width", "mask", "replaced"),
    [
        (1024, 1024, 40, False, True),
        (1024, 77, 40, False, True),
        (1023, 1023, 40, False, False),
        (77, 1024, 40, False, False),
        (1024, 1024, 48, False, False),
        (1024, 1024, 40, True, False),
    ],
)
def test_only_attention_of_many_queries_without_mask_is_replaced(
    queries: int,
    keys: int,
    width: int,
    mask: bool,
    replaced: bool,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = attention_model(queries, keys, width, mask)
    text2images.replace_long_attention(model, text2images.long_attention_operation(precision), precision)
    assert (f"LongAttention_{precision}" in operations(model)) == replaced
    assert ("ScaledDotProductAttention" in operations(model)) != replaced


@in_precisions()
@pytest.mark.parametrize("keys", [1024, 77])
def test_openvino_runs_it_also_from_a_compiled_model_on_disk(keys: int, precision: str) -> None:
    core, operation = text2images.openvino_core(), text2images.long_attention_operation(precision)
    model = attention_model(1024, keys, 64)
    inputs = [tensor[:1].contiguous().numpy() for tensor in random_inputs(64, 1024, keys, heads=2)]
    expected = 2 * exact(*map(torch.from_numpy, inputs))
    text2images.replace_long_attention(model, operation, precision)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    loaded = core.import_model(compiled.export_model(), "CPU", {})
    for each in (compiled, loaded):
        assert error(torch.from_numpy(each(inputs)[0]), expected) < {"bf16": 0.01, "f32": 1e-3}[precision]


@pytest.mark.parametrize(
    ("limit", "withheld"),
    [
        ("", ()),
        ("ALL", ()),
        ("AVX512_CORE_AMX", ()),
        ("avx512_core_bf16", ("amx",)),
        ("AVX512_CORE_VNNI", ("amx", "avx512_bf16")),
        ("AVX512_CORE", ("amx", "avx512_bf16", "avx512_vnni", "avx_vnni")),
        ("AVX2_VNNI", ("amx", "avx512")),
        ("AVX2", ("amx", "avx512", "avx_vnni")),
        ("SSE41", ("amx", "avx512", "avx_vnni")),
    ],
)
def test_an_imitated_cpu_has_no_instructions_that_the_other_lacks(
    limit: str, withheld: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"]
    monkeypatch.setattr(text2images.Path, "is_file", lambda path: True)
    monkeypatch.setattr(text2images.Path, "read_text", lambda path: f"model: 1\nflags\t\t: {' '.join(flags)}\nbugs:\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert text2images.cpu_flags() == [flag for flag in flags if not flag.startswith(withheld)]


@pytest.mark.parametrize("precision", SOURCES)
@pytest.mark.parametrize("problem", ["other CPU", "imitated CPU", "no compiler", "failing compiler", "wrong results"])
def test_without_it_attention_is_openvinos_own_and_one_line_says_why(
    problem: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if problem == "imitated CPU":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    else:
        flags = [] if problem == "other CPU" else [*SOURCES[precision].flags[0]]
        monkeypatch.setattr(text2images, "cpu_flags", lambda: flags)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'attention.cpp:1: no such thing' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "none") if problem == "no compiler" else str(compiler))
    if problem == "wrong results":
        monkeypatch.setattr(text2images, "build_attention", lambda *args: args[-1].write_bytes(b"0"))
        monkeypatch.setattr(text2images.ctypes, "CDLL", lambda path: None)
        monkeypatch.setattr(text2images, "attention_is_right", lambda library, precision: False)
    with caplog.at_level(logging.INFO, "text2images"):
        assert text2images.long_attention_operation.__wrapped__(precision) is None  # without what it found before
    said = {
        "other CPU": "no CPU with AVX",
        "imitated CPU": "no CPU with AVX",
        "no compiler": "no C++ compiler",
        "failing compiler": "no such thing",
    }
    lines = [record.message for record in caplog.records if "by OpenVINO's own kernel" in record.message]
    assert len(lines) == 1 and said.get(problem, "computes something else") in lines[0]
    assert not list((tmp_path / "cache").rglob("*.partial"))


@in_precisions("f32")
def test_it_is_built_once_and_anew_if_damaged(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build(source: Path, compiler: str, openvino: Path, output: Path) -> None:
        built.append(output)
        shutil.copy(good, output)

    text2images.load_attention(precision)
    (folder,) = (tmp_path / "sd-unet-int8").glob("attention-*")
    good = shutil.copy(folder / "attention.so", tmp_path)
    monkeypatch.setattr(text2images, "build_attention", build)
    text2images.load_attention(precision)
    assert not built
    (folder / "attention.so").unlink()
    (folder / "attention.so").write_bytes(b"damaged")
    text2images.load_attention(precision)
    assert len(built) == 1


@in_precisions()
def test_a_library_that_leaves_out_keys_is_not_used(
    precision: str, libraries: Callable[[str, str], ctypes.CDLL]
) -> None:
    library = libraries("native", precision)

    def fewer_keys(*arguments) -> int:
        *first, keys, heads, width, threads = arguments
        return library.attention(*first, ctypes.c_int64(keys.value - 16), heads, width, threads)

    assert text2images.attention_is_right(library, precision)
    assert not text2images.attention_is_right(SimpleNamespace(attention=fewer_keys), precision)


@in_precisions()
@torch.no_grad()
def test_int8_unet_computes_the_same_with_it_also_when_loaded_again(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the graph of 1,024 pixels and more, and in no other."""
    dtype = {"bf16": "bfloat16", "f32": "float32"}[precision]
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (80,), "attention_head_dim": 2, "cross_attention_dim": 32, "norm_num_groups": 8}
    UNet2DConditionModel(**blocks, **sizes, layers_per_block=1).save_pretrained(tmp_path / "unet")
    args = argparse.Namespace(model=tmp_path / "unet", work_dir=tmp_path, shape=(2, 32))
    file = unet_step.write_ours(args)
    calls = []

    def counting(*arguments) -> None:
        calls.append(arguments)
        attend_by_library(*arguments)

    text2images.long_attention_operation(precision)  # which tries it once
    if precision == "f32":  # no rounded inputs, which would go the other way for the least difference
        monkeypatch.setattr(text2images, "kernels_are_exact", lambda device: False)
    attend_by_library = text2images.attend
    monkeypatch.setattr(text2images, "attend", counting)

    def output(dtype: str, edge: int = 32) -> tuple[torch.Tensor, int]:
        flags = text2images.parse_args(["-m", "x", "-c", "x", "-qm", str(file), "--dtype", dtype])
        unet = text2images.OpenVINOUNet(text2images.read_quant_model(file), flags)
        calls.clear()
        sample, timestep, text = unet_step.example(args, unet.config, torch.float32)
        return unet(sample[:, :, :edge], timestep, text)[0], len(calls)

    (once, used), (again, used_again), (_, used_for_less) = output(dtype), output(dtype), output(dtype, edge=30)
    assert used == used_again == 8 and used_for_less == 0
    assert torch.equal(once, again)
    monkeypatch.setattr(text2images, "long_attention_operation", lambda precision: None)
    (without, unused), (fp32, _) = output(dtype), output("float32")
    assert unused == 0
    if precision == "bf16":
        assert error(once, fp32) < 1.2 * error(without, fp32)
    else:
        assert error(once, without) < 1e-3
