"""--streaming: which pair comes when, damaged shards, resumed streams, and what starts fast without it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train_text_to_image_qat as trainer
from conftest import SIZE, tiny_pipeline
from data import pair, stream, write_tar

PER_TAR = 6


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three shards with the grey levels 0..17, in a folder whose name holds glob characters."""
    folder = tmp_path / "pairs [0-9] {a}"
    folder.mkdir()
    for shard in range(3):
        members: dict[str, bytes] = {}
        for level in range(shard * PER_TAR, (shard + 1) * PER_TAR):
            members |= pair(f"{level:09d}", level)
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def levels(samples: list[dict[str, torch.Tensor]]) -> list[int]:
    return [round((sample["pixel_values"].mean().item() + 1) * 127.5) for sample in samples]


def read(tars: Path | str, numbers: range, *flags: str) -> list[int]:
    """Grey levels of the micro-batches that one process asks for, in its order."""
    dataset, args = stream(tars, *flags)
    return levels([dataset[key] for batch in dataset.micro_batches(numbers, args) for key in batch])


def test_a_pass_over_the_stream_holds_every_pair_once_in_an_order_of_the_seed(tars: Path) -> None:
    whole = read(tars, range(18))  # 36 samples: two passes
    assert sorted(whole[:18]) == sorted(whole[18:]) == list(range(18))
    assert whole[:18] != whole[18:] != sorted(whole[18:])
    assert read(tars, range(18)) == whole != read(tars, range(18), "--seed", "1")
    assert read(tars, range(7, 18)) == whole[14:]  # a resumed run


# 2 readers of 3 files: one of them is in the second pass when the other still reads the first
@pytest.mark.parametrize(("processes", "workers", "distinct"), [(1, 0, 18), (1, 3, 18), (2, 3, 18), (2, 0, 12)])
def test_processes_and_workers_share_the_stream(tars: Path, processes: int, workers: int, distinct: int) -> None:
    flags = ["--dataloader_num_workers", str(workers), "--train_batch_size", "3"]
    seen: list[int] = []
    for process in range(processes):  # as many micro-batches as there are in one pass
        seen += read(tars, range(process, 6, processes), *flags)
    assert len(seen) == 18
    assert len(set(seen)) >= distinct


def test_data_workers_read_what_their_keys_say(tars: Path) -> None:
    flags = ["--dataloader_num_workers", "2"]
    dataset, args = stream(tars, *flags)
    loader = DataLoader(dataset, batch_sampler=dataset.micro_batches(range(3, 12), args), num_workers=2)
    batches = [[{"pixel_values": pixels} for pixels in batch["pixel_values"]] for batch in loader]
    assert sum(map(levels, batches), []) == read(tars, range(3, 12), *flags)


def test_training_reads_from_the_beginning_what_calibration_read_before(tars: Path) -> None:
    dataset, args = stream(tars)
    passes = [
        [levels([dataset[key] for key in batch]) for batch in dataset.micro_batches(range(30), args)] for _ in "ab"
    ]
    assert passes[0] == passes[1]


def test_caption_goes_with_its_image(tars: Path) -> None:
    dataset, args = stream(tars)
    for batch in dataset.micro_batches(range(4), args):
        for key in batch:
            sample = dataset[key]
            assert torch.equal(sample["input_ids"], dataset.tokenize([f"grey {levels([sample])[0]}"])[0])


def test_pattern_of_img2dataset_names_the_shards(tars: Path) -> None:
    assert set(read(f"{tars}/{{00001..00002}}.tar", range(6))) == set(range(PER_TAR, 3 * PER_TAR))
    assert set(read(tars / "00001.tar", range(3))) == set(range(PER_TAR, 2 * PER_TAR))


def test_pattern_with_a_star_names_the_shards(tmp_path: Path) -> None:
    for level in (1, 2):
        write_tar(tmp_path / f"{level}.tar", pair("a", level))
    assert set(read(tmp_path / "*.tar", range(4))) == {1, 2}


def test_damage_costs_the_damaged_part_only(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tars / "00000.tar"
    first.write_bytes(first.read_bytes()[:3000])
    (tars / "00003.tar").write_bytes(b"no tar" * 1000)
    members = {**pair("a", 101), "b.png": b"no image", "b.txt": b"words", "c.txt": b"alone", **pair("d", 103)}
    write_tar(tars / "00004.tar", members)
    dataset, args = stream(tars)
    samples = [dataset[key] for batch in dataset.micro_batches(range(8), args) for key in batch]
    assert set(levels(samples)) == {*range(PER_TAR, 3 * PER_TAR), 101, 103}
    assert {sample["failure"].split(":")[0] for sample in samples} == {"", "b.png"}
    assert f"left out 1 rows of {tars}/00004.tar that have no image" in caplog.text  # c.txt
    assert {record.message.split(":")[0] for record in caplog.records if record.levelname == "ERROR"} == {
        f"left out the rest of {tars}/00000.tar",
        f"left out the rest of {tars}/00003.tar",
    }


def test_a_cut_tar_gives_the_pairs_before_the_cut(tmp_path: Path) -> None:
    members = {name: data for level in range(1, 9) for name, data in pair(f"{level:09d}", level).items()}
    write_tar(tmp_path / "0.tar", members)
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: data.index(b"000000005.txt") + 600])  # in the middle of the fifth pair
    assert set(read(tmp_path, range(8))) == {1, 2, 3, 4}


@pytest.mark.parametrize("workers", ["0", "3"])
def test_files_without_a_pair_do_not_end_the_stream(tmp_path: Path, workers: str) -> None:
    """However often they come before the one that has some."""
    write_tar(tmp_path / "good.tar", pair("a", 7))
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(b"no tar" * number)
    assert read(tmp_path, range(20), "--dataloader_num_workers", workers) == [7] * 40


def test_stream_of_nothing_but_damage_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(trainer.UsageError, match="no file of the stream holds a pair"):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("{}", ["--caption_column", "words"], "--caption_column words is none of png, txt, json"),
        ("{}", ["--image_column", "gif"], "--image_column gif is none of png, txt, json"),
        ("{}/{{00001..00009}}.tar", [], "no .*/00003.tar"),
        ("{}/nothing.tar", [], "no .*/nothing.tar"),
        ("{}/*.tgz", [], r"no .*/\*.tgz"),
        (__file__, [], "--streaming reads .tar, .tar.gz, .tgz, which .*test_streaming.py is not"),
        ("{}/..", [], "the tars are in .*pairs .*: give that"),
    ],
)
def test_streams_that_cannot_work_are_refused(tars: Path, source: str, flags: list[str], message: str) -> None:
    with pytest.raises(trainer.UsageError, match=message):
        stream(source.format(tars).replace("{{", "{"), *flags)


@pytest.mark.parametrize("flags", [[], ["--max_train_steps", "1", "--max_train_samples", "5"]])
def test_stream_has_no_length(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        trainer.parse_args(
            ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path), "--streaming", *flags]
        )
    assert "give --max_train_steps, no --max_train_samples" in capsys.readouterr().err


def test_dataset_of_the_library_is_streamed(tmp_path: Path) -> None:
    import datasets

    for shard in range(2):
        images = [Image.new("RGB", (SIZE, SIZE), (10 * (3 * shard + i),) * 3) for i in range(3)]
        table = datasets.Dataset.from_dict({"image": images, "text": [[word, word.upper()] for word in "abc"]})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"train-{shard}.parquet")
    command = ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path), "--streaming"]
    command += ["--max_train_steps", "9", "--resolution", str(SIZE), "--train_batch_size", "3"]
    args = trainer.parse_args([*command, "--cache_dir", str(tmp_path / "cache"), "--proportion_empty_prompts", "0"])
    dataset = trainer.load_dataset(args, [tiny_pipeline().tokenizer])
    samples = [dataset[key] for batch in dataset.micro_batches(range(2), args) for key in batch]
    assert sorted(levels(samples)) == [0, 10, 20, 30, 40, 50]
    for level, sample in zip(levels(samples), samples):
        word = "abc"[level // 10 % 3]
        assert sample["input_ids"].tolist() in dataset.tokenize([word, word.upper()]).tolist()


def test_resumed_stream_ends_with_the_same_bits(train, tars: Path, tmp_path: Path) -> None:
    flags = ["--train_data_dir", str(tars), "--streaming", "--max_train_steps", "4", "--checkpointing_steps", "3"]
    flags += ["--gradient_accumulation_steps", "2", "--random_flip", "--dataloader_num_workers", "2", "--use_ema"]
    whole = train(tmp_path / "whole", *flags, "--learning_rate", "3e-2")
    resume = [*flags, "--learning_rate", "3e-2", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")]
    resumed = train(tmp_path / "resumed", *resume)
    assert whole["checksum"] == resumed["checksum"]
    assert whole["training"]["losses"] == resumed["training"]["losses"]
    with pytest.raises(trainer.UsageError, match=r"dataloader_num_workers x processes \(then 2, now 3\)"):
        train(tmp_path / "other", *resume, "--dataloader_num_workers", "3")


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_calibration_sees_every_batch_that_it_asks_for(train, tars: Path, tmp_path: Path, monkeypatch, workers) -> None:
    numbers, noise = [], trainer.add_noise

    def noted(pipeline, batch, part, power, generator, accelerator) -> trainer.NoisedBatch:
        numbers.append((power, generator.initial_seed(), len(batch["pixel_values"])))
        return noise(pipeline, batch, part, power, generator, accelerator)

    monkeypatch.setattr(trainer, "add_noise", noted)
    flags = ["--train_data_dir", str(tars), "--streaming", "--max_train_steps", "0", "--calibration_steps", "5"]
    saved = train(tmp_path, *flags, "--dataloader_num_workers", workers)
    seeds = [trainer.generator_for(0, "calibration", number).initial_seed() for number in range(5)]
    assert numbers == [(1, seed, 2) for seed in seeds]
    scales = [tensor for name, tensor in saved["state_dict"].items() if name.endswith("input_scale")]
    assert min(scales).item() > 1e-5  # 1e-8 / 255 where nothing was seen


def test_metadata_of_100000_images_is_read_in_seconds(tmp_path: Path) -> None:
    """And the first batch is known; the images are not looked at, as there are none."""
    with open(tmp_path / "metadata.jsonl", "w", encoding="utf-8") as file:
        for row in range(100_000):
            name = f"{row // 10000:05d}/{row:09d}.jpg"
            file.write(json.dumps({"file_name": name, "text": f"a caption of usual length, number {row}"}) + "\n")
    began = time.process_time()
    rows = trainer.read_metadata(tmp_path, "file_name", "text")
    keys = next(iter(trainer.ResumableBatchSampler(len(rows), 4, 0, range(10))))
    seconds = time.process_time() - began
    assert len(rows) == 100_000 and len(keys) == 4
    assert seconds < 5  # 0.6 s on an idle core
