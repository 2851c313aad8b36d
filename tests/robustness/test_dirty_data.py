"""Dirty data, from create_metadata.py to the last training step: nothing of it ends a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import create_metadata as cm
import train_text_to_image_qat as trainer
from conftest import SIZE, batch_of, tiny_pipeline, training_in_process
from data import collect
from dirty_corpus import GOOD, JPEG, Case, cases, pair_writer, put, write_all
from models import parse

Run = Callable[..., dict]


@pytest.mark.parametrize("case", cases(), ids=lambda case: ascii(case.name))
def test_each_case_is_used_or_left_out_for_its_own_reason(tmp_path: Path, case: Case) -> None:
    pair_writer("a good one.png", GOOD, "good")(tmp_path)
    case.write(tmp_path)
    rows, left_out, remarks = collect(tmp_path)
    assert dict(rows) == {"a good one.png": "good", **case.rows}
    assert (left_out, remarks) == (case.left_out, case.remarks)


@pytest.fixture(scope="module")
def dirty_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases together, and their metadata."""
    folder = tmp_path_factory.mktemp("dirty [1]")
    write_all(folder)
    cm.main(["--image_path", str(folder), "--num_workers", "1"])
    return folder


def test_all_together_are_reported_by_reason(dirty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cm.main(["--image_path", str(dirty_dir), "--num_workers", "2"])
    lines = [line.strip() for record in caplog.records for line in record.getMessage().splitlines()]
    expected, rows = Counter(), {}
    for prefix, case in write_all(dirty_dir.parent / "again"):
        expected.update(case.left_out)
        expected.update(case.remarks)
        rows |= {prefix + name: caption for name, caption in case.rows.items()}
    for reason, count in expected.items():
        assert any(line.startswith(f"{count}  {reason}: ") for line in lines), (reason, count, lines)
    metadata = (dirty_dir / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["file_name"]: row["text"] for row in map(json.loads, metadata)} == rows


def dataset_of(folder: Path, *flags: str) -> trainer.CaptionedImages:
    rows = trainer.read_metadata(folder, "file_name", "text")
    plain = ["--resolution", str(SIZE), "--proportion_empty_prompts", "0"]
    return trainer.CaptionedImages(rows, [tiny_pipeline().tokenizer], parse(*plain, *flags))


def test_training_sees_every_image_in_its_colors_and_every_caption(dirty_dir: Path, tmp_path: Path) -> None:
    dataset = dataset_of(dirty_dir)
    index = {Path(path).relative_to(dirty_dir).as_posix(): row for row, (path, _) in enumerate(dataset.rows)}
    checked = 0
    for prefix, case in write_all(tmp_path):
        for name, caption in case.rows.items():
            sample = dataset[(0, index[prefix + name])]
            assert sample["replaced"].item() == 0, name
            assert sample["pixel_values"].shape == (3, SIZE, SIZE) and sample["pixel_values"].abs().max() <= 1
            assert torch.equal(sample["input_ids"], dataset.tokenize([caption])[0])
            if case.color is not None:
                corner = (sample["pixel_values"][:, 0, 0] + 1) * 127.5
                assert corner.tolist() == pytest.approx(case.color, abs=6), name
                checked += 1
    assert checked >= 18


def test_training_on_all_of_it(model_dir: Path, dirty_dir: Path, tmp_path: Path, caplog) -> None:
    with training_in_process(model_dir, dirty_dir) as run:
        saved = run(tmp_path, "--num_train_epochs", "1", "--train_batch_size", "8")
    assert saved["training"]["steps"] >= 6
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())
    assert "unreadable" not in caplog.text


def spoil(folder: Path, good: int, bad: int) -> None:
    """Metadata that was written without a look at the images, `bad` of which cannot be read."""
    for number in range(good):
        pair_writer(f"good {number}.png", GOOD, "good")(folder)
    spoilt = [JPEG[: len(JPEG) // 2], b"no image", b"", None]
    for number in range(bad):
        data = spoilt[number % 4]
        pair_writer(f"spoilt {number}.jpg", JPEG[:-9] if data is None else data, "spoilt")(folder)
    cm.main(["--image_path", str(folder), "--no_verify"])
    (folder / "spoilt 3.jpg").unlink()  # listed, and gone


def test_a_few_unreadable_images_are_replaced_and_counted(model_dir: Path, tmp_path: Path, caplog) -> None:
    spoil(tmp_path / "data", good=46, bad=4)
    caplog.set_level("INFO")
    flags = ["--num_train_epochs", "1", "--train_batch_size", "5", "--dataloader_num_workers", "1"]
    with training_in_process(model_dir, tmp_path / "data") as run:
        saved = run(tmp_path / "out", *flags)
    assert saved["training"]["steps"] == 10
    assert "4 unreadable images replaced" in caplog.text  # each of them once an epoch


@pytest.mark.parametrize("workers", ["0", "1"])
def test_many_unreadable_images_end_the_run_with_one_line(model_dir: Path, tmp_path: Path, workers: str) -> None:
    spoil(tmp_path / "data", good=0 if workers == "1" else 30, bad=30)
    flags = ["--max_train_steps", "30", "--train_batch_size", "8", "--dataloader_num_workers", workers]
    with training_in_process(model_dir, tmp_path / "data") as run, pytest.raises(trainer.UsageError) as ended:
        run(tmp_path / "out", *flags)
    message = str(ended.value)
    assert "images could not be read, first " in message and "\n" not in message
    assert f"run create_metadata.py --image_path {tmp_path / 'data'} --overwrite" in message
    assert re.search(
        r"spoilt \d+.jpg: (image file is truncated|no image in a format|an empty file|No such file)", message
    )
    assert not (tmp_path / "out" / "quant_model.pt").exists()


def test_a_tenth_of_bad_images_is_not_stopped_by_bad_luck() -> None:
    generator, losses, stopped = torch.Generator().manual_seed(0), {"loss": torch.tensor(1.0)}, Counter()
    for share in (0.09, 0.2):
        for _ in range(60):
            watch = trainer.RunMonitor()
            try:
                for _ in range(100):
                    watch.update(losses, batch_of((torch.rand(8, generator=generator) < share).long()))
            except trainer.UsageError:
                stopped[share] += 1
    assert stopped[0.09] <= 1 and stopped[0.2] >= 58


def test_unreadable_images_of_a_dataset_are_replaced_too(model_dir: Path, tmp_path: Path) -> None:
    """Rows without any image do not count."""
    import datasets

    images = [{"bytes": data, "path": None} for data in [GOOD] * 10 + [JPEG[:300]]] + [None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "text": ["a"] * 9 + [None, "", "b"]}, features=features)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    args = parse("--dataset_name", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"), "--resolution", "32")
    dataset = trainer.load_dataset(args, [tiny_pipeline().tokenizer])
    assert [dataset.pair(row)[1] for row in range(8, len(dataset))] == [["a"], [], []]
    samples = [dataset[(0, row)] for row in range(11)]
    assert [int(sample["replaced"] > 0) for sample in samples] == [0] * 10 + [1]
    red = torch.tensor([1.0, -1.0, -1.0])
    assert all(torch.allclose(sample["pixel_values"][:, 5, 5], red) for sample in samples)


def test_a_symlink_or_a_new_file_after_the_metadata_does_not_matter(tmp_path: Path) -> None:
    """The trainer reads what metadata.jsonl lists and nothing else: no second metadata file, no stray image."""
    pair_writer("a.png", GOOD, "c")(tmp_path)
    cm.main(["--image_path", str(tmp_path)])
    put(tmp_path / "sub/metadata.jsonl", '{"file_name": "b.png", "text": "b"}\n')
    Image.new("RGB", (9, 9)).save(tmp_path / "stray.png")
    (tmp_path / "loop").symlink_to(".")
    assert [caption for _, caption in trainer.read_metadata(tmp_path, "file_name", "text")] == ["c"]
