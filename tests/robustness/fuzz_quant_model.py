"""Throw damaged and hostile variants of a quant_model.pt at its loader, for a given time.

    python tests/robustness/fuzz_quant_model.py --seconds 600 MODEL_DIR QUANT_MODEL

Each variant must be refused by a UsageError of one line, or hold what the original holds (or, where its author
could recompute the checksum, run). A crash, a hang of 20 s or 1 GiB more memory ends the run with its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import text2images

EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]
SETTINGS = [None, True, -1, 0, 3, 2**40, 1e308, float("nan"), "", "x" * 5000, "a\n\x1b[31m", [], [[]], (1, 2), {}, b"x"]


def write_archive(path: Path, pickled: bytes, records: dict[str, bytes]) -> Path:
    """An archive as torch.save writes it, around a pickle of one's own."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled, len(pickled))
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def read_archive(path: Path) -> tuple[bytes, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    return records.pop("data.pkl"), {name: data for name, data in records.items() if name.startswith("data/")}


def with_checksum(payload: dict[str, Any]) -> dict[str, Any]:
    """What a hostile author would do; a state dict that has no checksum, or takes gigabytes for one, keeps its own."""
    try:
        state_dict = payload["state_dict"]
        assert sum(tensor.nbytes for tensor in state_dict.values()) < 2**28
        return {**payload, "checksum": text2images.checksum(state_dict)}
    except Exception:
        return payload


# ---------------------------------------------------------------- mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bits, fields, blocks or lengths of the data changed; more often than not at one of its ends."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        spread = rng.choice([len(changed), len(changed), 200, 4000])
        at = rng.randrange(min(len(changed), spread)) if changed else 0
        at = len(changed) - 1 - at if rng.random() < 0.6 and changed else at
        kind = rng.randrange(6)
        if not changed or kind == 0:
            return bytes(changed[: rng.randrange(len(changed) + 1)])
        if kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            field = (rng.choice(EDGES)).to_bytes(8, "little")[: rng.choice([1, 2, 4, 8])]
            changed[at : at + len(field)] = field
        elif kind == 3:
            del changed[at : at + rng.choice([1, 4, 64, 5000])]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 64, 5000]))
        else:
            source = rng.randrange(len(changed))
            block = changed[source : source + rng.choice([1, 8, 100, 3000])]
            changed[at : at + len(block)] = block
    return bytes(changed)


def hostile_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    flat = tensor.clone().reshape(-1)
    if flat.numel() and rng.random() < 0.5:
        values = [0, -1, 300, 127] + [float("nan"), float("inf"), 1e-45, 3e38] * tensor.is_floating_point()
        value = rng.choice(values)
        flat[rng.randrange(flat.numel())] = value if tensor.is_floating_point() else max(-128, min(127, value))
        return flat.view(tensor.shape)
    one = torch.zeros(1)
    return rng.choice(
        [
            lambda: tensor.to(rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32])),
            lambda: tensor.to(rng.choice([torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8])),
            lambda: tensor.expand(3, *tensor.shape),
            lambda: one.expand(10**9),
            lambda: one.expand(2**40),
            lambda: tensor.reshape(-1)[: max(1, tensor.numel() // 2)],
            lambda: tensor[..., None],
            lambda: tensor.mT if tensor.dim() > 1 else tensor.reshape(-1)[:0],
            lambda: torch.nn.Parameter(tensor.float()),
            lambda: torch.empty(2**40, device="meta"),
            lambda: tensor.float().to_sparse(),
            lambda: rng.choice(SETTINGS),
        ]
    )()


def mutate_payload(payload: dict[str, Any], rng: random.Random) -> Any:
    """A tensor, a name, a setting of the UNet or a field changed; the checksum is made right more often than not."""
    payload = {**payload, "state_dict": {**payload["state_dict"]}, "unet_config": {**payload["unet_config"]}}
    for _ in range(rng.choice([1, 1, 1, 3])):
        part = rng.choice([*[payload.get("state_dict")] * 2, payload.get("unet_config"), payload])
        if type(part) is not dict or not part:
            continue
        key = rng.choice(list(part))
        value = part[key]
        kind = rng.randrange(5)
        if kind == 0:
            del part[key]
        elif kind == 1:
            names = [f"{key}.weight_scale", f"{key}_scale", "", ".weight_scale", "mid_block.input_scale", "a\nb", 7]
            part[rng.choice(names)] = part.pop(key) if rng.random() < 0.5 else value
        elif isinstance(value, torch.Tensor) and rng.random() < 0.9:
            part[key] = hostile_tensor(value, rng)
        else:
            part[key] = rng.choice([*SETTINGS, [value], (value, value), value])
    return with_checksum(payload) if rng.random() < 0.8 else payload


# ---------------------------------------------------------------- one variant


class Target:
    """The loader, up to one evaluation of the UNet that it builds."""

    def __init__(self, model_dir: Path, quant_model: Path) -> None:
        self.base_config = json.loads((model_dir / "unet" / "config.json").read_text())
        self.data = quant_model.read_bytes()
        self.pickled, self.records = read_archive(quant_model)
        self.payload = torch.load(quant_model, weights_only=True)
        self.inputs = (torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 32))

    def write_variant(self, path: Path, number: int) -> str:
        rng = random.Random(number)
        kind = rng.choice(["bytes", "pickle", "values", "values"])
        path.unlink(missing_ok=True)
        if kind == "bytes":
            path.write_bytes(mutate_bytes(self.data, rng))
        elif kind == "pickle":
            write_archive(path, mutate_bytes(self.pickled, rng), self.records)
        else:
            torch.save(mutate_payload(self.payload, rng), path)
        return kind

    def outcome(self, path: Path, kind: str) -> str:
        try:
            payload = text2images.read_quant_model(path)
            text2images.check_architecture(payload, self.base_config, "base")
            state_dict = dict(payload["state_dict"])
            unet = text2images.build_int8_unet(payload, torch.float32, torch.device("cpu"))
        except text2images.UsageError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 800, message
            return re.sub(r"(\w+\.)+\w+|'.*'|/\S+|\d+", "_", message)[:38]
        original = self.payload["state_dict"]
        same = state_dict.keys() == original.keys() and all(
            torch.equal(tensor, original[name]) for name, tensor in state_dict.items()
        )
        assert same or kind == "values", "damage went unnoticed"
        with torch.no_grad():
            unet(*self.inputs)
        return "accepted, the same" if same else "accepted, with a new checksum"


def fuzz(target: Target, seconds: float, executions: int | None, first: int) -> Counter[str]:
    """Ends after so many seconds, or after so many executions where they are given."""
    outcomes: Counter[str] = Counter()
    deadline, number = time.monotonic() + seconds, first
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "variant.pt")
        target.outcome(Path(path.write_bytes(target.data) and path), "bytes")  # warm-up: memory that stays
        while number < first + executions if executions else time.monotonic() < deadline:
            kind = target.write_variant(path, number)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            faulthandler.dump_traceback_later(20, exit=True)
            try:
                outcomes[target.outcome(path, kind)] += 1
            except BaseException:
                print(f"variant {number} ({kind})", file=sys.stderr)
                raise
            faulthandler.cancel_dump_traceback_later()
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert growth < 2**20, f"variant {number} ({kind}): {growth} KiB"
            number += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, help="the base model")
    parser.add_argument("quant_model", type=Path, help="a good quant_model.pt of it")
    parser.add_argument("--seconds", type=float, default=600, help="how long")
    parser.add_argument("--executions", type=int, help="end after so many variants instead")
    parser.add_argument("--first", type=int, default=0, help="number of the first variant: each is a function of it")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # a variant that gets through shall not take it all
    faulthandler.enable()
    torch.set_num_threads(1)
    outcomes = fuzz(Target(args.model_dir, args.quant_model), args.seconds, args.executions, args.first)
    print(json.dumps({"executions": outcomes.total(), **dict(outcomes.most_common())}, indent=1))


if __name__ == "__main__":
    main()
