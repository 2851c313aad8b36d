#!/usr/bin/env python
"""Step time and resident size of --streaming, at the start and at the end of many samples.

Writes tars as img2dataset does, of small images, and measures on them: the data alone (decoding,
cropping and tokenizing, one data worker), what a resumed run reads over, training of the bundled
model; and the start on an image folder of 100,000 rows. Prints a table and writes it as JSON.

    python benchmarks/streaming.py --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from output import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_text_to_image_qat as trainer  # noqa: E402

MODEL = ROOT / "demo/tiny-stable-diffusion"
BATCH = 50


def write_tars(folder: Path, samples: int, per_tar: int) -> None:
    """Tars in the layout of img2dataset; 500 different images take turns."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(500):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 40)).save(file, "JPEG")
        images.append(file.getvalue())
    for shard in range(-(-samples // per_tar)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * per_tar, min(samples, (shard + 1) * per_tar)):
                caption = f"a small image with the number {number}"
                members = {
                    "jpg": images[number % len(images)],
                    "txt": caption.encode(),
                    "json": json.dumps({"caption": caption, "width": 48, "height": 40}).encode(),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def usage() -> tuple[float, float]:
    """Resident MB of this process, with what its data workers do not share with it; CPU seconds of all of them."""
    main = psutil.Process()
    workers = main.children(recursive=True)
    own = sum(worker.memory_full_info().uss for worker in workers)
    times = [process.cpu_times() for process in (main, *workers)]
    return (main.memory_info().rss + own) / 1e6, sum(time.user + time.system for time in times)


def flags(folder: Path) -> list[str]:
    command = ["--pretrained_model_name_or_path", str(MODEL), "--train_data_dir", str(folder), "--streaming"]
    return [*command, "--resolution", "32", "--random_flip", "--dataloader_num_workers", "1"]


def row(what: str, batch: int, steps: int, marks: list[tuple[int, float, float, float]]) -> dict:
    """Times and sizes of the first and the last tenth of the steps, after 20 that warm up.

    A mark is (step, seconds, MB, CPU seconds). CPU time tells more than time where others use the machine.
    """
    marks = [mark for mark in marks if mark[0] >= 20]
    tenth = max(2, len(marks) // 10)
    result = {"what": what, "samples": batch * steps, "batch": batch}
    for name, part in {"start": marks[:tenth], "end": marks[-tenth:]}.items():
        (first, began, _, cpu_began), (last, ended, _, cpu_ended) = part[0], part[-1]
        result[f"ms_per_step_{name}"] = round(1000 * (ended - began) / (last - first), 1)
        result[f"cpu_ms_per_step_{name}"] = round(1000 * (cpu_ended - cpu_began) / (last - first), 1)
        result[f"resident_mb_{name}"] = round(float(np.median([size for _, _, size, _ in part])), 1)
    return result


def read_all(folder: Path, samples: int) -> dict:
    args = trainer.parse_args([*flags(folder), "--max_train_steps", "1", "--train_batch_size", str(BATCH)])
    tokenizers = [CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer")]
    dataset = trainer.load_dataset(args, tokenizers)
    keys = dataset.micro_batches(range(samples // BATCH), args)
    marks = []
    for number, batch in enumerate(DataLoader(dataset, batch_sampler=keys, num_workers=1)):
        assert batch["pixel_values"].shape == (BATCH, 3, 32, 32) and not batch["replaced"].any()
        if number % 20 == 0:  # asking takes longer than a step
            marks.append((number, time.perf_counter(), *usage()))
    return row("data alone", BATCH, samples // BATCH, marks)


def read_over(folder: Path, samples: int) -> dict:
    """What a resumed run waits for: the first micro-batch near the end of the stream."""
    args = trainer.parse_args([*flags(folder), "--max_train_steps", "1", "--train_batch_size", str(BATCH)])
    tokenizers = [CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer")]
    dataset = trainer.load_dataset(args, tokenizers)
    number = samples // BATCH - 1
    began, cpu_began = time.perf_counter(), time.process_time()
    (keys,) = dataset.micro_batches(range(number, number + 1), args)
    for key in keys:
        dataset[key]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "what": "resuming at the last sample",
        "samples": samples,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
    }


def train(folder: Path, steps: int, output_dir: Path) -> dict:
    marks: list[tuple[int, float, float, float]] = []
    hook = register_optimizer_step_post_hook(lambda *_: marks.append((len(marks), time.perf_counter(), *usage())))
    command = [*flags(folder), "--max_train_steps", str(steps), "--train_batch_size", "4", "--output_dir"]
    command += [str(output_dir), "--use_ema", "--use_cpu", "--report_to", "none", "--calibration_steps", "20"]
    trainer.main([*command, "--checkpointing_steps", "1000000"])
    hook.remove()
    return row("training the bundled model", 4, steps, marks)


def start_on_folder(folder: Path, rows: int) -> dict:
    """Until the first keys are known: no image is looked at before its turn."""
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            line = {"file_name": f"{number // 10000:05d}/{number:09d}.jpg", "text": f"the image with number {number}"}
            file.write(json.dumps(line) + "\n")
    began = time.perf_counter()
    pairs = trainer.read_metadata(folder, "file_name", "text")
    next(iter(trainer.ResumableBatchSampler(len(pairs), 4, 0, range(1))))
    return {"what": "start on an image folder", "samples": rows, "seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="pairs in the tars")
    parser.add_argument("--per_tar", type=int, default=10_000, help="pairs in a tar, as img2dataset writes them")
    parser.add_argument("--train_steps", type=int, default=200, help="training steps at batch 4")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tars, images = Path(scratch, "tars"), Path(scratch, "images")
        tars.mkdir()
        images.mkdir()
        write_tars(tars, args.samples, args.per_tar)
        # training first, in a process that nothing else has grown
        rows = [train(tars, args.train_steps, Path(scratch, "out")), start_on_folder(images, 100_000)]
        rows += [read_all(tars, args.samples), read_over(tars, args.samples)]
    columns = list(dict.fromkeys(key for each in rows for key in each))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for each in rows:
        print("| " + " | ".join(str(each.get(key, "-")) for key in columns) + " |")
    write_json({"rows": rows}, args.output)


if __name__ == "__main__":
    main()
