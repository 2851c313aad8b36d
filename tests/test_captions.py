"""Captions and images as people have them: what stands in metadata, datasets and tars, and where."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import create_metadata as cm
import train_text_to_image_qat as trainer
from conftest import SIZE, tiny_pipeline
from data import encoded_image, stream, write_tar
from models import parse

# ---------------------------------------------------------------- one way in


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a hill", ["a hill"]),
        (" a  hill ", [" a  hill "]),
        ("", []),
        (" \n", []),
        (None, []),
        (math.nan, []),
        (b"a h\xc3\xbcgel", ["a h\u00fcgel"]),
        (1984, ["1984"]),
        (0, ["0"]),
        (2.5, ["2.5"]),
        (np.int64(7), ["7"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (["a", None, "", "b"], ["a", "b"]),
        ([], []),
        (("a",), ["a"]),
        ({"caption": "a", "text": "b", "url": "c"}, ["a"]),
        ({"text": ["a", "b"]}, ["a", "b"]),
        ({"caption": None}, []),
        ([{"caption": "a"}, {"text": "b"}], ["a", "b"]),
        ('{"caption": "a", "url": "b"}', ["a"]),  # as tables hold it that were exported as text
        ("['a', \"b's\"]", ["a", "b's"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"url": "a"}', ['{"url": "a"}']),  # no caption in it: a text like any other
        ("['a', 'b", ["['a', 'b"]),
        ("[a photo] of a hill", ["[a photo] of a hill"]),
        (b"h\xfcgel", ["h\u00fcgel"]),
        (b"\x93h\xfcgel\x94", ["\u201ch\u00fcgel\u201d"]),  # as Windows writes it
        ("h\u00fcgel".encode("utf-16"), ["h\u00fcgel"]),
    ],
)
def test_what_may_stand_in_the_place_of_a_caption(value: Any, captions: list[str]) -> None:
    assert trainer.captions_of(value) == captions


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "a caption cannot be a bool"),
        ({"url": "x", "prompt": "y"}, "a caption cannot be a dict with the keys url, prompt"),
        ([0.25, 0.5], "a caption cannot be a list of numbers"),
        ([["a"], [1]], "a caption cannot be a list of numbers"),
        (object(), "a caption cannot be a object"),
        ({f"key {n}": "secret" for n in range(99)}, "key 11 and 87 more"),
    ],
)
def test_what_may_not(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        trainer.captions_of(value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("value", "captions"), [(1, ["lake"]), (-1, []), ([0, 1], ["hill", "lake"]), (None, [])])
def test_class_labels_are_their_names(value: Any, captions: list[str]) -> None:
    assert trainer.captions_of(value, ["hill", "lake"]) == captions


def write_rows(folder: Path, rows: list[Any], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def captions_in(folder: Path, column: str = "text") -> list[Any]:
    return [caption for _, caption in trainer.read_metadata(folder, "file_name", column)]


def test_metadata_may_hold_any_of_it(tmp_path: Path) -> None:
    values = ["a", ["b", "c"], {"caption": "d"}, 5, None, ["e"]]
    write_rows(tmp_path, [{"file_name": f"{n}.jpg", "text": value} for n, value in enumerate(values)])
    assert captions_in(tmp_path) == ["a", ["b", "c"], "d", "5", "", "e"]
    write_rows(tmp_path, [{"file_name": "a.jpg"}, {"file_name": "b.jpg", "caption": "b"}])
    assert captions_in(tmp_path) == ["", "b"]  # the usual other name, and a row without
    write_rows(tmp_path, [{"file_name": "a.jpg", "about": {"prompt": "p", "seed": 1}}])
    assert captions_in(tmp_path, "about.prompt") == ["p"]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"text": True}, "text", "row 2, text: a caption cannot be a bool"),
        ({"text": {"a": "secret"}}, "text", "row 2, text: .*keys a: give --caption_column text.KEY"),
        ({"text": {"a": "secret"}}, "text.b", "row 2, text: no 'b' in a dict with the keys a"),
        ({"words": "secret"}, "title", "no 'title' among file_name, text, words; see --caption_column"),
        ({"file_name": None}, "text", "row 2: no 'file_name' among .*; see --image_column"),
        ({"file_name": 7}, "text", "row 2: file_name is no text; see --image_column"),
        ({"file_name": "a\\..\\..\\b.jpg"}, "text", "row 2: .* lies outside the folder"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: dict, column: str, message: str) -> None:
    write_rows(tmp_path, [{"file_name": "a.jpg", "text": {"b": "x"} if "." in column else "a"}])
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "b.jpg", "text": "b" * 9000} | row) + "\n")
    with pytest.raises(trainer.UsageError, match=message) as refused:
        captions_in(tmp_path, column)
    assert "secret" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\na.jpg,a hill\nb.jpg,a hill, with trees\n", "row 2 has more fields than the header: put capt"),
        ('file_name,text\na.jpg,"a hill"\nb.jpg,"a 5" hill"\n', "after row 1: .*; mend that row"),
        ("file_name;text\na.jpg;a hill;with trees\n", "row 1 has more fields than the header"),
        ("file_name,text\na.jpg,a\n,b\n", "row 2: no 'file_name' among file_name, text; see --image_column"),
        ("a.jpg,a hill\nb.jpg,b\n", "the first line of a csv must name the columns"),
        ("file_name,text\n,\n", "has no rows"),
    ],
)
def test_a_csv_that_would_lose_words_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(trainer.UsageError, match=message):
        captions_in(tmp_path)


def test_a_csv_with_spaces_before_its_quotes_and_absolute_names_inside_the_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "metadata.csv").write_text(f'file_name,text\na.jpg, "a hill, 3"\n{tmp_path}/b.jpg,b\n')
    assert captions_in(tmp_path) == ["a hill, 3", "b"]
    monkeypatch.chdir(tmp_path.parent)
    assert captions_in(Path(tmp_path.name)) == ["a hill, 3", "b"]


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull brings it"),
        ('{"file_name"'.encode("utf-16-le"), "after row 0: Expecting property name"),  # without its mark
        (b'{"file_name": "a.jpg", "text": "h\xfcgel"}', "save it as UTF-8"),
    ],
)
def test_metadata_in_another_encoding_or_not_there_at_all(tmp_path: Path, data: bytes, remedy: str) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(data)
    with pytest.raises(trainer.UsageError, match=remedy):
        captions_in(tmp_path)


def test_another_caption_is_drawn_in_another_epoch_by_seed_and_row(data_dir: Path) -> None:
    rows = [(str(data_dir / "0001.jpg"), ["one", "two", "three"])]
    flags = ["--proportion_empty_prompts", "0", "--resolution", str(SIZE)]
    datasets = [trainer.CaptionedImages(rows, [tiny_pipeline().tokenizer], parse(*flags)) for _ in "ab"]
    words = {tuple(ids[0]): word for word, ids in zip(rows[0][1], datasets[0].tokenize(rows[0][1]).tolist())}
    first, again = ([words[tuple(d[(e, 0)]["input_ids"][0].tolist())] for e in range(60)] for d in datasets)
    assert first == again and min(Counter(first).values()) > 8 and len(set(first)) == 3


def test_several_captions_are_cached_each_for_itself(train, data_dir: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data_dir / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"file_name": str(data_dir / row["file_name"]), "text": [row["text"], "another"]}
    folder = tmp_path / "data"
    folder.mkdir()
    for row in rows:
        name = Path(row["file_name"]).name
        (folder / name).write_bytes(Path(row["file_name"]).read_bytes())
        row["file_name"] = name
    write_rows(folder, rows)
    flags = ["--train_data_dir", str(folder), "--max_train_steps", "12", "--center_crop", "--learning_rate", "1e-3"]
    flags += ["--train_batch_size", "1"]  # pairs are encoded one by one: the bits of another size may differ
    plain = train(tmp_path / "plain", *flags)
    cached = train(tmp_path / "cached", *flags, "--cache_latents")
    assert plain["checksum"] == cached["checksum"]
    (latents,) = (tmp_path / "cached").glob("latents-*")
    names = [path.stem for path in latents.iterdir()]
    assert any(name.endswith("-caption0") for name in names) and any(name.endswith("-caption1") for name in names)


def test_captions_are_described_before_the_training(train, tmp_path: Path, data_dir: Path, caplog) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for index, text in enumerate(["short", "long " * 40, ""]):
        (folder / f"{index}.jpg").write_bytes((data_dir / f"{index:04d}.jpg").read_bytes())
        with open(folder / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"{index}.jpg", "text": text}) + "\n")
    caplog.set_level("INFO")
    train(tmp_path / "out", "--train_data_dir", str(folder), "--num_train_epochs", "2")
    told = "captions of the 3 pairs: 1 missing, 1 cut, being longer than the 77 tokens that the text encoder reads"
    assert told in caplog.text and re.search("[23] images had no caption", caplog.text)
    assert re.search("the first one in training: '(short|long long .*)'", caplog.text)


def test_data_without_any_caption_is_refused_unless_none_is_wanted(tmp_path: Path, data_dir: Path) -> None:
    rows = [(str(data_dir / "0001.jpg"), "")] * 3
    for share, refused in (("0.5", True), ("1", False)):
        args = parse("--resolution", str(SIZE), "--proportion_empty_prompts", share)
        dataset = trainer.CaptionedImages(rows, [tiny_pipeline().tokenizer], args)
        if refused:
            with pytest.raises(trainer.UsageError, match="none of 3 pairs has a caption: see --caption_column"):
                trainer.describe_captions(dataset, args)
        else:
            trainer.describe_captions(dataset, args)


# ---------------------------------------------------------------- tars and datasets


def read_stream(folder: Path, *flags: str) -> Counter:
    """How often each caption comes in the first two passes."""
    dataset, args = stream(folder, *flags)
    keys = [key for batch in dataset.micro_batches(range(8), args) for key in batch]
    return Counter(caption for key in keys for caption in dataset.pair(key[1])[1] or [""])


def tar_of(folder: Path, members: dict[str, Any]) -> Path:
    """Eight pairs; {n} in a text stands for their number."""
    folder.mkdir()
    content: dict[str, bytes] = {}
    for n in range(8):
        content[f"{n:05d}.jpg"] = encoded_image(n, "JPEG")
        for ending, text in members.items():
            text = text if isinstance(text, str) else json.dumps(text)
            content[f"{n:05d}.{ending}"] = text.replace("{n}", str(n)).encode()
    write_tar(folder / "00000.tar", content)
    return folder


@pytest.mark.parametrize(
    ("members", "flags", "expected"),
    [
        ({"json": {"caption": "json {n}", "url": "x"}}, [], "json {n}"),
        ({"json": {"caption": "json {n}"}, "txt": "txt {n}"}, [], "txt {n}"),
        ({"json": {"caption": "json {n}"}, "txt": ""}, [], "json {n}"),  # where there is no text
        ({"json": {"caption": "json {n}"}, "txt": "txt {n}"}, ["--caption_column", "json"], "json {n}"),
        ({"json": {"prompt": "json {n}"}}, ["--caption_column", "json.prompt"], "json {n}"),
        ({"caption": "caption {n}"}, [], "caption {n}"),
        ({"cls": "{n}"}, ["--caption_column", "cls"], "{n}"),
        ({"de.txt": "hügel {n}"}, ["--caption_column", "de.txt"], "hügel {n}"),
    ],
)
def test_tars_with_other_captions(tmp_path: Path, members: dict, flags: list[str], expected: str) -> None:
    found = read_stream(tar_of(tmp_path / "tars", members), *flags)
    assert found == {expected.replace("{n}", str(n)): 2 for n in range(8)}


@pytest.mark.parametrize("spoil", [{"txt": b"h\xfcgel"}, {"json": b"{"}, {"json": b""}, {"json": b"[" * 9}])
def test_a_tar_with_a_bad_member_loses_nothing_else(tmp_path: Path, spoil: dict[str, bytes]) -> None:
    folder, content = tmp_path / "tars", {}
    folder.mkdir()
    for n in range(8):
        members = {"jpg": encoded_image(n, "JPEG"), "txt": f"txt {n}".encode(), "json": b'{"caption": "x"}'}
        members |= spoil if n == 3 else {}
        content |= {f"{n:05d}.{ending}": data for ending, data in members.items()}
    write_tar(folder / "00000.tar", content)
    third = "h\u00fcgel" if "txt" in spoil else "txt 3"
    assert read_stream(folder) == {third if n == 3 else f"txt {n}": 2 for n in range(8)}


def tar_with(path: Path, *members: str) -> Path:
    """Images whose grey level, and texts whose digit, is their number among the names without ending."""
    stems = list(dict.fromkeys(re.sub(r"\.\w+$", "", name) for name in members))
    path.parent.mkdir(exist_ok=True)
    content = {}
    for name in members:
        number = stems.index(re.sub(r"\.\w+$", "", name))
        content[name] = f"{number}".encode() if name.endswith("txt") else encoded_image(number)
    write_tar(path, content)
    return path.parent


@pytest.mark.parametrize(
    "stems",
    [
        ["a.b0", "a.b1", "a.b2"],
        ["v1.0 final", "v1.5 final", "plain"],
        ["cat.v2", "dog.v2", "emu.v2"],
        ["v1.5/a", "v1.5/b", "v2.0/a"],
    ],
)
def test_dots_in_the_names_of_a_tar(tmp_path: Path, stems: list[str]) -> None:
    folder = tar_with(tmp_path / "tars/0.tar", *(f"{stem}.{ending}" for stem in stems for ending in ("png", "txt")))
    dataset, args = stream(folder)
    for key in itertools.chain.from_iterable(dataset.micro_batches(range(3), args)):
        (number,) = dataset.pair(key[1])[1]
        assert round((dataset[key]["pixel_values"].mean().item() + 1) * 127.5) == int(number)
    assert sorted(dataset.first_captions) == [[str(number)] for number in range(len(stems))]


def test_what_follows_the_first_dot_stays_a_column_where_it_is_one(tmp_path: Path) -> None:
    """A mask is no image of its own, and captions in other languages are asked for by their columns."""
    names = [f"{n}.{ending}" for n in range(3) for ending in ("jpg", "mask.png", "txt", "de.txt")]
    assert read_stream(tar_with(tmp_path / "tars/0.tar", *names)).total() == 16
    dataset, _ = stream(tmp_path / "tars")
    assert "mask.png" not in dataset.columns.images and {len(captions) for captions in dataset.first_captions} == {1}


@pytest.mark.parametrize("texts_first", [False, True])
def test_captions_that_are_not_next_to_their_images(tmp_path: Path, texts_first: bool) -> None:
    names = [f"{n}.{ending}" for ending in (("txt", "png") if texts_first else ("png", "txt")) for n in range(9)]
    with pytest.raises(
        trainer.UsageError, match="the first 9 pairs have no txt: .* next to each other.*tar --sort=name"
    ):
        stream(tar_with(tmp_path / "few/0.tar", *names))
    names = [f"{n}.png" for n in range(1001)]
    with pytest.raises(trainer.UsageError, match="first 1000 members of .*: each caption must be next to its image"):
        stream(tar_with(tmp_path / "many/0.tar", *names, "0.txt"))


def test_what_macos_adds_to_a_tar_is_passed_over_and_later_tars_may_have_other_images(tmp_path: Path) -> None:
    more = ["._0.png", "0.png", "._0.txt", "0.txt", "__MACOSX/._0.png", ".DS_Store", "readme.md"]
    folder = tar_with(tmp_path / "tars/0.tar", *more)
    write_tar(folder / "1.tar", {"1.jpg": encoded_image(1, "JPEG"), "1.txt": b"jpg"})
    assert read_stream(folder).keys() == {"jpg", "1"}
    dataset, args = stream(folder)
    assert not any(dataset[key]["replaced"] for batch in dataset.micro_batches(range(8), args) for key in batch)


def test_tars_in_capital_letters_compressed_one_level_down_or_as_pointers(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    pairs = {
        f"{n}.{ending}": data for n in range(2) for ending, data in (("JPG", encoded_image(n, "JPEG")), ("TXT", b"t"))
    }
    write_tar(tmp_path / "upper/0.tar", pairs)
    assert read_stream(tmp_path / "upper") == {"t": 16}
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/0.tar.gz").write_bytes(gzip.compress((tmp_path / "upper/0.tar").read_bytes()))
    assert read_stream(tmp_path / "gz") == {"t": 16}
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs/0.tar").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(trainer.UsageError, match="0.tar is a pointer of Git LFS"):
        read_stream(tmp_path / "lfs")


@pytest.mark.parametrize(
    ("members", "flags", "message"),
    [
        ({"json": {"prompt": "x", "url": "secret"}}, [], "json: .*keys prompt, url: give --caption_column json.KEY"),
        ({"json": {"caption": "x"}}, ["--caption_column", "txt"], "txt is none of jpg, json"),
        ({"html": "x"}, [], "--caption_column text is none of jpg, html"),
        ({"json": {"caption": [1, 2]}}, [], r"/00000.tar, pair \d, json: a caption cannot be a list of n"),
    ],
)
def test_tars_whose_captions_cannot_be_used(tmp_path: Path, members: dict, flags: list[str], message: str) -> None:
    with pytest.raises(trainer.UsageError, match=message) as refused:
        read_stream(tar_of(tmp_path / "tars", members), *flags)
    assert "secret" not in str(refused.value)


def captioned_table(column: Any) -> Any:
    import datasets

    images = [{"bytes": encoded_image(n), "path": None} for n in range(4)]
    features = datasets.Features({"image": datasets.Image(), "text": column[0]})
    return datasets.Dataset.from_dict({"image": images, "text": column[1]}, features=features)


def captions_of_dataset(tmp_path: Path, *flags: str) -> list[list[str]]:
    args = parse("--cache_dir", str(tmp_path / "cache"), "--resolution", str(SIZE), *flags)
    return list(trainer.load_dataset(args, [tiny_pipeline().tokenizer]).all_captions())


def test_class_labels_of_datasets_and_folders(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["hill", "lake"])
    captioned_table((label, [0, 1, -1, None])).to_parquet(tmp_path / "table/train.parquet")
    assert captions_of_dataset(tmp_path, "--dataset_name", str(tmp_path / "table")) == [["hill"], ["lake"], [], []]
    for n in range(4):
        folder = tmp_path / "folders" / ("hill", "lake")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(encoded_image(n))
    flags = ["--dataset_name", str(tmp_path / "folders"), "--caption_column", "label"]
    assert captions_of_dataset(tmp_path, *flags) == [["hill"], ["hill"], ["lake"], ["lake"]]
    streamed = parse(*flags, "--streaming", "--max_train_steps", "1", "--cache_dir", str(tmp_path / "cache"))
    found = trainer.load_dataset(streamed, [tiny_pipeline().tokenizer]).all_captions()
    assert sorted(found) == [["hill"], ["hill"], ["lake"], ["lake"]]


def test_captions_of_a_dataset_that_cannot_be_used_end_the_run(tmp_path: Path) -> None:
    import datasets

    numbers = (datasets.List(datasets.Value("float32")), [[0.5]] * 4)
    captioned_table(numbers).to_parquet(tmp_path / "table/train.parquet")
    with pytest.raises(trainer.UsageError, match="row 0, text: a caption cannot be a list of numbers"):
        captions_of_dataset(tmp_path, "--dataset_name", str(tmp_path / "table"))


@pytest.mark.parametrize("flag", ["--dataset_name", "--train_data_dir"])
@pytest.mark.parametrize("kind", ["save_to_disk", "dict", "parquet", "bytes"])
def test_datasets_on_disk_load(tmp_path: Path, kind: str, flag: str) -> None:
    """Whichever flag names them, whatever holds the images, all at once or as a stream."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    folder, words = tmp_path / "table", ["a", "b", "c", "d"]
    table = captioned_table((datasets.Value("string"), words))
    if kind == "save_to_disk":
        table.save_to_disk(folder)
    elif kind == "dict":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder)
    elif kind == "parquet":
        table.to_parquet(folder / "data/train.parquet")
    else:  # no features: bytes as they are
        folder.mkdir()
        rows = {"jpg": [encoded_image(n) for n in range(4)], "caption": words}
        parquet.write_table(pyarrow.table(rows), folder / "00000.parquet")
    flags = [flag, str(folder), "--cache_dir", str(tmp_path / "cache"), "--proportion_empty_prompts", "0"]
    if flag == "--train_data_dir":
        flags = ["--pretrained_model_name_or_path", "x", *flags]
        args = trainer.parse_args([*flags, "--resolution", str(SIZE)])
    else:
        args = parse(*flags, "--resolution", str(SIZE))
    for more in ({}, {"streaming": True, "max_train_steps": 1}):
        vars(args).update(more)
        dataset = trainer.load_dataset(args, [tiny_pipeline().tokenizer])
        assert sorted(captions[0] for captions in dataset.all_captions()) == words
        keys = [key for batch in dataset.micro_batches(range(1), args) for key in batch]
        levels = {round(((dataset[key]["pixel_values"].mean() + 1) * 127.5).item()) for key in keys}
        assert levels == {0, 1, 2, 3}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    ("splits", "used"),
    [(["test", "validation"], "validation"), (["test"], "test"), (["test", "train_sft"], "train_sft")],
)
def test_a_dataset_without_the_split_train_says_which_one_it_uses(
    tmp_path: Path, caplog, saved: bool, splits: list[str], used: str
) -> None:
    import datasets

    tables = {split: captioned_table((datasets.Value("string"), [split] * 4)) for split in splits}
    if saved:
        datasets.DatasetDict(tables).save_to_disk(tmp_path / "table")
    else:
        text = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
        for split, table in tables.items():
            table.to_parquet(tmp_path / f"table/{split}.parquet")
        (tmp_path / "table/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{text}---\n")
    assert captions_of_dataset(tmp_path, "--dataset_name", str(tmp_path / "table")) == [[used]] * 4
    assert f"has no split train, only {', '.join(splits)}: {used} is used" in caplog.text


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize("streaming", [[], ["--streaming", "--max_train_steps", "1"]])
@pytest.mark.parametrize(
    "name", ["data/train-1.parquet", "train.parquet", "train.csv", "train.jsonl", "state.json", "0.tar"]
)
def test_a_pointer_of_git_lfs_in_a_dataset_is_named(tmp_path: Path, name: str, streaming: list[str]) -> None:
    import datasets

    if name == "data/train-1.parquet":  # beside a sound one
        captioned_table((datasets.Value("string"), ["a"] * 4)).to_parquet(tmp_path / "data/train-0.parquet")
    (tmp_path / name).write_text(LFS)
    with pytest.raises(trainer.UsageError, match=f"^{tmp_path}/{name} is a pointer of Git LFS.*git lfs pull"):
        captions_of_dataset(tmp_path, "--dataset_name", str(tmp_path), *streaming)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gone", "no such file or folder"),
        ("gone.csv", "no such file or folder"),
        ("https://huggingface.co/datasets/owner/name", "no name on the hub, such as owner/name"),
        ("{}/gone", "no such file or folder"),
        ("{}/urls", "--image_column image is none of URL, TEXT; the images of URLs have to be downloaded first"),
        ("{}/configs", "Config name is missing. Give it by --dataset_config_name"),
        ("{}/mixed", "Couldn't cast one of its files to the columns of another"),
    ],
)
def test_a_dataset_that_cannot_be_read_gets_its_remedy_in_one_line(
    tmp_path: Path, capfd, name: str, message: str
) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"URL": ["https://example.org/a.jpg"], "TEXT": ["a"]})
    for file in ("urls/a", "configs/a/a", "configs/b/b", "mixed/a"):
        table.to_parquet(tmp_path / f"{file}.parquet")
    table.add_column("more", [1]).to_parquet(tmp_path / "mixed/b.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in "ab")
    (tmp_path / "configs/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    capfd.readouterr()
    with pytest.raises(trainer.UsageError) as refused:
        captions_of_dataset(tmp_path, "--dataset_name", name.format(tmp_path))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert "Couldn't cast" not in capfd.readouterr().err  # the library's own lines


@pytest.mark.parametrize("streaming", [[], ["--streaming", "--max_train_steps", "1"]])
def test_rows_that_img2dataset_could_not_download_are_left_out_and_counted(
    tmp_path: Path, caplog, streaming: list[str]
) -> None:
    import pyarrow
    from pyarrow import parquet

    there = [True, False, True, False]
    rows = {"jpg": [encoded_image(n) if there[n] else None for n in range(4)], "caption": [f"{n}" for n in range(4)]}
    rows["status"] = ["success" if each else "failed_to_download" for each in there]
    parquet.write_table(pyarrow.table(rows), tmp_path / "00000.parquet")
    args = parse(
        "--dataset_name", str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--resolution", "32", *streaming
    )
    dataset = trainer.load_dataset(args, [tiny_pipeline().tokenizer])
    assert sorted(dataset.all_captions()) == [["0"], ["2"]]
    keys = itertools.chain.from_iterable(dataset.micro_batches(range(4), args))
    assert not any(dataset[key]["replaced"] for key in keys)
    told = "left out 2 rows of file 0 of the stream that have no image" if streaming else "left out 2 of 4 rows, which"
    assert told in caplog.text


def test_a_dataset_script_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table/table.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(trainer.UsageError, match="scripts are no longer supported.*Parquet files of it work"):
        captions_of_dataset(tmp_path, "--dataset_name", str(tmp_path / "table"))


# ---------------------------------------------------------------- metadata that is elsewhere, or otherwise


ROW = {"file_name": "a.jpg", "text": "a"}
COCO = {
    "info": {"year": 2017},
    "images": [{"id": 5, "file_name": "a.jpg", "height": 3}],
    "annotations": [{"id": 1, "image_id": 5, "caption": "a"}],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", json.dumps(ROW)),
        ("metadata.jsonl", "\ufeff" + json.dumps(ROW) + "\n\n"),
        ("metadata.jsonl", json.dumps([ROW])),
        ("metadata.json", json.dumps([ROW], indent=2)),
        ("metadata.json", json.dumps(ROW)),
        ("metadata.jsonl", json.dumps(ROW, indent=2)),
        ("metadata.jsonl", "\n" + json.dumps(ROW) + ",\n"),
        ("metadata.json", json.dumps({"version": 1, "data": [ROW]}, indent=2)),
        ("metadata.json", json.dumps({"a.jpg": {"caption": "a", "tags": "t, u"}}, indent=2)),  # kohya's
        ("metadata.json", json.dumps({"a.jpg": {"tags": "a"}})),
        ("metadata.json", json.dumps({"a.jpg": "a"})),
        ("metadata.json", json.dumps(COCO, indent=2)),
        ("metadata.csv", "file_name,text\na.jpg,a\n"),
        ("metadata.csv", "\ufefffile_name;text\r\na.jpg;a\r\n;\r\n"),
        ("metadata.csv", "sep=;\nfile_name ; text\na.jpg;a\n"),
        ("metadata.tsv", "file_name\ttext\na.jpg\ta\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_metadata_of_other_names_and_forms_is_read(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_text(text if encoding == "utf-8" else text.removeprefix("\ufeff"), encoding=encoding)
    assert trainer.read_metadata(tmp_path, "file_name", "text") == [(str(tmp_path / "a.jpg"), "a")]


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("name", ["captions_train2017.json", "meta_cap.json", "pairs.csv", "captions.txt"])
def test_a_file_may_be_given_in_the_place_of_its_folder(tmp_path: Path, name: str, flag: str) -> None:
    texts = {"pairs.csv": "file_name,text\na.jpg,a\n", "captions.txt": "file_name,text\na.jpg,a\n"}
    texts |= {
        "captions_train2017.json": json.dumps(COCO),
        "meta_cap.json": json.dumps({"a": {"caption": "a"}}, indent=4),
    }
    (tmp_path / name).write_text(texts[name])
    (tmp_path / "a.jpg").write_bytes(encoded_image(1))
    dataset = trainer.load_dataset(parse_data(flag, tmp_path / name), [tiny_pipeline().tokenizer])
    assert dataset.rows == [(str(tmp_path / "a.jpg"), "a")]


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.tar", "train on it by --streaming --max_train_steps N --train_data_dir {}/0.tar"),
        ("pairs.zip", "unpack it, and give the folder that it makes"),
        ("captions.xlsx", "save it as .csv, and give that"),
        ("a.jpg", "give the folder of the images, perhaps {}"),
    ],
)
def test_a_file_that_is_no_metadata_gets_its_remedy(tmp_path: Path, flag: str, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(encoded_image(1))
    with pytest.raises(trainer.UsageError) as refused:
        trainer.load_dataset(parse_data(flag, tmp_path / name), [tiny_pipeline().tokenizer])
    assert message.format(tmp_path) in str(refused.value)


def test_several_captions_of_coco_are_a_list_and_instances_have_none(tmp_path: Path) -> None:
    annotations = [{"image_id": 5, "caption": text} for text in "bc"] + [{"image_id": 9, "caption": "of another"}]
    images = [{"id": 5, "file_name": "b.jpg"}, {"id": 6, "file_name": "c.jpg"}]
    (tmp_path / "metadata.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert captions_in(tmp_path) == [["b", "c"], ""]
    (tmp_path / "metadata.json").write_text(json.dumps({"images": images, "annotations": [{"bbox": [1]}, 7]}))
    with pytest.raises(trainer.UsageError, match="metadata.json, after row 0: .*; mend that row"):
        captions_in(tmp_path)


SPELLINGS = {  # on the disk, in the metadata
    "e\u0301.jpg": "\u00e9.jpg",
    "\u00f1/b.jpg": "n\u0303/b.jpg",
    "c.jpg": "C.JPG",
    "d.v1.jpg": "d.v1",
    "exact.jpg": "exact.jpg",
}


def test_files_are_found_by_the_spelling_of_windows_and_macos(tmp_path: Path, caplog) -> None:
    for name in (*SPELLINGS, "EXACT.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded_image(1))
    write_rows(tmp_path, [{"file_name": name, "text": "a"} for name in SPELLINGS.values()])
    dataset = trainer.load_dataset(parse_folder(tmp_path), [tiny_pipeline().tokenizer])
    assert [path for path, _ in dataset.rows] == [f"{tmp_path}/{name}" for name in SPELLINGS]
    assert f"4 file names of the metadata are spelled otherwise on the disk, such as '{tmp_path}/\u00e9" in caplog.text


def test_the_folder_may_be_the_one_that_the_command_runs_in(tmp_path: Path, monkeypatch) -> None:
    for name in ("a.jpg", "B.jpg"):
        (tmp_path / name).write_bytes(encoded_image(1))
    write_rows(tmp_path, [{"file_name": name, "text": "a"} for name in ("a.jpg", "b.jpg")])
    monkeypatch.chdir(tmp_path)
    dataset = trainer.load_dataset(parse_folder(Path(".")), [tiny_pipeline().tokenizer])
    assert [path for path, _ in dataset.rows] == ["a.jpg", "B.jpg"]


def test_a_name_that_fits_two_files_is_not_guessed_and_missing_ones_are_counted(tmp_path: Path, caplog) -> None:
    for name in ("Two.jpg", "TWO.jpg", *(f"{n}.jpg" for n in range(18))):
        (tmp_path / name).write_bytes(encoded_image(1))
    names = ["two.jpg", "gone.jpg", *(f"{n}.jpg" for n in range(18))]
    write_rows(tmp_path, [{"file_name": name, "text": "a"} for name in names])
    trainer.load_dataset(parse_folder(tmp_path), [tiny_pipeline().tokenizer])
    assert f"2 of 20 images of the metadata are not there, first '{tmp_path}/two.jpg'" in caplog.text
    message = f"2 of 19 images of the metadata are not there, first .*; names are looked for from {tmp_path}: move"
    with pytest.raises(trainer.UsageError, match=message):
        trainer.load_dataset(parse_folder(tmp_path, "--max_train_samples", "19"), [tiny_pipeline().tokenizer])


def test_metadata_in_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"file_name": ["a.jpg", "b.jpg"], "text": [["a", "b"], None]}),
                        tmp_path / "metadata.parquet")  # fmt: skip
    assert captions_in(tmp_path) == [["a", "b"], ""]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(trainer.UsageError, match="metadata.parquet, after row 0: .*; copy it again"):
        captions_in(tmp_path)


def test_somebody_elses_metadata_json_does_not_count_beside_a_jsonl(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW])
    (tmp_path / "metadata.json").write_text('{"dataset": "of somebody"}')
    assert captions_in(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (["train/metadata.jsonl", "train/a.jpg"], ".", "it is in {}/train: give that folder"),
        (["train/metadata.csv", "test/metadata.csv"], ".", "it is in {}/test, {}/train: give that folder"),
        (["metadata.jsonl", "images/a.jpg"], "images", "it is in {}: give that folder"),
        (
            ["metadata.json1", "a.jpg"],
            ".",
            "are the captions in metadata.json1? Then give that file: --train_data_dir {}/m",
        ),
        (
            ["captions.csv", "a.jpg"],
            ".",
            "are the captions in captions.csv? Then give that file: --train_data_dir {}/capt",
        ),
        (["train2017/a.jpg", "annotations/captions.json"], ".", "--train_data_dir {}/annotations/captions.json"),
        (["a.jpg", "a.json", "b.jpg", "b.json"], ".", "run python create_metadata.py"),
        (["train/state.json", "test/state.json"], ".", "it is in {}/test, {}/train: give that folder"),
        (["pairs.zip"], ".", "unpack pairs.zip first"),
        (["0.parquet"], ".", "0.parquet is damaged, or has no column of images: img2dataset downloads those of URLs"),
        (["captions.csv", "a.jpg", "a.txt"], ".", "run python create_metadata.py"),
        (["00000.parquet", "00000/a.jpg", "00000/a.txt", "00000_stats.json"], ".", "run python create_metadata.py"),
        (["a.jpg"], ".", "run python create_metadata.py --image_path"),
        (["00000.tar"], ".", "add it"),
        (["readme.md"], ".", "there are no images: is it the right folder?"),
    ],
)
def test_what_is_there_instead_of_metadata_is_named(tmp_path: Path, files: list[str], given: str, message: str) -> None:
    root = tmp_path / "data"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    with pytest.raises(trainer.UsageError) as refused:
        trainer.load_dataset(parse_folder(root / given), [tiny_pipeline().tokenizer])
    assert message.replace("{}", str(root)) in str(refused.value)


def parse_data(flag: str, path: Path, *flags: str) -> Any:
    return trainer.parse_args(["--pretrained_model_name_or_path", "x", flag, str(path), *flags])


def parse_folder(folder: Path, *flags: str) -> Any:
    return parse_data("--train_data_dir", folder, *flags)


def test_backslashes_of_windows_are_slashes_unless_they_are_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("images/a.jpg", "images\\b.jpg"):
        (tmp_path / name).write_bytes(encoded_image(1))
    write_rows(tmp_path, [{"file_name": name, "text": "x"} for name in ("images\\a.jpg", "images\\b.jpg")])
    paths = [path for path, _ in trainer.read_metadata(tmp_path, "file_name", "text")]
    assert paths == [f"{tmp_path}/images/a.jpg", f"{tmp_path}/images\\b.jpg"]


@pytest.mark.parametrize(("mine", "remedy"), [(True, "run create_metadata.py --image_path"), (False, "mend them")])
def test_the_first_image_that_fails_is_named_with_its_own_error(train, tmp_path: Path, mine: bool, remedy: str) -> None:
    for n in range(2):
        (tmp_path / f"{n}.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(500))
        (tmp_path / f"{n}.txt").write_text("x")
    (tmp_path / "2.jpg").write_bytes(encoded_image(1))
    (tmp_path / "2.txt").write_text("x")
    if mine:
        cm.main(["--image_path", str(tmp_path), "--no_verify"])
    else:
        write_rows(tmp_path, [{"file_name": f"{n}.jpg", "text": "x"} for n in range(2)])
        (tmp_path / "2.jpg").unlink()
    with pytest.raises(trainer.UsageError) as refused:
        train(tmp_path / "out", "--train_data_dir", str(tmp_path), "--max_train_steps", "60")
    message = str(refused.value)
    assert "jpg: a HEIC image, which is read where pillow-heif is installed; " in message and remedy in message
    assert ("--overwrite" in message) is mine


# ---------------------------------------------------------------- images


def png_with_text(size: int) -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("workflow", "x" * size, zip=True)
    Image.new("RGB", (9, 9), (7, 7, 7)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("megabytes", [3, 30])
def test_a_sound_png_with_megabytes_of_text_is_used(megabytes: int) -> None:
    assert trainer.read_image(png_with_text(megabytes << 20)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\x0a" + bytes(99), "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "a JPEG XL image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"", "an empty file"),
        (b"no image", "no image in a format that is read"),
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        ([1, 2], "a list is no image"),
        ("https://example.org/a.jpg", "a URL, not an image"),
        ("/9j/" * 5000, "no path"),
    ],
)
def test_what_is_no_image_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.read_image(data)


def test_an_image_may_come_in_any_form(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded_image(9))
    forms = [str(tmp_path / "a.png"), encoded_image(9), {"bytes": encoded_image(9), "path": "gone.png"}]
    forms += [{"bytes": None, "path": str(tmp_path / "a.png")}, Image.open(tmp_path / "a.png")]
    for form in forms:
        assert trainer.read_image(form).getpixel((0, 0)) == (9, 9, 9)
