"""Every kind of dirt that folders of images and captions were seen to hold, a case at a time or all together."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import create_metadata as cm

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIZE = (24, 16)


@dataclass
class Case:
    """Some files, and what must become of them."""

    name: str
    write: Callable[[Path], None]
    rows: dict[str, str] = field(default_factory=dict)  # of metadata.jsonl: file_name -> caption
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> count
    remarks: dict[str, int] = field(default_factory=dict)
    color: tuple[int, int, int] | None = None  # of the top left corner, as training sees it


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, color, kind: str = "PNG", size: tuple[int, int] = SIZE, **options) -> bytes:
    return encoded(Image.new(mode, size, color), kind, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: tuple[bytes, bytes], at_end: bool = False) -> bytes:
    """GOOD with these chunks before its pixels, or after them."""
    position = GOOD.index(b"IEND") - 4 if at_end else 33  # 33: after the header
    return GOOD[:position] + b"".join(png_chunk(*chunk) for chunk in chunks) + GOOD[position:]


def huge_png(side: int) -> bytes:
    """A few bytes that claim side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def ftyp(brand: bytes) -> bytes:
    """The start of a HEIC, AVIF or MP4 file, and no image."""
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand + b"x" * 500


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pair_writer(image: str, data: bytes, caption: bytes | str | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        put(folder / image, data)
        if caption is not None:
            put(folder / f"{os.path.splitext(image)[0]}.txt", caption)

    return write


def kept(image: str, data: bytes, caption: bytes | str = "a caption", text: str | None = None, **expected) -> Case:
    rows = {image: text if text is not None else str(caption)}
    return Case(image, pair_writer(image, data, caption), rows, **expected)


def spoilt(image: str, data: bytes, reason: str, caption: bytes | str | None = "a caption") -> Case:
    return Case(image, pair_writer(image, data, caption), left_out={reason: 1})


GOOD = flat("RGB", RED)
JPEG = encoded(Image.effect_noise((64, 48), 60).convert("RGB"), "JPEG")


def images() -> list[Case]:
    wide = Image.new("RGB", SIZE, RED)
    wide.paste(BLUE, (12, 0, 24, 16))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    transparent = Image.new("P", SIZE, 1)
    transparent.putpalette([0, 0, 0, *RED])
    second = [Image.new("RGB", SIZE, BLUE)]
    several = {"save_all": True, "append_images": second}
    levels = ((40000, np.uint16), (200, np.uint16), (100, np.float32))
    grey = [Image.fromarray(np.full(SIZE[::-1], level, kind)) for level, kind in levels]
    white, frames, odd = (255, 255, 255), {cm.FRAMES: 1}, {cm.ODD_SHAPE: 1}
    return [
        kept("good.png", GOOD, color=RED),
        kept("cmyk.jpg", flat("CMYK", (0, 255, 255, 0), "JPEG"), color=RED),
        kept("palette.png", encoded(transparent, "PNG"), color=RED),
        kept("palette transparent.png", encoded(transparent, "PNG", transparency=1), color=white),
        kept("palette transparent.gif", encoded(transparent, "GIF", transparency=1), color=white),
        kept("la.png", flat("LA", (0, 128)), color=(127, 127, 127)),
        kept("rgba clear.png", flat("RGBA", (*RED, 0)), color=white),
        kept("rgba half.webp", flat("RGBA", (*RED, 128), "WEBP", lossless=True), color=(255, 127, 127)),
        kept("one bit.png", flat("1", 1), color=white),
        kept("grey 16 bit.png", encoded(grey[0], "PNG"), color=(155, 155, 155)),
        kept("grey 16 bit, dark.png", encoded(grey[1], "PNG"), color=(0, 0, 0)),
        kept("grey 32 bit.tiff", encoded(grey[2], "TIFF"), color=(100, 100, 100)),
        kept("exif.jpg", encoded(wide, "JPEG", exif=upside_down), color=BLUE),
        kept("animated.gif", encoded(wide, "GIF", **several), color=RED, remarks=frames),
        kept("animated.webp", encoded(wide, "WEBP", lossless=True, **several), color=RED, remarks=frames),
        kept("1x1.png", flat("RGB", BLUE, size=(1, 1)), color=BLUE, remarks=odd),
        kept("12000x40.jpg", flat("RGB", BLUE, "JPEG", (12000, 40)), color=BLUE, remarks=odd),
        kept("really a png.jpg", GOOD, color=RED),
        spoilt("truncated.jpg", JPEG[: len(JPEG) // 2], cm.DAMAGED),
        spoilt("text.jpg", b"no image\n" * 50, cm.NOT_AN_IMAGE),
        spoilt("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", cm.unread("EPS")),
        spoilt("new.jxl", b"\xff\x0a" + b"x" * 99, cm.unread("JXL")),
        spoilt("drawing.svg", b"<svg/>", cm.unread("SVG")),
        spoilt("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", cm.LFS_POINTER),
        spoilt("zero bytes.jpg", b"", cm.ZERO_BYTES),
        spoilt("bomb.png", huge_png(60_000), cm.TOO_LARGE),
    ]


def burdened() -> list[Case]:
    """Sound images with more text, or worse EXIF data, than Pillow takes by itself."""
    workflow = zlib.compress(b"a node of a workflow " * 200_000)  # 4 MB
    turned, odd_resolution = (0x0112, 3, 1, b"\0\6\0\0"), (0x011A, 2, 3, b"72\0\0")  # text, where a number belongs
    pngs = {
        "zTXt": png_with((b"zTXt", b"workflow\0\0" + workflow)),
        "iTXt": png_with((b"iTXt", b"workflow\0\1\0\0\0" + workflow)),
        "after the pixels": png_with((b"zTXt", b"workflow\0\0" + workflow), at_end=True),
        "much plain text": png_with(*[(b"tEXt", b"prompt\0" + b"x" * 5_000_000)] * 15),
        "large color profile": png_with((b"iCCP", b"printer\0\0" + workflow)),
        "broken color profile": png_with((b"iCCP", b"printer\0\0no zlib")),
    }
    spoilt_exif = {
        "exif is none.png": png_with((b"eXIf", b"garbage")),
        "exif in hex is none.png": png_with((b"tEXt", b"Raw profile type exif\0\nexif\n  9\nzzzz")),
        "exif with an odd tag.jpg": flat("RGB", RED, "JPEG", exif=b"Exif\0\0" + exif(turned, odd_resolution)),
    }
    return [
        *(kept(f"{name}.png", data, color=RED) for name, data in pngs.items()),
        *(kept(name, data, color=RED, remarks={cm.DAMAGED_EXIF: 1}) for name, data in spoilt_exif.items()),
        kept("exif in png.png", png_with((b"eXIf", exif(turned))), color=RED),
    ]


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value of 4 bytes)."""
    entries = b"".join(struct.pack(">HHI4s", *tag) for tag in tags)
    return b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4)


def names() -> list[Case]:
    stems = ["dots.in.the.name.v1.0", " spaces  ", "it's", 'a "quoted" one', "[brackets](2){3}*?", "🐈 猫 é"]
    stems += ["line\nbreak", "separator\u2028inside", "-rf", "percent%20", "sub/folder.v2/x", "$HOME;`id`"]
    upper = Case("upper", lambda folder: (put(folder / "UP.PNG", GOOD), put(folder / "UP.TXT", "c")), {"UP.PNG": "c"})
    undecodable = Case("bytes", write_undecodable_name, left_out={cm.BAD_NAME: 1})
    return [
        *(kept(f"{stem}.png", GOOD) for stem in stems),
        upper,
        undecodable,
        spoilt("back\\slash.png", GOOD, cm.BAD_NAME),
        spoilt(".hidden.png", GOOD, cm.HIDDEN),
    ]


def write_undecodable_name(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for extension in (b".png", b".txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9" + extension)).write_bytes(GOOD)


def captions() -> list[Case]:
    same = ["null", "NA", "None", "1984", "true", "nan", "x" * 5000, 'say "hi", a\\b', "\x07bell", "=1+1", "🐈\u200d⬛"]
    other = {
        "crlf": (b"one line\r\n\r\n", "one line"),
        "bom": (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),
        "utf-16": ("猫".encode("utf-16"), "猫"),
        "utf-16 be": (b"\xfe\xff" + "猫".encode("utf-16-be"), "猫"),
    }
    lines = {cm.SEVERAL_LINES["join"]: 1}

    def dot_caption(folder: Path) -> None:
        put(folder / "dot.png", GOOD)
        put(folder / "dot.caption", "c")

    return [
        *(kept(f"caption {number}.png", GOOD, caption) for number, caption in enumerate(same)),
        *(kept(f"{name}.png", GOOD, data, text) for name, (data, text) in other.items()),
        kept("lines.png", GOOD, "one\r\ntwo", "one two", remarks=lines),
        kept("u+2028.png", GOOD, "one\u2028two\u0085three", "one two three", remarks=lines),
        Case("dot caption", dot_caption, {"dot.png": "c"}, remarks={cm.DOT_CAPTION: 1}),
        kept("latin-1.png", GOOD, "café".encode("latin-1"), "café", remarks={cm.ANSI: 1}),
        spoilt("empty.png", GOOD, cm.EMPTY_CAPTION, ""),
        spoilt("blank.png", GOOD, cm.EMPTY_CAPTION, b"\xef\xbb\xbf \r\n\t"),
        spoilt("zeros.png", GOOD, cm.NOT_TEXT, b"a\0b"),
        spoilt("megabytes.png", GOOD, cm.NOT_TEXT, b"x" * (cm.MAX_CAPTION_BYTES + 1)),
        spoilt("no txt.png", GOOD, cm.NO_CAPTION, None),
    ]


def folders() -> list[Case]:
    def two_images(folder: Path) -> None:
        pair_writer("twice.jpg", GOOD, "c")(folder)
        put(folder / "twice.png", GOOD)

    def two_captions(folder: Path) -> None:
        pair_writer("twice told.png", GOOD, "lower")(folder)
        put(folder / "twice told.TXT", "upper")

    def links(folder: Path) -> None:
        put(folder / "inner/real.png", GOOD)
        put(folder / "inner/real.txt", "c")
        (folder / "linked.png").symlink_to("inner/real.png")
        put(folder / "linked.txt", "another")
        (folder / "out.png").symlink_to(Path(__file__).resolve())
        put(folder / "out.txt", "c")
        (folder / "itself.png").symlink_to("itself.png")
        put(folder / "itself.txt", "c")
        (folder / "inner/loop").symlink_to("..")

    def unreadable(folder: Path) -> None:
        pair_writer("secret.png", GOOD, "c")(folder)
        (folder / "secret.png").chmod(0)

    def nested(folder: Path) -> None:
        put(folder / "nested/metadata.jsonl", '{"file_name": "../../x.png", "text": "c"}\n')
        put(folder / "nested/metadata.csv", "")

    linked = {"inner/real.png": "c", "linked.png": "another"}
    secret = {"rows": {"secret.png": "c"}} if os.geteuid() == 0 else {"left_out": {cm.UNREADABLE: 1}}
    return [
        Case("no image", lambda folder: put(folder / "alone.txt", "c"), left_out={cm.NO_IMAGE: 1}),
        Case("two images of a stem", two_images, {"twice.jpg": "c"}, {cm.SECOND_IMAGE: 1}),
        Case("two captions of a stem", two_captions, {"twice told.png": "upper"}, {cm.SECOND_CAPTION: 1}),
        Case("links", links, linked, {cm.LINK_OUT: 1, cm.LINK_BROKEN: 1, cm.LINK_FOLDER: 1}),
        Case("unreadable", unreadable, **secret),  # root reads everything
        Case("nested metadata", nested, remarks={cm.NESTED: 2}),
    ]


def cases() -> list[Case]:
    return [*images(), *burdened(), *names(), *captions(), *folders()]


def write_all(folder: Path) -> list[tuple[str, Case]]:
    """Every case in a sub-folder of its own, and that sub-folder's name with a slash."""
    prefixes = [f"{number:05d}/" for number in range(len(cases()))]
    for prefix, case in zip(prefixes, cases()):
        case.write(folder / prefix)
    return list(zip(prefixes, cases()))
