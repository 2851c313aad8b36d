#!/usr/bin/env python
"""Attention by amx_attention.cpp (bf16) or vnni_attention.cpp (fp32), PyTorch and OpenVINO: time, error to fp64.

The sizes are those of SD v1.5 and SDXL at their training resolutions, batch 2 as with guidance; a caption has 77 keys.
All run in turn in one process. "seconds" is the median, "limit_seconds" what the kernel's products and exponentials
take when all they need is in the L1 cache (their sum, or the larger of both where AMX computes products beside the
exponentials), "limit_share" that over "seconds".

    python benchmarks/attention.py --output benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import text2images  # noqa: E402
from output import machine, write_json  # noqa: E402
from timing import interleaved  # noqa: E402

Size = tuple[int, int, int, int]  # heads, queries, keys, width of a head
SIZES: list[Size] = [(8, 4096, 4096, 40), (8, 1024, 1024, 80), (8, 256, 256, 160)]  # SD v1.5
SIZES += [(8, 4096, 77, 40), (8, 1024, 77, 80), (10, 4096, 4096, 64), (20, 1024, 1024, 64)]
BATCH = 2
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v: [B, L, heads, D], in the dtype to compute in
PRECISIONS = {kernel.dtype: name for name, kernel in text2images.ATTENTION_KERNELS.items()}


def by_pytorch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    transposed = [tensor.transpose(1, 2) for tensor in inputs]
    return lambda: F.scaled_dot_product_attention(*transposed).transpose(1, 2)


def by_openvino(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Its fused attention, as inside of a UNet."""
    ov, dtype = text2images.import_openvino(), inputs[0].dtype
    ops, order, kind = ov.opset13, np.array([0, 2, 1, 3]), getattr(ov.Type, PRECISIONS[dtype])
    parameters = [ops.parameter(list(tensor.shape), kind) for tensor in inputs]
    transposed = [ops.transpose(parameter, ops.constant(order)) for parameter in parameters]
    output = ops.transpose(ops.scaled_dot_product_attention(*transposed, causal=False), ops.constant(order))
    flags = ["-m", "given", "-c", "given", "-qm", "given", "--dtype", str(dtype).removeprefix("torch.")]
    model, settings = ov.Model([output], parameters), text2images.openvino_settings(text2images.parse_args(flags))
    request = text2images.openvino_core().compile_model(model, "CPU", settings).create_infer_request()
    tensors = [ov.Tensor(kind, ov.Shape(list(tensor.shape))) for tensor in inputs]
    for number, (tensor, source) in enumerate(zip(tensors, inputs)):
        array = text2images.as_array(source)
        tensor.data.view(array.dtype)[...] = array
        request.set_input_tensor(number, tensor)

    def run() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.view(array.dtype)).view(dtype)

    return run


def by_kernel(inputs: Inputs) -> Callable[[], torch.Tensor]:
    library, output = text2images.load_attention(PRECISIONS[inputs[0].dtype]), torch.empty_like(inputs[0])
    arrays = [text2images.as_array(tensor) for tensor in (*inputs, output)]

    def run() -> torch.Tensor:
        text2images.attend(library, *arrays)
        return output

    return run


VARIANTS = {"kernel": by_kernel, "PyTorch": by_pytorch, "OpenVINO": by_openvino}


def measure(
    size: Size, dtype: torch.dtype, threads: int, rounds: int, limit: Callable[[Size, torch.dtype], float]
) -> list[dict[str, Any]]:
    """A row for each variant."""
    heads, queries, keys, width = size
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(BATCH, length, heads, width, generator=generator) for length in (queries, keys, keys))
    given = tuple(tensor.to(dtype) for tensor in inputs)
    variants = {name: make(given) for name, make in VARIANTS.items()}
    seconds = {
        name: statistics.median(wall for wall, _ in times) for name, times in interleaved(variants, rounds).items()
    }
    head = tuple(tensor[:1, :, :1] for tensor in inputs)
    exact = F.scaled_dot_product_attention(*(tensor.double().transpose(1, 2) for tensor in head)).transpose(1, 2)
    rows = []
    for name, run in variants.items():
        row = {"name": name, "dtype": PRECISIONS[dtype], "heads": heads, "queries": queries, "keys": keys}
        row |= {"width": width, "threads": threads}
        row["seconds"] = seconds[name]
        row["ratio_to_pytorch"] = row["seconds"] / seconds["PyTorch"]
        row["error"] = float(torch.linalg.norm(run()[:1, :, :1] - exact) / torch.linalg.norm(exact))
        if name == "kernel":
            row["source"] = text2images.ATTENTION_KERNELS[PRECISIONS[dtype]].source.name
            row["limit_seconds"] = limit(size, dtype) / threads
            row["limit_share"] = row["limit_seconds"] / row["seconds"]
        rows.append(row)
    return rows


def build_limits(folder: Path) -> Callable[[Size, torch.dtype], float]:
    """A function that gives the least seconds, on one thread, of an attention of these sizes."""
    openvino = Path(text2images.import_openvino().__file__).parent
    compiler = shutil.which(os.environ.get("CXX") or "c++")

    @functools.cache
    def build(precision: str) -> ctypes.CDLL:
        path = folder / f"{precision}.so"
        text2images.build_attention(ROOT / f"benchmarks/attention_limits_{precision}.cpp", compiler, openvino, path)
        return ctypes.CDLL(str(path))

    def limit(size: Size, dtype: torch.dtype) -> float:
        heads, queries, keys, width = size
        parts, block = (ctypes.c_double * 3)(), (ctypes.c_int * 2)()
        if build(PRECISIONS[dtype]).limits(width, block, parts) != 0:
            raise SystemExit(f"no kernel for heads of width {width} on this CPU")
        score, values, exponentials = parts
        beside = dtype == torch.bfloat16 and "amx_bf16" in machine()["flags"]
        one = max(score + values, exponentials) if beside else score + values + exponentials
        return one * BATCH * heads * -(-queries // block[0]) * -(-keys // block[1])

    return limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each variant, after one that warms up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="the JSON to write")
    args = parser.parse_args()
    dtypes = [kernel.dtype for kernel in text2images.ATTENTION_KERNELS.values() if kernel.runs_here()]
    with tempfile.TemporaryDirectory() as folder:
        limit, cases = build_limits(Path(folder)), itertools.product(dtypes, SIZES, args.threads)
        rows = [row for dtype, size, threads in cases for row in measure(size, dtype, threads, args.rounds, limit)]
    for row in rows:
        share = f"{row['limit_share']:.0%} of the limit" if "limit_share" in row else ""
        print(
            f"{row['dtype']:4} {row['heads']:3} heads, {row['queries']} x {row['keys']}, width {row['width']:3}, "
            f"{row['threads']} threads: {row.get('source', row['name']):18} {row['seconds'] * 1e3:8.2f} ms, "
            f"{row['ratio_to_pytorch']:.2f} of PyTorch's, error {row['error']:.1e} {share}"
        )
    if args.output is not None:
        rows = [{key: round(x, 9) if isinstance(x, float) else x for key, x in row.items()} for row in rows]
        write_json({"batch": BATCH, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
