"""Pair every image of a folder with its caption and write FOLDER/metadata.jsonl for training.

Reads   FOLDER and its sub-folders, as img2dataset's `files` output: 00000/000000001.jpg (or .png, .webp, ...)
        beside 00000/000000001.txt, which holds the caption (or .caption; or .json, with --caption_from_json).
Writes  FOLDER/metadata.jsonl, one {"file_name": "00000/000000001.jpg", "text": "caption"} a line, sorted by
        file_name, and FOLDER/.create_metadata.sha256, by which a later run knows its own file from yours.

Every image is decoded once, and what cannot be used is left out, counted and named by its reason.

    python create_metadata.py --image_path FOLDER

Next: train_text_to_image_qat.py --train_data_dir FOLDER
"""

import argparse
import codecs
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("create_metadata")

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the names that `datasets` looks for
STAMP_NAME = ".create_metadata.sha256"  # "<sha256>  metadata.jsonl": `sha256sum -c` can read it
# Of two images of one stem, the extension that comes first here is taken.
IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .apng .webp .avif .bmp .gif .tif .tiff".split())
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")  # read where pillow-heif is installed
OTHER_IMAGES = ".jxl .jp2 .j2k .jpx .svg .psd .psb .xcf .eps .tga .ico .ppm .pgm .pbm .exr .hdr .dds .pcx .qoi"
CAMERA_RAW = ".raw .dng .cr2 .cr3 .nef .nrw .arw .raf .orf .rw2 .pef .srw"
# Only these decoders are tried: Pillow would hand a file that starts with "%!PS" to Ghostscript, whatever its name.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
# Of two captions of one stem, likewise.
KINDS = (
    dict.fromkeys(IMAGE_EXTENSIONS + HEIF_EXTENSIONS, "image")
    | dict.fromkeys([*OTHER_IMAGES.split(), *CAMERA_RAW.split()], "unread")
    | {".txt": "caption", ".caption": "caption", ".json": "json"}
)
# How files begin that Pillow does not read under whatever name; each a regular expression.
SIGNATURES = {
    rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)": "HEIC",
    rb"....ftypavi[fs]": "AVIF",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JXL",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JP2",
    rb"8BPS": "PSD",
    rb"%!PS": "EPS",
    rb"II\*\0|MM\0\*": "damaged TIFF, or of a rare kind",
    rb"(<\?xml.*|\s*)<svg": "SVG",
}
READABLE = rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP"  # a file that begins so, and does not decode, is damaged
LFS_START = "version https://git-lfs"
# Pillow's limits of 1 MiB for one compressed text or color profile of a PNG, and 64 MiB for all text, are too low for
# the workflows that some programs keep there. These still bound what a decompression bomb takes.
MAX_PNG_TEXT, MAX_PNG_TEXTS = 64 << 20, 128 << 20  # bytes
MAX_CAPTION_BYTES = 1 << 20  # a .txt that is larger is no caption
CAPTION_KEYS = {"caption", "text"}  # of a .json
PAIRS_PER_TASK = 16
MIN_EDGE, MAX_ASPECT = 16, 8  # pixels, and long edge / short edge; images beyond them are kept, and remarked on

TRAIN, STREAM = "train_text_to_image_qat.py", "--streaming --max_train_steps N --train_data_dir"
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # that may hold the captions of many images

# Why something is left out.
NO_CAPTION = "image without a caption file"
ONLY_JSON = "image without .txt or .caption, but with a .json (--caption_from_json reads it)"
NO_IMAGE = "caption file without an image"
SECOND_IMAGE = "second image of one stem"
SECOND_CAPTION = "second caption file of one stem"
EMPTY_CAPTION = "empty caption (--keep_empty keeps it)"
NOT_TEXT = "caption that is not text (NUL bytes, or over 1 MiB: save it as UTF-8)"
BAD_JSON = ".json that is no JSON"
NO_KEY = 'empty caption: .json without "caption" or "text" (--keep_empty keeps the pair)'
ODD_JSON = ".json whose caption is no text: "  # and its type
UNREADABLE = "file or folder that cannot be read (permission, disk error)"
ZERO_BYTES = "image of zero bytes"
NOT_AN_IMAGE = "not an image, whatever its extension says"
DAMAGED = "truncated or damaged image"
LFS_POINTER = "Git LFS pointer in the place of an image or caption (git lfs pull gets it)"
MUCH_TEXT = (
    f"PNG with over {MAX_PNG_TEXT >> 20} MiB in one text, or {MAX_PNG_TEXTS >> 20} in all (save it without its text)"
)
TOO_LARGE = "image above Pillow's limit of 89 megapixels (decompression bomb, or to be scaled down)"
LINK_OUT = "symlink leading out of the folder (`datasets` refuses it: copy the file)"
LINK_BROKEN = "symlink leading nowhere or to itself"
LINK_FOLDER = "symlink to a folder inside this one (not followed: it would count twice or loop)"
BAD_NAME = "name with a backslash or with bytes that are not UTF-8 (rename it)"
HIDDEN = "hidden image or folder (its name starts with a dot)"
# What is said about something that is not left out.
ANSI = "caption was not UTF-8 and has been read as Windows-1252"
OTHER_SPELLING = "caption file whose name differs in letter case, Unicode form or ending (as NAME.jpg.txt): used"
DOT_CAPTION = "caption read from NAME.caption, as there is no NAME.txt"
SEVERAL_LINES = {
    "first": "caption of several lines: the first is used (--multiline join or random)",
    "join": "caption of several lines: joined into one (--multiline first or random)",
    "random": "caption of several lines: all are written, and training draws one (--multiline first or join)",
}
SEVERAL_CAPTIONS = "several captions in a .json: all are written, and training draws one"
ONE_IN_CSV = "several captions in a .json: the first is used, as a csv holds one (--format jsonl holds all)"
FRAMES = "image of several frames, of which training sees the first"
DAMAGED_EXIF = "image with damaged EXIF data: used, perhaps not turned upright"
ODD_SHAPE = f"image under {MIN_EDGE} pixels, or over {MAX_ASPECT} times as long as wide: of little use to training"
NESTED = "metadata file in a sub-folder: `datasets` would add its rows to these, move it away"


Text = str | list[str]  # of several captions of one image, training draws one


class Pair(NamedTuple):
    image: str  # both relative to the folder, with forward slashes
    caption: str  # .txt, .caption or .json


class Row(NamedTuple):
    file_name: str
    text: Text


CheckResult = tuple[Text | None, list[str]]  # None: the pair is left out, and the one remark is the reason


class LeftOut(Exception):
    """The pair cannot be used; the message is the reason."""


class Digits(str):
    """A number of a .json as it stands there: 1984 stays the text "1984"."""


def unread(image_format: str) -> str:
    remedy = "convert it to JPEG or PNG"
    if f".{image_format.lower()}" in HEIF_EXTENSIONS:
        remedy = f"pip install pillow-heif, or {remedy}"
    return f"image in a format that is not read ({image_format}: {remedy})"


class Reasons:
    """Counts by reason, with the first few names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        names = self.names[reason]
        if len(names) < 3 or name < names[-1]:
            self.names[reason] = sorted([*names, name])[:3]

    def lines(self) -> list[str]:
        return [
            f"{count:>9,}  {reason}: {', '.join(map(repr, self.names[reason]))}{', ...' if count > 3 else ''}"
            for reason, count in self.counts.most_common()
        ]


# ----------------------------------------------------------------------------------------------- arguments


class UsageError(Exception):
    """What the user gave cannot work; the message is one line that names it and the remedy. Exit code 2."""


def fail(message: str) -> NoReturn:
    raise UsageError(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line, without argparse's usage text before it
    parser.add_argument("--debug", action="store_true", help="show the traceback with an error")
    add = parser.add_argument_group("what is read").add_argument
    add("-p", "--image_path", type=os.path.expanduser, required=True, metavar="FOLDER", help="images and captions")
    text = 'where .txt and .caption are missing, use "caption" or else "text" of the .json; of a list, all are kept'
    add("--caption_from_json", action="store_true", help=text)
    text = "of captions of several lines: the first, all joined by spaces (default), or a list that training draws from"
    add("--multiline", choices=tuple(SEVERAL_LINES), default="join", help=text)
    add("--keep_empty", action="store_true", help='keep pairs with an empty caption, as "text": ""')
    add("--max_samples", type=int, metavar="N", help="stop after N pairs (in the order of the file names)")
    add = parser.add_argument_group("verification").add_argument
    add("--no_verify", action="store_true", help="do not decode the images: faster, but training meets the bad ones")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--num_workers", type=int, default=cores, metavar="N", help="processes that decode (default: every core)")
    add = parser.add_argument_group("what is written").add_argument
    add("--format", choices=("jsonl", "csv"), default="jsonl", help='a csv cannot keep captions like "NA" as text')
    add("--overwrite", action="store_true", help="replace metadata that this script did not write, or that was edited")
    args = parser.parse_args(argv)

    folder = args.image_path
    if not os.path.isdir(folder):
        parser.error(f"--image_path {folder!r} {instead_of_folder(folder)}")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        parser.error(f"--image_path {folder!r} is not readable and writable: metadata goes there, change its rights")
    if args.max_samples is not None and args.max_samples < 1:
        parser.error(f"--max_samples {args.max_samples} must be at least 1: leave it away for all pairs")
    if args.multiline == "random" and args.format == "csv":
        parser.error("--multiline random writes lists, which no csv can hold: use --format jsonl, or --multiline first")
    if args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers} must be at least 1: leave it away for every core")
    for name in METADATA_NAMES:
        problem = foreign_metadata(Path(folder, name), args.overwrite)
        if problem:
            parser.error(f"{os.path.join(folder, name)!r} {problem}")
    return args


def instead_of_folder(path: str) -> str:
    """What is wrong with a path that is no folder, and what to do with it."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.args[-1]})"
        return f"{problem}: pass a folder on this machine (a dataset of the Hub goes to {TRAIN} --dataset_name)"
    folder, name = os.path.split(path)
    extension = os.path.splitext(name)[1].lower()
    if extension == ".tar":
        return f"is not a folder but a tar: unpack it, or train on it as it is: {command(STREAM, folder)}"
    if extension in ARCHIVES:
        return "is not a folder but an archive: unpack it, and pass the folder that it makes"
    if extension in (*TABLES, ".arrow"):
        return f"is not a folder, and needs no metadata: {command('--train_data_dir', path)} reads it"
    return f"is not a folder: pass the one that holds the images and captions, perhaps {os.path.normpath(folder)!r}"


def command(flags: str, path: str) -> str:
    return f"{TRAIN} {flags} {shlex.quote(os.path.normpath(path))}"


def foreign_metadata(path: Path, overwrite: bool) -> str | None:
    """What to do with a file that this script did not write as it is."""
    if path.is_dir() and not path.is_symlink():
        return "is a folder, where metadata would be written: move it away"
    if overwrite or not os.path.lexists(path) or ours(path):
        return None
    stamp = path.with_name(STAMP_NAME)
    edited = stamp.is_file() and stamp.read_text(errors="replace").rstrip().endswith(f"  {path.name}")
    whose = "was edited since this script wrote it" if edited else "was not written by this script"
    reads = command("--train_data_dir", str(path.parent))
    return f"{whose}: {reads} reads it as it is; to replace it by a new one, pass --overwrite"


def stamp_line(metadata: Path) -> str:
    with open(metadata, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {metadata.name}\n"


def ours(metadata: Path) -> bool:
    """True if the file still is, byte for byte, what this script wrote: captions edited by hand are not lost."""
    stamp = metadata.with_name(STAMP_NAME)
    try:
        return metadata.is_file() and stamp.is_file() and stamp.read_bytes() == stamp_line(metadata).encode()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ walk and pair


def find_pairs(args: argparse.Namespace, left_out: Reasons, remarks: Reasons) -> list[Pair]:
    """Every image with its caption file, sorted by file name; nothing is opened yet."""
    others = Reasons()  # files that are no part of a pair, by extension
    files, bad_links = find_files(args, left_out, remarks, others)
    images, captions, jsons = files["image"], files["caption"], files["json"]
    extensions = list(KINDS)

    def choose(names: list[str], reason: str) -> str:
        if len(names) > 1:  # of several, the same one whatever order the disk lists them in
            names.sort(key=lambda name: (name in bad_links, extensions.index(os.path.splitext(name)[1].lower()), name))
        for name in names[1:]:
            left_out.add(reason, name)
        return names[0]

    for stem in jsons.keys() - images.keys():
        others.add(".json", jsons.pop(stem)[0])
    chosen = {stem: choose(names, SECOND_IMAGE) for stem, names in images.items()}
    for stem, other in other_spellings(chosen, captions):
        captions[stem] = captions.pop(other)
        remarks.add(OTHER_SPELLING, captions[stem][0])
    pairs: list[Pair] = []
    for stem, image in chosen.items():
        told = captions.pop(stem, None) or (jsons.get(stem) if args.caption_from_json else None)
        caption = choose(told, SECOND_CAPTION) if told else ""
        missing = ONLY_JSON if stem in jsons else NO_CAPTION
        reason = bad_links.get(image) or name_problem(image) or (bad_links.get(caption) if caption else missing)
        if reason:
            left_out.add(reason, image)
        else:
            pairs.append(Pair(image, caption))
    for stem, names in files["unread"].items():
        captions.pop(stem, None)  # that one has its image
        for name in names:
            left_out.add(bad_links.get(name) or unread(name[name.rindex(".") + 1 :].upper()), name)
    for names in captions.values():
        for name in names:
            left_out.add(NO_IMAGE, name)
    if not pairs:
        fail_without_pairs(args, left_out, others)
    return sorted(pairs)


def other_spellings(images: dict[str, str], captions: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(stem of an image, stem of its caption) where neither has a file of exactly its name, and no other fits.

    macOS and Windows take names that differ in letter case or Unicode form only for the same.
    """
    told, takers = defaultdict(list), defaultdict(list)
    for caption in captions:
        if caption not in images:
            told[same_spelling(caption)].append(caption)
    for stem, image in images.items():
        if stem not in captions:
            found = told[same_spelling(stem)] + told[same_spelling(image)]  # the latter where it is NAME.jpg.txt
            for caption in found if len(found) == 1 else []:
                takers[caption].append(stem)
    return [(stems[0], caption) for caption, stems in takers.items() if len(stems) == 1]


def same_spelling(name: str) -> str:
    """Equal for names that differ in letter case or Unicode form only."""
    return unicodedata.normalize("NFC", name).casefold()


def find_files(
    args: argparse.Namespace, left_out: Reasons, remarks: Reasons, others: Reasons
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """{kind: {stem: names}} and {name: what is wrong with that symlink}; stems and names are relative."""
    from tqdm import tqdm

    real_root = os.path.join(os.path.realpath(args.image_path), "")
    kinds: dict[str, str | None] = dict(KINDS)
    if find_spec("pillow_heif") is None:
        kinds.update(dict.fromkeys(HEIF_EXTENSIONS, "unread"))
    files: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS.values()}
    bad_links: dict[str, str] = {}
    folders = [""]  # grows while it is read: "", "00000/", "00000/deeper/"
    entries = scan(args.image_path, folders, left_out)
    for prefix, entry in tqdm(entries, desc="finding", unit=" files", leave=False, disable=None):
        name = prefix + entry.name
        stem, dot, extension = name.rpartition(".")
        kind = kinds.get(dot + extension.lower())
        problem = link_problem(entry.path, real_root) if entry.is_symlink() else None
        is_folder = not problem and entry.is_dir()  # scandir knows: no stat
        if entry.name.startswith("."):
            if is_folder or kind == "image":
                left_out.add(HIDDEN, name)
        elif is_folder:
            folders.append(name + "/")
        elif kind and (problem or entry.is_file()):
            files[kind].setdefault(stem, []).append(name)
            if problem:
                bad_links[name] = problem
        elif problem and not os.path.isfile(entry.path):
            left_out.add(problem, name)
        else:
            if prefix and entry.name in METADATA_NAMES:
                remarks.add(NESTED, name)
            others.add("metadata" if entry.name in METADATA_NAMES else os.path.splitext(name)[1].lower(), name)
    return files, bad_links


def scan(root: str, folders: list[str], left_out: Reasons) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry of `folders`, to which the caller adds the sub-folders that it wants to see."""
    for prefix in folders:
        try:
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    yield prefix, entry
        except OSError:
            left_out.add(UNREADABLE, prefix or root)


def link_problem(path: str, real_root: str) -> str | None:
    target = os.path.realpath(path)
    if not os.path.exists(target):
        return LINK_BROKEN
    if not os.path.join(target, "").startswith(real_root):
        return LINK_OUT
    return LINK_FOLDER if os.path.isdir(target) else None


def name_problem(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 arrive from scandir as lone surrogates
        return BAD_NAME
    return BAD_NAME if "\\" in name else None  # `datasets` takes it for a slash


# ------------------------------------------------------------------------------- where no pair can be used


def fail_without_pairs(args: argparse.Namespace, left_out: Reasons, others: Reasons) -> NoReturn:
    message = f"no usable pair in --image_path {args.image_path!r}"
    reasons = [f"{count:,} {reason}: {left_out.names[reason][0]!r}" for reason, count in left_out.counts.most_common(3)]
    if reasons:
        message += f" (left out: {'; '.join(reasons)})"
    fail(message + remedy(args, left_out, others))


def remedy(args: argparse.Namespace, left_out: Reasons, others: Reasons) -> str:
    """By what the folder holds, and by what most images were left out for."""
    if others.counts[".tar"]:
        count, name = others.counts[".tar"], others.names[".tar"][0]
        reads = command(STREAM, os.path.join(args.image_path, os.path.dirname(name)))
        return f": {reads} reads its {count:,} .tar files as they are; or unpack them"
    counts = {reason: count for reason, count in left_out.counts.items() if reason not in (NO_IMAGE, HIDDEN)}
    reason = max(counts, key=counts.__getitem__, default=NO_IMAGE)
    if reason == NO_IMAGE:
        return f": {without_images(args.image_path, others)}"
    if reason == NO_CAPTION:
        return f": {without_captions(args, left_out, others)}"
    if reason == BAD_JSON or reason.startswith((ODD_JSON, NO_KEY)):
        return ': a .json must hold {"caption": "text"}; or put the caption into NAME.txt'
    if reason in (NOT_AN_IMAGE, DAMAGED, ZERO_BYTES):
        return ": these files are no images, or not whole: get them again"
    return ""  # the reason itself says what helps


def without_images(folder: str, others: Reasons) -> str:
    if others.counts[".arrow"] or others.counts[".parquet"]:
        reads = command("--dataset_name", folder)
        return f"it holds a dataset: {reads} reads the images in it; those of URLs, img2dataset downloads"
    archives = [name for extension in ARCHIVES for name in others.names[extension]]
    if archives:
        return f"unpack {archives[0]!r} first"
    kinds = [f"{count:,} {kind or 'without an extension'}"[:40] for kind, count in others.counts.most_common(5)]
    found = f"no image was found, but {', '.join(kinds)}" if kinds else "no image was found"
    return f"{found}: pass the folder of NAME.jpg (or {' '.join(IMAGE_EXTENSIONS[1:])}) with NAME.txt beside each"


def without_captions(args: argparse.Namespace, left_out: Reasons, others: Reasons) -> str:
    folder, image, alone = args.image_path, left_out.names[NO_CAPTION][0], left_out.names[NO_IMAGE]
    if others.counts["metadata"]:
        subfolder, name = os.path.split(others.names["metadata"][0])
        reads = command("--train_data_dir", os.path.join(folder, subfolder))
        return f"its captions are in {os.path.join(subfolder, name)!r}: {reads} reads them as they are"
    if left_out.counts[NO_IMAGE] > 1:
        own = os.path.splitext(image)[0] + ".txt"
        return f"the caption of {image!r} belongs into {own!r}: move or rename {alone[0]!r} and the others"
    tables = [name for extension in TABLES for name in others.names[extension]] + alone
    if tables:
        reads = command("--train_data_dir", os.path.join(folder, tables[0]))
        return f"if {tables[0]!r} holds the captions, by a file_name from its folder on: {reads} reads it"
    beside = "NAME.jpg needs its caption in NAME.txt beside it (or in NAME.json, with --caption_from_json)"
    if all("/" in name for name in left_out.names[NO_CAPTION]):
        reads = command("--dataset_name", folder)
        return f"{beside}; or, if the folders' names are the captions, train with {reads} --caption_column label"
    return beside


# ----------------------------------------------------------------------------------- captions and decoding


def check_pairs(pairs: list[Pair], args: argparse.Namespace, left_out: Reasons, remarks: Reasons) -> list[Row]:
    """Those pairs that can be used, in their order."""
    from tqdm import tqdm

    rows: list[Row] = []
    check = functools.partial(check_pair, args)
    results = in_order(check, pairs, 1 if args.no_verify else args.num_workers)
    with closing(results), tqdm(desc="checking", total=len(pairs), unit=" pairs", leave=False, disable=None) as bar:
        for pair, (text, found) in zip(pairs, results):
            for remark in found:
                (left_out if text is None else remarks).add(remark, pair.image)
            if text is not None:
                rows.append(Row(pair.image, text))
                if len(rows) == args.max_samples:
                    break
            bar.update()
    if not rows:
        fail_without_pairs(args, left_out, Reasons())
    return rows


def in_order(check: Callable[[Pair], CheckResult], pairs: list[Pair], num_workers: int) -> Iterator[CheckResult]:
    """check(pair) for every pair, by `num_workers` processes; a few pairs are not worth starting one."""
    num_workers = min(num_workers, -(-len(pairs) // PAIRS_PER_TASK))
    if num_workers < 2:
        yield from map(check, pairs)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # Not multiprocessing.Pool: that one waits for ever for a worker that was killed for want of memory.
    executor = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=end_with_parent)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: Ctrl-C is the main process's
    try:
        results = executor.map(check, pairs, chunksize=PAIRS_PER_TASK)
        signal.signal(signal.SIGINT, handler)
        yield from results
    except (BrokenProcessPool, OSError) as error:  # OSError: the system starts no more processes
        raise UsageError(
            f"--num_workers {num_workers}: a decoding process died or did not start, probably for want of memory: "
            "use a smaller number, or --no_verify"
        ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
        executor.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End with the main process, however that ends."""
    from multiprocessing import parent_process

    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def check_pair(args: argparse.Namespace, pair: Pair) -> CheckResult:
    remarks: list[str] = []
    try:
        text = read_caption(args, pair.caption, remarks)
    except LeftOut as reason:
        return None, [str(reason)]
    problem = None if args.no_verify else image_problem(f"{args.image_path}/{pair.image}", remarks)
    return (None, [problem]) if problem else (text, remarks)


def read_caption(args: argparse.Namespace, name: str, remarks: list[str]) -> Text:
    """What is written as "text" for this caption file; to `remarks` is added what there is to say of it."""
    content = read_text(f"{args.image_path}/{name}", remarks)
    extension = name[name.rindex(".") :].lower()
    captions = [content] if extension != ".json" else captions_of_json(content, args.keep_empty)
    # splitlines also splits at U+2028 and U+0085; where a caption is blank, nothing is left of it
    told = [lines for caption in captions if (lines := list(filter(None, map(str.strip, caption.splitlines()))))]
    if extension == ".caption":
        remarks.append(DOT_CAPTION)
    if any(len(lines) > 1 for lines in told):
        remarks.append(SEVERAL_LINES[args.multiline])
    if len(told) > 1:
        remarks.append(ONE_IN_CSV if args.format == "csv" else SEVERAL_CAPTIONS)
        told = told[:1] if args.format == "csv" else told
    if args.multiline == "random":
        texts = [line for lines in told for line in lines]
    else:
        texts = [lines[0] if args.multiline == "first" else " ".join(lines) for lines in told]
    if not texts and not args.keep_empty:
        raise LeftOut(EMPTY_CAPTION)
    return texts if len(texts) > 1 else "".join(texts)


def read_text(path: str, remarks: list[str]) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(4096)
            if len(data) == 4096:  # rare: asked for a MiB at once, Python would make room for it every time
                data += file.read(MAX_CAPTION_BYTES + 1 - 4096)
    except OSError:
        raise LeftOut(UNREADABLE) from None
    text, remark = decode(data)
    if len(data) > MAX_CAPTION_BYTES or "\0" in text:
        raise LeftOut(NOT_TEXT)
    if text.startswith(LFS_START):  # it would be trained on, word by word
        raise LeftOut(LFS_POINTER)
    remarks += [remark] if remark else []
    return text


def decode(data: bytes) -> tuple[str, str | None]:
    """The text, and a remark if it had to be guessed: UTF-8, UTF-16 by its mark, else what Windows calls ANSI."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding, remark in (("utf-16" if utf16 else "utf-8-sig", None), ("cp1252", ANSI)):
        with suppress(UnicodeDecodeError):
            return data.decode(encoding), remark
    return data.decode("latin-1"), ANSI


def captions_of_json(text: str, keep_empty: bool) -> list[str]:
    try:
        value = json.loads(text, parse_int=Digits, parse_float=Digits, parse_constant=lambda _: None)  # NaN: missing
        if isinstance(value, dict) and not CAPTION_KEYS & value.keys():
            if not keep_empty:
                raise LeftOut(NO_KEY)
            value = None
        captions = captions_of(value)
    except TypeError as error:
        raise LeftOut(f"{ODD_JSON}{error}") from None
    except (ValueError, RecursionError):
        raise LeftOut(BAD_JSON) from None
    if any("\0" in caption for caption in captions):
        raise LeftOut(NOT_TEXT)
    # JSON can spell half a surrogate pair, which no UTF-8 file can hold
    return [caption.encode("utf-8", "replace").decode() for caption in captions]


def captions_of(value: object) -> list[str]:
    """The captions in what a .json gives for one: none if it is missing, several if it is a list, one of an object.

    Raises:
        TypeError: it holds no text; the message is what it is instead.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if any(isinstance(item, Digits) for item in value):
            raise TypeError("list of number")
        return [caption for item in value for caption in captions_of(item)]
    if isinstance(value, dict) and CAPTION_KEYS & value.keys():
        caption = value.get("caption")
        return captions_of(value.get("text") if caption is None else caption)
    raise TypeError(type(value).__name__)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The decoders to try, in this order. The first call in each process sets Pillow up."""
    from PIL import PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT, MAX_PNG_TEXTS
    try:
        import pillow_heif
    except ImportError:
        return IMAGE_FORMATS
    pillow_heif.register_heif_opener()
    return (*IMAGE_FORMATS, "HEIF")  # after AVIF, some of whose files it would take for its own


def image_problem(path: str, remarks: list[str]) -> str | None:
    """Why Pillow cannot make an RGB image of the file, or None if it can; what is odd about it goes to `remarks`."""
    from PIL import Image

    try:
        file = open(path, "rb")
    except OSError:
        return UNREADABLE
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=image_formats()) as image:
                size, has_frames = image.size, getattr(image, "is_animated", False)
                image.draft(None, (1, 1))  # JPEG: decodes every byte, but computes an eighth of the rows and columns
                image.load()
                damaged_exif = not turn_upright(image)
                if image.mode != "RGB":
                    image.convert("RGB")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return TOO_LARGE
        except Exception as error:  # Pillow's decoders raise about ten kinds
            return decoding_problem(file, error)
    odd_shape = min(size) < MIN_EDGE or max(size) > MAX_ASPECT * min(size)
    remarks += [FRAMES] * has_frames + [DAMAGED_EXIF] * damaged_exif + [ODD_SHAPE] * odd_shape
    return None


def turn_upright(image: "Image.Image") -> bool:
    """As training does. False if the EXIF data cannot be read: the pixels can, and viewers show them."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # struct.error, SyntaxError, TypeError, ...
        return False
    return True


def decoding_problem(file: BinaryIO, error: Exception) -> str:
    """Why the file could not be decoded, by its first bytes: what is in it may not be what its name says."""
    from PIL import UnidentifiedImageError, features

    if "MAX_TEXT" in str(error):
        return MUCH_TEXT
    try:
        file.seek(0)
        head = file.read(512)
    except OSError:
        return UNREADABLE
    if not head:
        return ZERO_BYTES
    if head.startswith(LFS_START.encode()):
        return LFS_POINTER
    if not isinstance(error, UnidentifiedImageError) or re.match(READABLE, head, re.DOTALL):
        return DAMAGED
    for signature, image_format in SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            heif, avif = image_format == "HEIC" and "HEIF" in image_formats(), image_format == "AVIF"
            return DAMAGED if heif or avif and features.check("avif") else unread(image_format)
    return NOT_AN_IMAGE


# -------------------------------------------------------------------------------------- writing and report


def write_metadata(rows: list[Row], args: argparse.Namespace) -> Path:
    """Replace the metadata file in one step, then remove those of other formats: `datasets` refuses two."""
    path = Path(args.image_path, f"metadata.{args.format}")
    if any(isinstance(row.text, list) for row in rows):  # then all are: `datasets` wants a column of one type
        rows = [Row(name, [text] if isinstance(text, str) else text) for name, text in rows]
    write_atomically(path, map(jsonl_line, rows) if args.format == "jsonl" else csv_lines(rows))
    for other in map(path.with_name, METADATA_NAMES):
        if other != path and os.path.lexists(other):
            other.unlink()
            logger.warning("%s deleted: `datasets` refuses two metadata files", other)
    write_atomically(path.with_name(STAMP_NAME), [stamp_line(path)])
    return path


def jsonl_line(row: Row) -> str:
    line = json.dumps(row._asdict(), ensure_ascii=False)
    # a name with U+2028: readers that use splitlines() would cut the row in two
    return (line if len(line.splitlines()) == 1 else json.dumps(row._asdict())) + "\n"


def csv_lines(rows: list[Row]) -> Iterator[str]:
    yield "file_name,text\n"
    for row in rows:
        yield ",".join('"' + field.replace('"', '""') + '"' for field in row) + "\n"


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write beside `path` and rename: at every moment there is the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "x", encoding="utf-8", newline="") as file:  # "x" does not write through a symlink
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise


def report(path: Path, num_rows: int, args: argparse.Namespace, left_out: Reasons, remarks: Reasons) -> None:
    if left_out.counts:
        logger.info("left out:\n%s", "\n".join(left_out.lines()))
    if remarks.counts:
        logger.warning("please note:\n%s", "\n".join(remarks.lines()))
    if args.format == "csv":
        logger.warning('please note: `datasets` reads no "null", "NA" or "1984" of a csv as text; jsonl keeps them')
    if num_rows == args.max_samples:
        logger.info("stopped at --max_samples %d: later pairs have not been looked at", num_rows)
    verified = "images not decoded (--no_verify)" if args.no_verify else "every image decoded"
    logger.info("%s pairs written to %s, %s", f"{num_rows:,}", path, verified)
    logger.info(
        "next: accelerate launch train_text_to_image_qat.py --pretrained_model_name_or_path MODEL --train_data_dir %s",
        shlex.quote(args.image_path),
    )


# ---------------------------------------------------------------------------------------------------- main


def run(argv: list[str] | None) -> None:
    args = parse_args(argv)
    left_out, remarks = Reasons(), Reasons()
    try:
        pairs = find_pairs(args, left_out, remarks)  # image and caption files, by stem
        rows = check_pairs(pairs, args, left_out, remarks)  # captions read, images decoded
        path = write_metadata(rows, args)  # metadata.jsonl
    except OSError as error:
        raise UsageError(
            f"{error}: check the disk, its free space and the rights of --image_path {args.image_path!r}"
        ) from error
    report(path, len(rows), args, left_out, remarks)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(argv)
    except KeyboardInterrupt:
        logger.error("interrupted: nothing written")
        raise SystemExit(130) from None
    except UsageError as error:
        if "--debug" in (sys.argv if argv is None else argv):  # args do not exist if the error is one of theirs
            traceback.print_exc()
        message = " ".join(str(error).splitlines())  # argparse quotes arguments as they came
        sys.stderr.write(f"create_metadata.py: error: {message}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
