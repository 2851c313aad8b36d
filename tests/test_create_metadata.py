"""create_metadata.py: what it writes, what it leaves out and why, and that it never harms a file."""

import errno
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

import create_metadata as cm
from data import collect
from dirty_corpus import burdened, encoded, ftyp, huge_png, png_with

SCRIPT = Path(cm.__file__)


def gradient(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    image = Image.radial_gradient("L").resize(size)
    return image.convert(mode) if mode != "I;16" else image.convert("I").point(lambda v: v * 200).convert("I;16")


JPEG = encoded(gradient())


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_pair(folder: Path, name: str, caption: bytes | str = "a caption", image: bytes = JPEG) -> None:
    put(folder, name, image)
    put(folder, os.path.splitext(name)[0] + ".txt", caption)


def written(folder: Path, name: str = "metadata.jsonl") -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == ["file_name", "text"] for row in rows)
    return [(row["file_name"], row["text"]) for row in rows]


def error_line(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run main, which must end with exit code 2 and exactly one line."""
    with pytest.raises(SystemExit) as end:
        cm.main(list(argv))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("create_metadata.py: error: "), err
    return err


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------- names and captions

NASTY_NAMES = [
    "00000/000000001.jpg",
    "00001/000010000.PNG",
    'a "quoted" one.jpg',
    "brackets[1](2){3}.webp",
    "dots.in.the.name.v1.0.jpeg",
    "it's.JPG",
    "line\nbreak.jpg",
    "separator\u2028inside.jpg",
    "sub folder.v2/[deep]/x.jpg",
    "картина 猫 é.jpg",
    "🐈.jpg",
]


def test_every_name_gets_its_row(tmp_path):
    for name in NASTY_NAMES:
        put_pair(tmp_path, name, f"this is {name!r}", encoded(gradient(), "PNG"))
    cm.main(["--image_path", str(tmp_path)])
    assert written(tmp_path) == [(name, f"this is {name!r}") for name in sorted(NASTY_NAMES)]


def test_the_bytes_of_a_row(tmp_path):
    put_pair(tmp_path, "b/é.jpg", 'a "cat" 猫')
    put_pair(tmp_path, "a.jpg", "1984")
    cm.main(["-p", str(tmp_path)])
    expected = '{"file_name": "a.jpg", "text": "1984"}\n{"file_name": "b/é.jpg", "text": "a \\"cat\\" 猫"}\n'
    assert (tmp_path / "metadata.jsonl").read_bytes() == expected.encode()


def test_datasets_reads_every_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "images"
    for name in NASTY_NAMES:
        put_pair(folder, name, "null", encoded(gradient(size=(8, 8)), "PNG"))
    cm.main(["-p", str(folder)])
    files = {"train": [str(folder / "metadata.jsonl"), *(str(folder / name) for name in NASTY_NAMES[:2])]}
    rows = datasets.load_dataset("imagefolder", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert rows[:]["text"] == ["null"] * len(NASTY_NAMES)
    assert [image.size for image in rows[:]["image"]] == [(8, 8)] * len(NASTY_NAMES)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("plain", "plain"),
        ("  trimmed \t\n", "trimmed"),
        ("one, and empty lines \r\n\n \n", "one, and empty lines"),
        ("inner  spaces stay", "inner  spaces stay"),
        ("null", "null"),
        ("NA", "NA"),
        ("1984", "1984"),
        ("x" * 5000, "x" * 5000),
        (b"\xef\xbb\xbfBOM \xc3\xa9", "BOM é"),
        ("utf-16 猫".encode("utf-16"), "utf-16 猫"),
        (b"\xfe\xff" + "big endian 猫".encode("utf-16-be"), "big endian 猫"),
    ],
)
def test_caption(tmp_path, data, text):
    put_pair(tmp_path, "a.jpg", data)
    assert collect(tmp_path) == ([("a.jpg", text)], {}, {})


@pytest.mark.parametrize(
    ("text", "encoding"), [("café à Zürich", "latin-1"), ("“Zürich” – 5 €", "cp1252"), ("\x81é", "latin-1")]
)
def test_a_caption_in_the_encoding_of_windows_is_written_and_counted(tmp_path, text, encoding):
    put_pair(tmp_path, "a.jpg", text.encode(encoding))
    assert collect(tmp_path) == ([("a.jpg", text)], {}, {cm.ANSI: 1})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", cm.EMPTY_CAPTION),
        (b" \r\n\t", cm.EMPTY_CAPTION),
        (b"\xef\xbb\xbf", cm.EMPTY_CAPTION),
        (b"a\0b", cm.NOT_TEXT),
        ("UTF-16 without its mark".encode("utf-16-le"), cm.NOT_TEXT),
        (JPEG, cm.NOT_TEXT),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", cm.LFS_POINTER),
        (b"x" * (cm.MAX_CAPTION_BYTES + 1), cm.NOT_TEXT),
    ],
)
def test_unusable_caption(tmp_path, data, reason):
    put_pair(tmp_path, "good.jpg")
    put_pair(tmp_path, "a.jpg", data)
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {reason: 1}, {})


def test_keep_empty(tmp_path):
    put_pair(tmp_path, "a.jpg", " \n")
    put(tmp_path, "b.jpg", JPEG)
    assert collect(tmp_path, "--keep_empty") == ([("a.jpg", "")], {cm.NO_CAPTION: 1}, {})


MANY_LINES = {
    "crlf": ("one\r\ntwo\n\n  three", ["one", "two", "three"]),
    "unicode": (" U+2028\u2028and U+0085\u0085end", ["U+2028", "and U+0085", "end"]),
    "cr": ("\r\rone\rtwo", ["one", "two"]),
}


@pytest.mark.parametrize("how", ["first", "join", "random"])
def test_captions_of_several_lines(tmp_path, how):
    for stem, (data, _) in MANY_LINES.items():
        put_pair(tmp_path, f"{stem}.jpg", data)
    put(tmp_path, "dot.jpg", JPEG)
    put(tmp_path, "dot.caption", "one\ntwo")
    put(tmp_path, "json.jpg", JPEG)
    put(tmp_path, "json.json", '{"caption": "one\\n two "}')
    put_pair(tmp_path, "one line.jpg", "\n one line \n\n")
    lines = {stem: lines for stem, (_, lines) in MANY_LINES.items()} | {"dot": ["one", "two"], "json": ["one", "two"]}
    texts = {stem: {"first": each[0], "join": " ".join(each), "random": each}[how] for stem, each in lines.items()}
    texts["one line"] = "one line"
    as_written = {stem: [text] if isinstance(text, str) and how == "random" else text for stem, text in texts.items()}
    expected = [(f"{stem}.jpg", texts[stem]) for stem in sorted(texts)]
    flags = ["--caption_from_json", "--multiline", how]
    assert collect(tmp_path, *flags) == (expected, {}, {cm.SEVERAL_LINES[how]: 5, cm.DOT_CAPTION: 1})
    cm.main(["-p", str(tmp_path), *flags])
    assert written(tmp_path) == [(f"{stem}.jpg", as_written[stem]) for stem in sorted(texts)]  # all lists, or none
    if how == "join":
        assert collect(tmp_path, "--caption_from_json")[0] == expected  # the default


def test_lines_are_remarked_on_by_name(tmp_path, caplog):
    put_pair(tmp_path, "a.jpg", "one\ntwo")
    cm.main(["-p", str(tmp_path)])
    line = "        1  caption of several lines: joined into one (--multiline first or random): 'a.jpg'"
    assert line in caplog.text.splitlines()


def test_dot_caption_files(tmp_path):
    """They are read where there is no .txt, before a .json, and counted where they have no image."""
    put(tmp_path, "a.jpg", JPEG)
    put(tmp_path, "a.caption", b"caf\xe9")
    put(tmp_path, "b.jpg", JPEG)
    put(tmp_path, "b.CAPTION", "upper")
    put(tmp_path, "b.json", '{"caption": "from json"}')
    put_pair(tmp_path, "both.jpg", "from txt")
    put(tmp_path, "both.caption", "from caption")
    put(tmp_path, "empty.jpg", JPEG)
    put(tmp_path, "empty.caption", " ")
    put(tmp_path, "alone.caption", "c")
    rows, left_out, remarks = collect(tmp_path, "--caption_from_json")
    assert rows == [("a.jpg", "café"), ("b.jpg", "upper"), ("both.jpg", "from txt")]
    assert left_out == {cm.SECOND_CAPTION: 1, cm.EMPTY_CAPTION: 1, cm.NO_IMAGE: 1}
    assert remarks == {cm.DOT_CAPTION: 2, cm.ANSI: 1}


JSON_CAPTIONS = {
    '{"caption": "from json", "width": 1}': "from json",
    '{"text": "text will do"}': "text will do",
    '{"caption": null, "text": "text will do"}': "text will do",
    '{"text": "t", "caption": "caption first"}': "caption first",
    '{"caption": {"text": "inside"}}': "inside",
    '{"caption": 1984}': "1984",
    '{"caption": 1.50}': "1.50",
    '{"caption": "half a pair \\ud83d"}': "half a pair ?",
    '{"caption": ["one"]}': "one",
    '{"caption": ["one", "", null, "two ", "half \\ud83d"]}': ["one", "two", "half ?"],
    '{"text": ["", " one "]}': "one",
    '"a string"': "a string",
    '["one", "two"]': ["one", "two"],
    '[{"caption": "one"}, {"text": "two", "id": 7}, {"caption": null}]': ["one", "two"],
    '{"caption": [["one"], {"caption": ["two"]}]}': ["one", "two"],
    '[{"caption": 1984}]': "1984",
    "1984": "1984",
}
JSON_REASONS = {
    "null": cm.EMPTY_CAPTION,
    '{"caption": null}': cm.EMPTY_CAPTION,
    '{"caption": NaN}': cm.EMPTY_CAPTION,
    '{"caption": ""}': cm.EMPTY_CAPTION,
    '{"caption": []}': cm.EMPTY_CAPTION,
    '{"caption": [null, " "]}': cm.EMPTY_CAPTION,
    "{}": cm.NO_KEY,
    '{"prompt": "p"}': cm.NO_KEY,
    '{"caption": true}': cm.ODD_JSON + "bool",
    "false": cm.ODD_JSON + "bool",
    '{"caption": {"en": "a"}}': cm.ODD_JSON + "dict",
    '{"caption": {}}': cm.ODD_JSON + "dict",
    "[1]": cm.ODD_JSON + "list of number",
    '["a", 1.5]': cm.ODD_JSON + "list of number",
    '{"caption": ["a", [1]]}': cm.ODD_JSON + "list of number",
    '{"caption": ["a", true]}': cm.ODD_JSON + "bool",
    '[{"caption": "a"}, {"url": "b"}]': cm.ODD_JSON + "dict",
    '{"caption": "x': cm.BAD_JSON,
    "": cm.BAD_JSON,
    "[" * 100_000: cm.BAD_JSON,
    '{"caption": ' * 600 + '"a"' + "}" * 600: None,  # either is fine, but no traceback
    '{"caption": "a\\u0000b"}': cm.NOT_TEXT,
    '{"caption": ["a", "a\\u0000b"]}': cm.NOT_TEXT,
}


@pytest.mark.parametrize("data", JSON_CAPTIONS)
def test_caption_from_json(tmp_path, data):
    put(tmp_path, "a.jpg", JPEG)
    put(tmp_path, "a.json", data)
    text = JSON_CAPTIONS[data]
    remarks = {cm.SEVERAL_CAPTIONS: 1} if isinstance(text, list) else {}
    assert collect(tmp_path, "--caption_from_json") == ([("a.jpg", text)], {}, remarks)
    cm.main(["-p", str(tmp_path), "--caption_from_json"])
    assert written(tmp_path) == [("a.jpg", text)]


@pytest.mark.parametrize("data", JSON_REASONS, ids=lambda data: data[:30])
def test_json_without_a_caption(tmp_path, data):
    put_pair(tmp_path, "good.jpg")
    put(tmp_path, "a.jpg", JPEG)
    put(tmp_path, "a.json", data)
    rows, left_out, _ = collect(tmp_path, "--caption_from_json")
    reason = JSON_REASONS[data]
    assert reason is None or (rows, left_out) == ([("good.jpg", "a caption")], {reason: 1})
    rows, left_out, _ = collect(tmp_path, "--caption_from_json", "--keep_empty")
    if reason in (cm.EMPTY_CAPTION, cm.NO_KEY):
        assert (rows, left_out) == ([("a.jpg", ""), ("good.jpg", "a caption")], {})
    else:
        assert reason is None or left_out == {reason: 1}


def test_json_is_read_on_request_and_after_txt(tmp_path):
    put(tmp_path, "a.jpg", JPEG)
    put(tmp_path, "a.json", '{"caption": "from json"}')
    put_pair(tmp_path, "txt first.jpg", "from txt")
    put(tmp_path, "txt first.json", '{"caption": "from json"}')
    assert collect(tmp_path) == ([("txt first.jpg", "from txt")], {cm.ONLY_JSON: 1}, {})
    rows = [("a.jpg", "from json"), ("txt first.jpg", "from txt")]
    assert collect(tmp_path, "--caption_from_json") == (rows, {}, {})


def test_a_csv_holds_one_caption_of_several(tmp_path, capsys):
    put(tmp_path, "a.jpg", JPEG)
    put(tmp_path, "a.json", '{"caption": ["one", "two"]}')
    flags = ["--caption_from_json", "--format", "csv"]
    assert collect(tmp_path, *flags) == ([("a.jpg", "one")], {}, {cm.ONE_IN_CSV: 1})
    message = error_line(capsys, "-p", str(tmp_path), *flags, "--multiline", "random")
    assert "--multiline random" in message and "--format jsonl" in message
    assert sorted(listing(tmp_path)) == ["a.jpg", "a.json"]


# ---------------------------------------------------------------------------------------------- the images


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_good_jpeg(tmp_path, mode):
    put(tmp_path, "a.jpg", encoded(gradient(mode), progressive=True))
    assert cm.image_problem(str(tmp_path / "a.jpg"), []) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_good_png(tmp_path, mode):
    put(tmp_path, "a.png", encoded(gradient(mode), "PNG"))
    assert cm.image_problem(str(tmp_path / "a.png"), []) is None


def test_other_good_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [gradient("P"), Image.new("P", (24, 16))]
    good = {
        "rotated.jpg": encoded(gradient(), exif=exif),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated too.webp": encoded(gradient(), "WEBP", save_all=True, append_images=[frames[1]]),
        "tiny.png": encoded(gradient(size=(1, 1)), "PNG"),
        "long.jpg": encoded(gradient(size=(12000, 40))),
        "a.bmp": encoded(gradient(), "BMP"),
        "b.tiff": encoded(gradient(), "TIFF"),
        "really a png.jpg": encoded(gradient(), "PNG"),
        "two frames.jpg": encoded(gradient(), "MPO", save_all=True, append_images=[gradient()]),
    }
    for name, data in good.items():
        put_pair(tmp_path, name, image=data)
    remarks = {cm.FRAMES: 3, cm.ODD_SHAPE: 2}
    assert collect(tmp_path) == ([(name, "a caption") for name in sorted(good)], {}, remarks)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", cm.ZERO_BYTES),
        (b"this is a text, not an image\n" * 30, cm.NOT_AN_IMAGE),
        (b"<html><body>404</body></html>", cm.NOT_AN_IMAGE),
        (b"\0\0\0\x18ftypisom" + b"x" * 99, cm.NOT_AN_IMAGE),  # mp4
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", cm.unread("EPS")),
        (b"\xff\x0a" + b"x" * 99, cm.unread("JXL")),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"x" * 99, cm.unread("JXL")),
        (encoded(gradient(), "JPEG2000"), cm.unread("JP2")),
        (b"\n<svg xmlns='x'/>", cm.unread("SVG")),
        (b"<?xml version='1.0'?>\n<!-- -->\n<svg/>", cm.unread("SVG")),
        (b"8BPS\0\1" + b"x" * 99, cm.unread("PSD")),
        (b"II*\0" + b"x" * 99, cm.unread("damaged TIFF, or of a rare kind")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", cm.LFS_POINTER),
        (ftyp(b"avif"), cm.DAMAGED),  # Pillow reads the others
        (JPEG[:6], cm.DAMAGED),
        (png_with((b"iCCP", b"")), cm.DAMAGED),
        (png_with((b"gAMA", b"1")), cm.DAMAGED),
        (JPEG[: len(JPEG) // 2], cm.DAMAGED),
        (JPEG[:-2], cm.DAMAGED),
        (encoded(gradient(), "PNG")[:60], cm.DAMAGED),
        (encoded(gradient(), "WEBP")[:-20], cm.DAMAGED),
        (huge_png(9_600), cm.TOO_LARGE),  # 92 megapixels, of which Pillow itself only warns
        (huge_png(60_000), cm.TOO_LARGE),
    ],
)
def test_image_problem(tmp_path, data, reason):
    assert cm.image_problem(str(put(tmp_path, "a.jpg", data)), []) == reason


@pytest.fixture
def without_heif(monkeypatch):
    """As where pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(cm, "find_spec", lambda _: None)
    cm.image_formats.cache_clear()
    yield
    cm.image_formats.cache_clear()


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1"])
def test_heic_under_another_name_is_named_as_such(tmp_path, without_heif, brand):
    assert cm.image_problem(str(put(tmp_path, "a.jpg", ftyp(brand))), []) == cm.unread("HEIC")


def test_images_that_are_not_read_are_named_by_format(tmp_path, without_heif, caplog):
    put_pair(tmp_path, "good.jpg")
    put(tmp_path, "good.psd", "8BPS")
    for name in ("0.HEIC", "1.heic", "2.heif", "3.hif", "4.jxl", "5.CR2", "6.svg", "sub/7.tga"):
        put_pair(tmp_path, name, image=b"x")
    put(tmp_path, "no caption.jp2", "x")
    put(tmp_path, "alone.txt", "c")
    caplog.set_level("INFO")
    cm.main(["-p", str(tmp_path)])
    lines = caplog.text.splitlines()
    remedy = "pip install pillow-heif, or convert it to JPEG or PNG"
    assert f"        2  image in a format that is not read (HEIC: {remedy}): '0.HEIC', '1.heic'" in lines
    for name in ("HEIF", "HIF"):
        assert any(line.startswith(f"        1  {cm.unread(name)}: ") and "pillow-heif" in line for line in lines)
    for name in ("JXL", "CR2", "SVG", "TGA", "JP2", "PSD"):
        line = f"        1  image in a format that is not read ({name}: convert it to JPEG or PNG): "
        assert sum(each.startswith(line) for each in lines) == 1
    assert f"        1  {cm.NO_IMAGE}: 'alone.txt'" in lines
    assert written(tmp_path) == [("good.jpg", "a caption")]


STAND_IN_FOR_PILLOW_HEIF = """
from PIL import Image, ImageFile

class Heif(ImageFile.ImageFile):
    format = "HEIF"
    def _open(self):
        self._size, self._mode = (24, 16), "RGB"
    def load(self):
        self.im = Image.core.fill("RGB", self.size, 0)

def register_heif_opener():
    Image.register_open("HEIF", Heif, lambda start: start[4:12] == b"ftypheic")
"""


@pytest.fixture(params=["a stand-in", "pillow-heif"])
def heif_image(request, tmp_path, monkeypatch):
    """The bytes of a HEIC image, which can be read."""
    if request.param == "pillow-heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
        data = encoded(gradient(), "HEIF")
    else:
        put(tmp_path, "modules/pillow_heif.py", STAND_IN_FOR_PILLOW_HEIF)
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
        data = ftyp(b"heic")
    cm.image_formats.cache_clear()
    yield data
    sys.modules.pop("pillow_heif", None)
    cm.image_formats.cache_clear()
    Image.OPEN.pop("HEIF", None)
    Image.ID[:] = [name for name in Image.ID if name != "HEIF"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_heic_is_read_where_pillow_heif_is(tmp_path, heif_image, workers):
    folder = tmp_path / "pairs"
    names = [f"{key:02d}{extension}" for key, extension in enumerate([".HEIC", ".heif", ".hif", ".jpg"] * 9)]
    for name in names:
        put_pair(folder, name, image=heif_image)
    put_pair(folder, "cut.heic", image=b"\0\0\0\x18ftypheix" + b"x" * 99)
    put_pair(folder, "avif.png", image=encoded(gradient(), "AVIF"))
    rows, left_out, _ = collect(folder, "--num_workers", workers)
    assert [name for name, _ in rows] == [*names, "avif.png"]
    assert left_out == {cm.DAMAGED: 1}


@pytest.mark.parametrize("case", burdened(), ids=lambda case: case.name)
def test_sound_images_with_much_or_broken_data_beside_the_pixels(tmp_path, case):
    case.write(tmp_path)
    assert collect(tmp_path) == ([*case.rows.items()], {}, case.remarks)


def test_text_of_a_png_is_bounded(tmp_path):
    bomb = zlib.compress(bytes(cm.MAX_PNG_TEXT + 1))
    sixty = zlib.compress(b"x" * (60 << 20))
    images = {
        "one text.png": png_with((b"zTXt", b"w\0\0" + bomb)),
        "international.png": png_with((b"iTXt", b"w\0\1\0\0\0" + bomb), at_end=True),
        "color profile.png": png_with((b"iCCP", b"p\0\0" + bomb)),
        "many texts.png": png_with(*[(b"zTXt", b"%d\0\0" % key + sixty) for key in range(3)]),
    }
    for name, data in images.items():
        put_pair(tmp_path, name, image=data)
    put_pair(tmp_path, "good.png", image=png_with(*[(b"zTXt", b"%d\0\0" % key + sixty) for key in range(2)]))
    assert collect(tmp_path) == ([("good.png", "a caption")], {cm.MUCH_TEXT: 4}, {})


def test_damaged_exif_data_does_not_hide_damaged_pixels(tmp_path):
    data = png_with((b"eXIf", b"garbage"))
    assert cm.image_problem(str(put(tmp_path, "a.png", data[:-25])), []) == cm.DAMAGED


def test_a_disk_error_in_an_image_is_no_damage(tmp_path, monkeypatch):
    path = put(tmp_path, "a.jpg", JPEG)

    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cm, "open", Failing, raising=False)
    assert cm.image_problem(str(path), []) == cm.UNREADABLE


def test_a_jpeg_cut_anywhere_is_found(tmp_path):
    """Decoding an eighth of the image finds exactly what decoding all of it would."""
    data = encoded(Image.effect_noise((200, 120), 60).convert("RGB"), quality=90)
    for length in [*random.Random(0).sample(range(len(data)), 60), len(data) - 3, len(data) - 1, len(data)]:
        path = put(tmp_path, "a.jpg", data[:length])
        try:
            with Image.open(path) as image:
                image.load()
            decodes = True
        except OSError:
            decodes = False
        assert (cm.image_problem(str(path), []) is None) == decodes, length


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    for stem in ("good", "secret image", "secret caption"):
        put_pair(tmp_path, f"{stem}.jpg")
    put_pair(tmp_path, "closed/a.jpg")
    real_open, real_scandir = open, os.scandir

    def guarded_open(path, *args, **kwargs):
        if str(path).endswith(("secret image.jpg", "secret caption.txt")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_open(path, *args, **kwargs)

    def guarded_scandir(path):
        if "closed" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(cm, "open", guarded_open, raising=False)
    monkeypatch.setattr(os, "scandir", guarded_scandir)
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {cm.UNREADABLE: 3}, {})


# --------------------------------------------------------------------------------------- folders and pairing


def test_img2dataset_layout_with_holes(tmp_path):
    for shard in ("00000", "00001"):
        for key in range(3):
            put_pair(tmp_path, f"{shard}/{shard}{key:04d}.jpg", f"caption {shard} {key}")
            put(tmp_path, f"{shard}/{shard}{key:04d}.json", '{"caption": "other"}')
        put(tmp_path, f"{shard}.parquet", b"PAR1")
        put(tmp_path, f"{shard}_stats.json", "{}")
    (tmp_path / "00000/000000001.txt").unlink()
    (tmp_path / "00001/000010002.jpg").unlink()
    rows, left_out, remarks = collect(tmp_path)
    assert [name for name, _ in rows] == [
        "00000/000000000.jpg",
        "00000/000000002.jpg",
        "00001/000010000.jpg",
        "00001/000010001.jpg",
    ]
    assert rows[3][1] == "caption 00001 1"
    assert (left_out, remarks) == ({cm.ONLY_JSON: 1, cm.NO_IMAGE: 1}, {})


def test_names_that_differ_in_spelling_only_are_a_pair(tmp_path):
    """As they are on Windows and macOS; but what fits several, or has its own, is left alone."""
    put_pair(tmp_path, "exact.jpg", "exact")
    for image, caption in {
        "\u00e9.jpg": "e\u0301.txt",
        "n\u0303/x.jpg": "\u00f1/x.txt",
        "Cat.JPG": "cat.TXT",
        "0.jpg": "0.jpg.txt",
        "exact.png": "Exact.txt",
        "two.jpg": "Two.txt",
        "three.jpg": "other/three.txt",
    }.items():
        put(tmp_path, image, JPEG)
        put(tmp_path, caption, image)
    put(tmp_path, "TWO.txt", "which?")
    put_pair(tmp_path, "A.jpg", "upper")
    put_pair(tmp_path, "a.jpg", "lower")
    names = ["0.jpg", "Cat.JPG", "n\u0303/x.jpg", "\u00e9.jpg"]
    rows, left_out, remarks = collect(tmp_path)
    assert rows == sorted([("exact.jpg", "exact"), ("A.jpg", "upper"), ("a.jpg", "lower"), *((n, n) for n in names)])
    assert left_out == {cm.NO_CAPTION: 2, cm.NO_IMAGE: 4, cm.SECOND_IMAGE: 1}
    assert remarks == {cm.OTHER_SPELLING: 4}


def test_stems_do_not_pair_across_folders(tmp_path):
    put_pair(tmp_path, "good.jpg")
    put(tmp_path, "a/x.jpg", JPEG)
    put(tmp_path, "b/x.txt", "not for a/x.jpg")
    put(tmp_path, "txt", "has no extension")
    put(tmp_path, "jpg", JPEG)
    (tmp_path / "folder.jpg").mkdir()
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {cm.NO_CAPTION: 1, cm.NO_IMAGE: 1}, {})


@pytest.mark.parametrize("backwards", [False, True])
def test_two_files_of_one_stem(tmp_path, monkeypatch, backwards):
    """The same one is taken whatever order the disk lists them in."""
    for name in ("a.png", "a.JPG", "a.webp"):
        put(tmp_path, name, JPEG)
    put(tmp_path, "a.TXT", "upper")
    put(tmp_path, "a.txt", "lower")
    real_scandir = os.scandir

    class Scandir(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    def in_order(path):
        return Scandir(sorted(real_scandir(path), key=lambda entry: entry.name, reverse=backwards))

    monkeypatch.setattr(os, "scandir", in_order)
    args = cm.parse_args(["-p", str(tmp_path)])
    left_out = cm.Reasons()
    assert cm.find_pairs(args, left_out, cm.Reasons()) == [("a.JPG", "a.TXT")]
    assert left_out.counts == {cm.SECOND_IMAGE: 2, cm.SECOND_CAPTION: 1}
    assert left_out.names == {cm.SECOND_IMAGE: ["a.png", "a.webp"], cm.SECOND_CAPTION: ["a.txt"]}


def test_symlinks(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    put_pair(outside, "x.jpg")
    put_pair(folder, "good.jpg")
    put_pair(folder, "shard/inner.jpg")
    (folder / "linked.jpg").symlink_to("shard/inner.jpg")  # inside: as good as any file
    put(folder, "linked.txt", "another caption")
    (folder / "leads out.jpg").symlink_to(outside / "x.jpg")
    put(folder, "leads out.txt", "c")
    put(folder, "caption out.jpg", JPEG)
    (folder / "caption out.txt").symlink_to(outside / "x.txt")
    (folder / "folder out").symlink_to(outside)
    (folder / "self.jpg").symlink_to("self.jpg")
    put(folder, "self.txt", "c")
    (folder / "gone").symlink_to("nowhere")
    (folder / "shard/loop").symlink_to("..")
    (folder / "second way in").symlink_to("shard")
    (folder / "second name.parquet").symlink_to(outside / "x.jpg")  # of no interest
    rows, left_out, _ = collect(folder)
    assert rows == [("good.jpg", "a caption"), ("linked.jpg", "another caption"), ("shard/inner.jpg", "a caption")]
    assert left_out == {cm.LINK_OUT: 3, cm.LINK_BROKEN: 2, cm.LINK_FOLDER: 2}


def test_the_folder_itself_may_be_a_symlink(tmp_path):
    put_pair(tmp_path / "real", "a.jpg")
    (tmp_path / "link").symlink_to("real")
    cm.main(["-p", f"{tmp_path}/link/"])
    assert written(tmp_path / "real") == [("a.jpg", "a caption")]


def test_names_that_metadata_cannot_carry(tmp_path):
    put_pair(tmp_path, "good.jpg")
    put_pair(tmp_path, "back\\slash.jpg")
    for extension in (b".jpg", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9" + extension)).write_bytes(JPEG)
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {cm.BAD_NAME: 2}, {})


def test_hidden_things(tmp_path):
    put_pair(tmp_path, "good.jpg")
    put(tmp_path, "._good.jpg", b"AppleDouble")
    put(tmp_path, ".DS_Store", b"x")
    put_pair(tmp_path, ".ipynb_checkpoints/good.jpg")
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {cm.HIDDEN: 2}, {})


def test_special_files_are_never_opened(tmp_path):
    put_pair(tmp_path, "good.jpg")
    put(tmp_path, "a.jpg", JPEG)
    os.mkfifo(tmp_path / "a.txt")  # opening it would wait for ever
    assert collect(tmp_path) == ([("good.jpg", "a caption")], {cm.NO_CAPTION: 1}, {})


def test_nested_metadata_is_reported(tmp_path):
    put_pair(tmp_path, "a/good.jpg")
    put(tmp_path, "a/metadata.jsonl", "{}")
    put(tmp_path, "b/metadata.csv", "")
    assert collect(tmp_path) == ([("a/good.jpg", "a caption")], {}, {cm.NESTED: 2})


def test_max_samples_takes_the_first_good_ones(tmp_path):
    for key in range(5):
        put_pair(tmp_path, f"{key}.jpg", image=b"" if key == 1 else JPEG)
    rows, left_out, _ = collect(tmp_path, "--max_samples", "3")
    assert [name for name, _ in rows] == ["0.jpg", "2.jpg", "3.jpg"]
    assert left_out == {cm.ZERO_BYTES: 1}


def test_no_verify_opens_no_image(tmp_path):
    put_pair(tmp_path, "a.jpg", image=b"")
    assert collect(tmp_path, "--no_verify") == ([("a.jpg", "a caption")], {}, {})


def dirty_corpus(folder: Path, num_good: int) -> None:
    for key in range(num_good):
        put_pair(folder, f"{key % 3:05d}/{key:09d}.jpg", f"number {key}")
    put_pair(folder, "truncated.jpg", image=JPEG[:200])
    put_pair(folder, "text.jpg", image=b"hello")
    put_pair(folder, "zero.jpg", image=b"")
    put_pair(folder, "bomb.png", image=huge_png(60_000))
    put_pair(folder, "empty caption.jpg", "")
    put(folder, "no caption.jpg", JPEG)
    put(folder, "no image.txt", "c")
    put_pair(folder, "latin.jpg", b"caf\xe9")


def test_workers_give_the_same_bytes_as_one_process(tmp_path, caplog):
    """Enough pairs for a pool: same rows in the same order, same counts; and a second run changes no byte."""
    dirty_corpus(tmp_path, num_good=60)
    caplog.set_level("INFO")
    outputs = []
    for workers in ("1", "2", "2"):
        caplog.clear()
        cm.main(["-p", str(tmp_path), "--num_workers", workers])
        outputs.append(((tmp_path / "metadata.jsonl").read_bytes(), caplog.text))
    assert outputs[0] == outputs[1] == outputs[2]
    rows = written(tmp_path)
    assert len(rows) == 61 and rows == sorted(rows)
    assert rows[1] == ("00000/000000003.jpg", "number 3") and rows[-1] == ("latin.jpg", "café")


def test_closing_report(tmp_path, caplog):
    dirty_corpus(tmp_path, num_good=3)
    for key in range(4):
        put(tmp_path, f"alone {key}.jpg", JPEG)
    caplog.set_level("INFO")
    cm.main(["-p", str(tmp_path)])
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    assert f"        5  {cm.NO_CAPTION}: 'alone 0.jpg', 'alone 1.jpg', 'alone 2.jpg', ..." in lines
    for reason, name in [
        (cm.DAMAGED, "truncated.jpg"),
        (cm.NOT_AN_IMAGE, "text.jpg"),
        (cm.ZERO_BYTES, "zero.jpg"),
        (cm.TOO_LARGE, "bomb.png"),
        (cm.EMPTY_CAPTION, "empty caption.jpg"),
        (cm.NO_IMAGE, "no image.txt"),
        (cm.ANSI, "latin.jpg"),
    ]:
        assert f"        1  {reason}: {name!r}" in lines
    assert f"4 pairs written to {tmp_path}/metadata.jsonl, every image decoded" in lines
    assert lines[-1].startswith("next: ") and lines[-1].endswith(f"--train_data_dir {tmp_path}")


def test_a_worker_that_dies_ends_the_run():
    with pytest.raises(cm.UsageError, match="--num_workers 2: .* died"):
        list(cm.in_order(os._exit, [1] * 100, num_workers=2))


def start_no_process(*_):
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_workers_that_cannot_start_end_the_run(tmp_path, capsys, monkeypatch):
    for key in range(40):
        put_pair(tmp_path, f"{key}.jpg")
    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", start_no_process)
    message = error_line(capsys, "-p", str(tmp_path), "--num_workers", "2")
    assert "--num_workers 2" in message and "did not start" in message


# ------------------------------------------------------------------------------------ one metadata file, whole


def test_csv(tmp_path):
    put_pair(tmp_path, 'a "b", c.jpg', "one, two")
    put_pair(tmp_path, "d.jpg", 'say "hi"')
    cm.main(["-p", str(tmp_path), "--format", "csv"])
    expected = 'file_name,text\n"a ""b"", c.jpg","one, two"\n"d.jpg","say ""hi"""\n'
    assert (tmp_path / "metadata.csv").read_bytes() == expected.encode()


def test_own_metadata_is_replaced_in_either_format(tmp_path):
    put_pair(tmp_path, "a.jpg")
    for chosen in ("csv", "jsonl", "jsonl", "csv"):
        cm.main(["-p", str(tmp_path), "--format", chosen])
        assert [path.name for path in tmp_path.glob("metadata*")] == [f"metadata.{chosen}"]
    put_pair(tmp_path, "b.jpg")
    cm.main(["-p", str(tmp_path)])
    assert written(tmp_path) == [("a.jpg", "a caption"), ("b.jpg", "a caption")]


@pytest.mark.parametrize("name", cm.METADATA_NAMES)
def test_foreign_metadata(tmp_path, capsys, name):
    put_pair(tmp_path, "a.jpg")
    put(tmp_path, name, '{"file_name": "a.jpg", "text": "written by hand"}\n')
    before = listing(tmp_path)
    message = error_line(capsys, "-p", str(tmp_path))
    assert str(tmp_path / name) in message and "--overwrite" in message
    assert listing(tmp_path) == before
    cm.main(["-p", str(tmp_path), "--overwrite"])
    assert [path.name for path in tmp_path.glob("metadata*")] == ["metadata.jsonl"]
    assert written(tmp_path) == [("a.jpg", "a caption")]


def test_captions_edited_by_hand_are_not_lost(tmp_path, capsys):
    put_pair(tmp_path, "a.jpg")
    cm.main(["-p", str(tmp_path)])
    edited = (tmp_path / "metadata.jsonl").read_text().replace("a caption", "a better caption")
    put(tmp_path, "metadata.jsonl", edited)
    assert "edited" in error_line(capsys, "-p", str(tmp_path))
    assert (tmp_path / "metadata.jsonl").read_text() == edited


def test_stamp_is_a_sha256sum_file(tmp_path):
    put_pair(tmp_path, "a.jpg")
    cm.main(["-p", str(tmp_path)])
    subprocess.run(["sha256sum", "--check", cm.STAMP_NAME], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_disk_full_leaves_the_old_file(tmp_path, capsys, monkeypatch, failing):
    put_pair(tmp_path, "a.jpg")
    cm.main(["-p", str(tmp_path)])
    put_pair(tmp_path, "b.jpg")
    before = listing(tmp_path)

    def disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, disk_full)
    message = error_line(capsys, "-p", str(tmp_path))
    assert "No space left on device" in message and str(tmp_path) in message
    assert listing(tmp_path) == before


@pytest.mark.parametrize("stage", ["check_pair", "jsonl_line"])
def test_ctrl_c_leaves_the_old_file(tmp_path, monkeypatch, stage):
    put_pair(tmp_path, "a.jpg")
    cm.main(["-p", str(tmp_path)])
    put_pair(tmp_path, "b.jpg")
    before = listing(tmp_path)

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cm, stage, ctrl_c)
    with pytest.raises(SystemExit) as end:
        cm.main(["-p", str(tmp_path)])
    assert end.value.code == 130
    assert listing(tmp_path) == before


def test_a_planted_partial_file_is_not_written_through(tmp_path):
    target = put(tmp_path, "precious", "keep me")
    put_pair(tmp_path / "data", "a.jpg")
    (tmp_path / "data/metadata.jsonl.partial").symlink_to(target)
    cm.main(["-p", str(tmp_path / "data")])
    assert target.read_text() == "keep me"
    assert written(tmp_path / "data") == [("a.jpg", "a caption")]


# ------------------------------------------------------------------------------------------- the command line


def test_wrong_arguments(tmp_path, capsys, monkeypatch):
    assert "--image_path" in error_line(capsys)
    assert "--max_samples 0" in error_line(capsys, "-p", str(tmp_path), "--max_samples", "0")
    assert "--num_workers 0" in error_line(capsys, "-p", str(tmp_path), "--num_workers", "0")
    assert "--format" in error_line(capsys, "-p", str(tmp_path), "--format", "xml")
    assert "--multiline" in error_line(capsys, "-p", str(tmp_path), "--multiline", "all")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "writable" in error_line(capsys, "-p", str(tmp_path))


TRAIN = "train_text_to_image_qat.py"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("00000.tar", f"train on it as it is: {TRAIN} --streaming --max_train_steps N --train_data_dir {{}}"),
        ("pairs.zip", "unpack it"),
        ("pairs.tar.gz", "unpack it"),
        ("train.parquet", f"needs no metadata: {TRAIN} --train_data_dir {{}}train.parquet reads it"),
        ("data-00000-of-00001.arrow", f"{TRAIN} --train_data_dir {{}}data-00000-of-00001.arrow reads it"),
        ("metadata.jsonl", f"{TRAIN} --train_data_dir {{}}metadata.jsonl reads it"),
        ("captions.csv", f"{TRAIN} --train_data_dir {{}}captions.csv reads it"),
        ("0.jpg", "perhaps '{}'"),
    ],
)
def test_a_file_in_the_place_of_the_folder(tmp_path, capsys, monkeypatch, name, remedy):
    put(tmp_path, name, "")
    message = error_line(capsys, "-p", str(tmp_path / name))
    slash = "/" if "{}" + name in remedy else ""
    assert f"'{tmp_path}/{name}' is not a folder" in message and remedy.format(f"{tmp_path}{slash}") in message
    monkeypatch.chdir(tmp_path)
    assert remedy.format("" if slash else ".") in error_line(capsys, "-p", name)
    assert os.listdir(tmp_path) == [name]


def test_a_path_that_is_nowhere(tmp_path, capsys, monkeypatch):
    message = error_line(capsys, "-p", f"{tmp_path}/gone")
    assert f"'{tmp_path}/gone' does not exist" in message and "--dataset_name" in message
    for path in ("", "a\0b", "x" * 999):
        assert "pass a folder" in error_line(capsys, "-p", path)


def test_metadata_of_others_is_what_training_reads(tmp_path, capsys):
    put_pair(tmp_path, "a.jpg")
    for name, flag in [("metadata.jsonl", "--train_data_dir"), ("metadata.parquet", "--train_data_dir")]:
        path = put(tmp_path, name, "x" * 5000)
        message = error_line(capsys, "-p", str(tmp_path))
        assert f"not written by this script: {TRAIN} {flag} {tmp_path} reads it" in message and "--overwrite" in message
        path.unlink()
    (tmp_path / "metadata.csv").mkdir()
    before = listing(tmp_path)
    assert "is a folder" in error_line(capsys, "-p", str(tmp_path), "--overwrite")
    assert listing(tmp_path) == before


def put_all(folder: Path, *names: str) -> None:
    for name in names:
        put(folder, name, JPEG if name.endswith("jpg") else "text")


NOTHING_USABLE = {
    "nothing": ([], [], "no image was found: pass the folder of NAME.jpg"),
    "videos": (["0.mp4", "1.mp4", "0.txt", "x"], [], "no image was found, but 2 .mp4, 1 without an extension: "),
    "hidden": ([".git/0.jpg", "a.mp4"], [], "no image was found, but 1 .mp4: "),
    "tars": (["00000.tar", "00001.tar"], [], "--streaming --max_train_steps N --train_data_dir {} reads its 2 .tar"),
    "tars deeper": (["a/b/00000.tar", "logo.jpg"], [], "--train_data_dir {}/a/b reads its 1 .tar"),
    "parquet": (["data/train.parquet"], [], f"{TRAIN} --dataset_name {{}} reads"),
    "save_to_disk": (["state.json", "dataset_info.json", "data.arrow"], [], f"{TRAIN} --dataset_name {{}} reads"),
    "archive": (["pairs.zip", "README.md"], [], "unpack 'pairs.zip' first"),
    "json": (["0.jpg", "0.json", "1.jpg", "1.json"], [], "2 image without .txt or .caption, but with a .json (--capt"),
    "json, asked for": (["0.jpg", "0.json"], ["--caption_from_json"], 'must hold {{"caption": "text"}}'),
    "other folder": (
        ["i/0.jpg", "i/1.jpg", "t/0.txt", "t/1.txt", "t/2.txt"],
        [],
        "'i/0.txt': move or rename 't/0.txt'",
    ),
    "one table": (
        ["0.jpg", "1.jpg", "captions.csv"],
        [],
        f"by a file_name from its folder on: {TRAIN} --train_data_dir {{}}/captions.csv reads it",
    ),
    "one text": (["0.jpg", "1.jpg", "captions.txt"], [], "if 'captions.txt' holds the captions"),
    "one json": (["0.jpg", "1.jpg", "captions.json"], [], "if 'captions.json' holds the captions"),
    "deeper": (["t/0.jpg", "t/metadata.jsonl"], [], f"in 't/metadata.jsonl': {TRAIN} --train_data_dir {{}}/t reads"),
    "overwriting": (["0.jpg", "metadata.csv"], ["--overwrite"], f"'metadata.csv': {TRAIN} --train_data_dir {{}} reads"),
    "classes": (["hill/0.jpg", "lake/1.jpg"], [], f"{TRAIN} --dataset_name {{}} --caption_column label"),
    "no caption": (["0.jpg"], [], "needs its caption in NAME.txt beside it"),
}


@pytest.mark.parametrize("names, flags, remedy", NOTHING_USABLE.values(), ids=NOTHING_USABLE)
def test_the_remedy_fits_what_the_folder_holds(tmp_path, capsys, names, flags, remedy):
    put_all(tmp_path, *names)
    before = listing(tmp_path)
    message = error_line(capsys, "-p", str(tmp_path), *flags)
    assert remedy.format(tmp_path) in message and "no usable pair" in message and len(message) < 700
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("caption", "image", "remedy"),
    [
        ("", JPEG, "3 empty caption (--keep_empty keeps it)"),
        ("c", b"hello", "get them again"),
        ("c", JPEG[:300], "get them again"),
        ("c", ftyp(b"heic"), "pip install pillow-heif"),
        ("c", b"\xff\x0a", "convert it to JPEG or PNG"),
        ("utf-16".encode("utf-16-le"), JPEG, "save it as UTF-8"),
    ],
)
def test_the_remedy_fits_the_main_reason(tmp_path, capsys, without_heif, caption, image, remedy):
    for key in range(3):
        put_pair(tmp_path, f"{key}.jpg", caption, image)
    put(tmp_path, "alone.jpg", JPEG)
    for key in range(4):
        put(tmp_path, f"alone {key}.txt", "c")
    assert remedy in error_line(capsys, "-p", str(tmp_path))


def test_heic_alone(tmp_path, capsys, without_heif):
    for key in range(4):
        put_pair(tmp_path, f"{key}.HEIC", image=ftyp(b"heic"))
    message = error_line(capsys, "-p", str(tmp_path))
    assert f"(left out: 4 {cm.unread('HEIC')}: '0.HEIC')" in message and "caption file" not in message


def test_every_error_is_one_line(tmp_path, capsys):
    assert "--a b" in error_line(capsys, "-p", str(tmp_path), "--a\nb")


@pytest.mark.parametrize(
    ("flags", "where"), [(["-p", "gone"], "in parse_args"), (["--num_workers", "x"], "in parse_args"), ([], "in run")]
)
def test_debug_shows_the_traceback_before_the_line(tmp_path, capsys, monkeypatch, flags, where):
    monkeypatch.chdir(tmp_path)
    flags = ["-p", str(tmp_path), *flags]
    error_line(capsys, *flags)
    with pytest.raises(SystemExit) as end:
        cm.main([*flags, "--debug"])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (end.value.code, out, lines[0]) == (2, "", "Traceback (most recent call last):") and where in err
    assert lines[-1].startswith("create_metadata.py: error: ")


def test_no_pair_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "line\nbreak [1]"
    folder.mkdir()
    assert "NAME.txt" in error_line(capsys, "-p", str(folder))
    put(folder, "a.jpg", JPEG)
    assert f"1 {cm.NO_CAPTION}" in error_line(capsys, "-p", str(folder))
    put(folder, "a.txt", "")
    assert f"1 {cm.EMPTY_CAPTION}" in error_line(capsys, "-p", str(folder))
    put_pair(folder, "a.jpg", image=b"hello")
    assert f"1 {cm.NOT_AN_IMAGE}" in error_line(capsys, "-p", str(folder))
    assert sorted(listing(folder)) == ["a.jpg", "a.txt"]


def test_help_needs_no_library():
    code = (
        "import sys, create_metadata\n"
        "try: create_metadata.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'PIL', 'tqdm', 'torch', 'numpy', 'concurrent.futures'} & set(sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "--image_path FOLDER" in child.stdout and "Next: train_text_to_image_qat.py" in child.stdout
    assert len(cm.__doc__.strip().splitlines()) <= 15


def test_command_line(tmp_path):
    put_pair(tmp_path, "00000/000000001.jpg", "a photo of an astronaut riding a horse on mars")
    child = subprocess.run([sys.executable, SCRIPT, "--image_path", tmp_path], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "" and len(child.stderr.splitlines()) == 2, child.stderr
    assert written(tmp_path) == [("00000/000000001.jpg", "a photo of an astronaut riding a horse on mars")]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ended_from_outside(tmp_path, how):
    """Ctrl-C (to the whole group, as a terminal sends it) or a kill: nothing written, no worker left, no traceback."""
    put_pair(tmp_path, "0.png", image=encoded(Image.effect_noise((600, 600), 60), "PNG"))
    for key in range(1, 5000):  # minutes of decoding
        os.link(tmp_path / "0.png", tmp_path / f"{key}.png")
        os.link(tmp_path / "0.txt", tmp_path / f"{key}.txt")
    before = set(os.listdir(tmp_path))
    command = [sys.executable, SCRIPT, "-p", tmp_path, "--num_workers", "2"]
    # a shell has its background jobs, and so perhaps this test, ignore Ctrl-C
    obey = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=obey) as child:
        try:
            deadline = time.monotonic() + 30
            while len(workers := children(child.pid)) < 3 and time.monotonic() < deadline:  # two, and their tracker
                time.sleep(0.02)
            time.sleep(0.5)
            os.killpg(child.pid, how) if how == signal.SIGINT else child.kill()
            _, stderr = child.communicate(timeout=30)
        finally:
            child.kill()
    while any(os.path.exists(f"/proc/{worker}/exe") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(os.path.exists(f"/proc/{worker}/exe") for worker in workers)
    assert child.returncode == (130 if how == signal.SIGINT else -9), stderr
    assert how == signal.SIGKILL or stderr == "interrupted: nothing written\n"
    assert set(os.listdir(tmp_path)) == before


def test_benchmark_runs_every_command_on_its_pairs(tmp_path):
    output = tmp_path / "metadata.json"
    script = SCRIPT.parent / "benchmarks" / "metadata.py"
    flags = ["--pairs", "40", "--large_pairs", "20", "--rounds", "1", "--scratch", str(tmp_path)]
    subprocess.run([sys.executable, script, *flags, "--output", output], check=True)
    rows = json.loads(output.read_text())["rows"]
    counts = [40, 40, 20, 20] if len(os.sched_getaffinity(0)) > 1 else [40, 40, 20]  # workers: 1, and cores
    assert [row["pairs"] for row in rows] == counts and list(tmp_path.iterdir()) == [output]
    assert [row["ratio"] == 1 for row in rows] == [True, False, True, False][: len(counts)]
    assert all(0 < row["cpu_seconds"] for row in rows)
