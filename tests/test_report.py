"""report.html of evaluate.py: what it claims, what it holds, and how it behaves in a browser."""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evaluate
import text2images
from browser import CHROMIUM, Browser
from data import folder, noise_images

pytestmark = pytest.mark.usefixtures("empty_hub")
HOSTILE = [
    "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title = 'hacked'\"> <!-- <script> @@DATA@@ @@EMBEDDED@@",
    'it\'s a "quoted" `caption` with $(touch hacked) & \\ backslash; --flags',
    "-c looks like a flag",
    "\U0001f40e\U0001f469\u200d\U0001f680 \u2028 line separators \u2029 \u202eturned around, été 日本",
    "two\nlines",
    "5 kB of words " * 370,
]


def page_of(folders: list[Path], *flags: str) -> Path:
    evaluate.main([*map(str, folders), *flags])
    return folders[-1] / "report.html"


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(
        re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    )


def shifted(count: int, *shifts: int) -> dict[tuple[str, int], np.ndarray]:
    """Images that are the lighter, the more their pair shall differ: by shift[number % len(shifts)] levels."""
    made = noise_images(count)
    return {key: pixels + np.uint8(shifts[number % len(shifts)]) for number, (key, pixels) in enumerate(made.items())}


# ---------------------------------------------------------------- what it claims


@pytest.mark.parametrize(
    ("speed", "size", "psnr", "ciede2000", "expected"),
    [
        (1.94, 0.27, [52, 53], [0.4, 0.9], "int8 is 1.9 times as fast as fp32, a quarter of its size (27 %), and "
         "its images reach a PSNR of 52 dB: no eye sees the difference."),
        (1.04, 0.96, [40, 46], [0.2, 1.0], "int8 is as fast as fp32, as large, and its images reach a PSNR of "
         "43 dB: the difference shows only up close, in 1 of 2 pairs."),
        (0.7, 0.4, [13, 57], [0.2, 51], "int8 takes 1.43 times as long as fp32, is 40 % of its size, and its images "
         "reach a PSNR of 35 dB: 1 of 2 pairs differs visibly, the worst at 13 dB."),
        (12.3, 1.5, [20, 20], [2, 9], "int8 is 12 times as fast as fp32, 150 % of its size, and its images reach a "
         "PSNR of 20 dB: 2 of 2 pairs differ visibly, the worst at 20 dB."),
        (1.06, 0.5, [99, 99], [0, 0], "int8 is 1.06 times as fast as fp32, half of its size (50 %), and generates the "
         "same images, to the bit."),
    ],
)  # fmt: skip
def test_the_sentence_says_what_was_measured(
    speed: float, size: float, psnr: list[float], ciede2000: list[float], expected: str
) -> None:
    assert evaluate.sentence("fp32", "int8", speed, size, {"psnr": psnr, "ciede2000": ciede2000}) == expected


def test_colour_difference_is_that_of_the_worst_square() -> None:
    grey = np.full((64, 64, 3), 119, np.uint8)  # L* = 50.03; one level more is 50.43, 0.40 in CIEDE2000
    assert evaluate.color_difference(grey, grey) == 0
    assert evaluate.color_difference(grey, grey + np.uint8(1)) == pytest.approx(0.40, abs=0.02)
    spot = grey.copy()
    spot[10:12, 20:22] += np.uint8(3)  # a whole square of 2 x 2
    odd = grey.copy()
    odd[10, 20] += np.uint8(3)  # a pixel of it
    assert evaluate.color_difference(grey, spot) == pytest.approx(1.19, abs=0.05)
    assert evaluate.color_difference(grey, odd) == pytest.approx(evaluate.color_difference(grey, spot) / 4)
    assert evaluate.color_difference(grey[:, :50], spot[:, :50]) > 1  # no multiple of the square


def test_a_slower_and_different_folder_is_called_so(tmp_path: Path) -> None:
    reference = folder(tmp_path / "a", noise_images(4), precision="fp32", seconds=1.0, unet_mb=20.0)
    other = folder(tmp_path / "b", shifted(4, 0, 0, 0, 50), seconds=3.0, unet_mb=5.0)
    assert data_of(page_of([reference, other]))["sentences"] == [
        "int8 takes 3.0 times as long as fp32, is a quarter of its size (25 %), and its images reach a PSNR of 78 dB: "
        "1 of 4 pairs differs visibly, the worst at 14 dB."
    ]


# ---------------------------------------------------------------- what it holds


class Tags(HTMLParser):
    """The start tags of a page, and its addresses."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        facts = dict(attributes)
        self.addresses += [facts[name] for name in ("src", "href", "xlink:href", "action", "data") if name in facts]
        if facts.get("http-equiv") == "Content-Security-Policy":
            self.policy = facts["content"]


def hostile_folders(tmp_path: Path) -> list[Path]:
    """fp32 and two others, with captions that would do harm where they are not taken for text."""
    made = [pixels for pixels in noise_images(len(HOSTILE)).values()]
    folders = []
    for name, shift, precision in (
        ("fp32 # 100%", 0, "fp32"),
        ("<b>near<br>", 1, "int8"),
        ("far $x^2$ -->", 9, "bf16"),
    ):
        rows = {(caption, 2**53 + 1): pixels + np.uint8(shift) for caption, pixels in zip(HOSTILE, made)}
        folders.append(
            folder(tmp_path / name, rows, precision=precision, flags=["--pretrained_model_name_or_path=a b"])
        )
    return folders


def test_hostile_captions_and_folders_are_but_text(tmp_path: Path) -> None:
    page = page_of(hostile_folders(tmp_path))
    data = data_of(page)
    assert [pair["caption"] for pair in data["pairs"]] == HOSTILE
    assert {pair["seed"] for pair in data["pairs"]} == {str(2**53 + 1)}
    held = re.search(r'(?s)id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    assert held.isascii() and not set("<>&") & set(held)  # nor anything that could be taken for a line's end
    tags = Tags(page)
    assert tags.tags.count("script") == 2 + 3 * len(HOSTILE) and "img" not in tags.tags
    assert tags.addresses and all(address.startswith(("#", "data:,")) for address in tags.addresses)
    assert tags.policy.startswith("default-src 'none'; img-src data: blob:; ") and "http" not in tags.policy
    encoded = re.search(r'id="image-4-2">([^<]*)</script>', page.read_text())[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert np.array_equal(pixels, noise_images(5)["a caption", 4] + np.uint8(9))
    before = page.read_bytes()
    assert page_of([tmp_path / name for name in ("fp32 # 100%", "<b>near<br>", "far $x^2$ -->")]).read_bytes() == before


def test_linked_images_stay_where_they_are(tmp_path: Path) -> None:
    folders = hostile_folders(tmp_path)
    evaluate.main([*map(str, folders), "--link", "--output_dir", str(tmp_path / "to/report")])
    page = tmp_path / "to/report/report.html"
    pair = data_of(page)["pairs"][0]
    assert pair["images"][0] == "../../fp32%20%23%20100%25/0.png"
    assert "text/plain" not in page.read_text()


def test_command_generates_the_image_again(tmp_path: Path) -> None:
    asked = ["-m", "model's folder", "-qm", "x.pt", "--negative_prompt=-fog", "--scheduler", "ddim", "-n", "3"]
    asked += ["--no_paired_guidance", "--guidance_scale", "3", "-c", "a", "--batch_size", "2", "--output_dir", "here"]
    args = text2images.parse_args(asked)
    for caption in HOSTILE:
        line, _ = evaluate.command({"flags": args.flags, "caption": caption, "seed": 2**62, "dtype": "bf16"})
        program, script, *flags = shlex.split(line)
        assert (program, script) == ("python", "text2images.py")
        again = text2images.parse_args(flags)
        assert (again.captions, again.seed, again.images_num) == ([caption], 2**62, 1)
        assert again.dtype == "bfloat16" and str(again.output_dir) == "again"
        for name in ("pretrained_model_name_or_path", "quantized_model_name_or_path", "negative_prompt", "scheduler"):
            assert getattr(again, name) == getattr(args, name)
        assert again.no_paired_guidance and again.guidance_scale == 3.0
    line, reason = evaluate.command({"flags": args.flags, "caption": "\x1b]0;x\x07", "seed": 1, "dtype": "fp32"})
    assert line is None and "control characters" in reason
    line, reason = evaluate.command({"caption": "a", "seed": 1, "dtype": "fp32"})
    assert line is None and "older" in reason


def test_flags_of_several_values_are_kept() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", nargs="+", type=lambda text: tuple(text.split(":")))
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    asked = ["--lora", "a b:0.5", "c:1", "--fast", "--seed", "7"]
    args = parser.parse_args(asked)
    assert text2images.flags_given(args, parser) == asked[:4]


def test_flags_that_were_given_stand_in_results_jsonl(model_dir: Path, tmp_path: Path) -> None:
    flags = ["-m", str(model_dir), "-c", "a", "--num_inference_steps", "2", "--output_dir", str(tmp_path)]
    text2images.main(flags)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["flags"] == [f"--pretrained_model_name_or_path={model_dir}", "--num_inference_steps=2"]
    text2images.main([*shlex.split(evaluate.command(row)[0])[2:-1], "--output_dir", str(tmp_path / "again")])
    first, second = (tmp_path / row["file"], tmp_path / "again" / row["file"])
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


def test_plots_ask_for_no_font_and_no_address(tmp_path: Path) -> None:
    folders = [evaluate.read_folder(path) for path in hostile_folders(tmp_path)]
    keys = evaluate.pair(folders)
    evaluate.measure(folders, keys)
    for candidate in folders[1:]:
        candidate.values["lpips"] = [0.001 * number for number in range(len(keys))]
    drawn = evaluate.plots(folders)
    assert drawn.count("<svg") == 3 and "<text" not in drawn and "currentColor" in drawn
    assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)|font-family""", drawn)
    assert drawn.count('aria-label="int8: median 48.13, worst 48.13; bf16: median 29.05, worst 29.05"') == 1
    identifiers = re.findall(r' id="([^"]*)"', drawn)
    assert len(identifiers) == len(set(identifiers))


def test_same_folder_twice_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    first, second, third = (folder(tmp_path / name, noise_images(2)) for name in ("x/int8", "y/int8", "fp32"))
    names = [each["name"] for each in data_of(page_of([third, first, second]))["folders"]]
    assert names == [str(third), str(first), str(second)]
    names = [each["name"] for each in data_of(page_of([third, first, first]))["folders"]]
    assert len(set(names)) == 3


def test_a_missing_template_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TEMPLATE", tmp_path / "report_template.html")
    first, second = (folder(tmp_path / name, noise_images(1)) for name in "ab")
    with pytest.raises(evaluate.UsageError, match="report_template.html: No such file .*; it belongs beside"):
        evaluate.main([str(first), str(second)])
    assert not list(second.glob("report.html*"))


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


SEEDS = "[...document.querySelectorAll('#pairs .pair')].map(pair => /seed (\\d+)/.exec(pair.ariaLabel)[1]).join(' ')"


def change(browser: Browser, element: str, value: object, event: str = "input") -> None:
    browser.run(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}')) }})({element})")


def is_silent(browser: Browser, page: Path) -> bool:
    """No console message, and nothing asked for but the page and what it holds."""
    own = {page.resolve().as_uri()}
    return not browser.problems and all(each in own or each.startswith("blob:null/") for each in browser.requests)


def test_pairs_are_sorted_and_filtered(browser: Browser, tmp_path: Path) -> None:
    made = {(f"{'Red' if seed % 2 else 'blue'} boat {seed}", seed): p for (_, seed), p in noise_images(6).items()}
    near = dict(zip(made, shifted(6, 3, 1, 2, 6, 5, 4).values()))
    far = dict(zip(made, shifted(6, 7, 7, 8, 7, 7, 9).values()))
    reference = folder(tmp_path / "fp32", made, precision="fp32")
    page = page_of([reference, folder(tmp_path / "int8", near), folder(tmp_path / "far", far, precision="bf16")])
    browser.open(page)
    assert browser.run(SEEDS) == "5 2 0 1 3 4"  # by the worst of both folders
    change(browser, "$('folder')", "1", "change")
    assert browser.run(SEEDS) == "3 4 5 0 2 1"
    browser.run("$('order').click()")
    assert browser.run(SEEDS) == "1 2 0 5 4 3"
    change(browser, "$('metric')", "ciede2000", "change")
    best = browser.run(SEEDS).split()
    browser.run("$('order').click()")
    assert browser.run(SEEDS).split() == best[::-1] and sorted(best) == list("012345")
    change(browser, "$('metric')", "generated", "change")
    assert browser.run(SEEDS) == "0 1 2 3 4 5"
    change(browser, "$('filter')", "boat RED")
    browser.until(f"{SEEDS} == '1 3 5'")
    assert browser.run("$('status').textContent") == "3 of 6 pairs"
    change(browser, "$('filter')", "no such words")
    browser.until(f"{SEEDS} == ''")
    assert "No caption" in browser.run("$('pairs').textContent")
    assert is_silent(browser, page)


def pixel(browser: Browser, selector: str, across: float) -> tuple[int, ...]:
    """The colour of an element, at a share of its width and in the middle of its height."""
    box = browser.run(
        f"(b => [b.left + scrollX + {across} * b.width, b.top + scrollY + b.height / 2])"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )
    path = Path(browser.profile) / "pixel.png"
    browser.screenshot(path, (box[0], box[1], 1, 1))
    return Image.open(path).convert("RGB").getpixel((0, 0))


def test_slider_flip_and_difference_show_the_pixels_of_the_images(browser: Browser, tmp_path: Path) -> None:
    grey = {("grey", seed): np.full((64, 64, 3), 100 + seed, np.uint8) for seed in range(3)}
    lighter = {key: pixels + np.uint8(2 + key[1]) for key, pixels in grey.items()}
    reference = folder(tmp_path / "fp32", grey, precision="fp32")
    page = page_of([reference, folder(tmp_path / "int8", lighter)])
    browser.open(page)
    browser.until("[...document.images].every(image => image.complete)")
    stage = "#pairs .compare"
    assert pixel(browser, "#pairs .is-reference .stage", 0.5) == (102,) * 3  # the worst pair, seed 2, comes first
    assert pixel(browser, stage, 0.25) == pixel(browser, stage, 0.75) == (106,) * 3
    change(browser, "document.querySelector('#pairs input[type=range]')", 50)
    assert (pixel(browser, stage, 0.25), pixel(browser, stage, 0.75)) == ((102,) * 3, (106,) * 3)
    assert pixel(browser, "#pairs .difference", 0.5) == (80,) * 3  # 4 levels, 20 times
    change(browser, "$('gain')", 5)
    assert pixel(browser, "#pairs .difference", 0.5) == (20,) * 3

    browser.press("f")
    assert pixel(browser, stage, 0.75) == (102,) * 3
    assert browser.run("document.querySelector('#pairs .flip').ariaPressed") == "true"
    browser.press("f")
    assert pixel(browser, stage, 0.75) == (106,) * 3

    browser.run("document.querySelector('#pairs .compare').scrollIntoView({behavior: 'instant', block: 'center'})")
    left, top, width, height = browser.run(
        "(b => [b.left, b.top, b.width, b.height])(document.querySelector('#pairs .compare').getBoundingClientRect())"
    )
    for kind, share in (("mousePressed", 0.2), ("mouseMoved", 0.9), ("mouseReleased", 0.9)):
        browser.mouse(kind, left + share * width, top + height / 2)
    assert browser.run("document.querySelector('#pairs input[type=range]').value") == "90"
    assert pixel(browser, stage, 0.75) == (102,) * 3
    browser.press("d")
    assert browser.run("getComputedStyle(document.querySelector('#pairs .is-difference')).display") == "none"
    assert is_silent(browser, page)


def test_a_pair_is_seen_large_and_all_by_keys(browser: Browser, tmp_path: Path) -> None:
    reference = folder(
        tmp_path / "fp32", noise_images(3), precision="fp32", flags=["--pretrained_model_name_or_path=x"]
    )
    others = [folder(tmp_path / name, shifted(3, *shifts), precision=name) for name, shifts in
              (("int8", (3, 2, 1)), ("bf16", (1, 1, 1)))]  # fmt: skip
    page = page_of([reference, *others])
    browser.open(page)
    for key, seed in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        browser.press(key)
        assert f"seed {seed}" in browser.run("document.activeElement.ariaLabel")
    browser.press("e")
    assert browser.run("$('viewer').open && document.activeElement.ariaLabel") == "pair 2, seed 1"
    chosen = "document.querySelector('#viewer .chosen').textContent"
    assert "int8" in browser.run(chosen)
    browser.press("2")
    assert "bf16" in browser.run(chosen)
    browser.press("d")
    assert "difference, bf16" in browser.run(chosen)
    browser.press("d")
    browser.press("j")
    assert browser.run("document.activeElement.ariaLabel") == "pair 3, seed 2"
    browser.press("f")
    assert browser.run("document.querySelector('#viewer .pair').classList.contains('flipped')")
    browser.run("$('viewer').close()")
    browser.run("document.querySelector('#pairs details').open = true")
    browser.until("document.querySelector('#pairs .command textarea') !== null")
    line, _ = evaluate.command(json.loads((reference / "results.jsonl").read_text().splitlines()[0]))
    assert browser.run("document.querySelector('#pairs .command textarea').value") == line
    assert "older text2images.py" in browser.run("document.querySelector('#pairs details').textContent")
    browser.run("$('filter').focus()")
    browser.press("f")  # a letter of a word that is looked for
    assert browser.run("$('filter').value + document.querySelectorAll('#pairs .flipped').length") == "f0"
    assert is_silent(browser, page)


@pytest.mark.parametrize("width", [1400, 400])
def test_hostile_captions_harm_nothing(browser: Browser, tmp_path: Path, width: int) -> None:
    folders = hostile_folders(tmp_path)
    browser.resize(width, 900)
    if width == 400:  # and a browser from before 2025
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete Uint8Array.fromBase64")
    page = page_of(folders)
    browser.open(page)
    browser.until("[...document.images].every(image => image.complete && image.naturalWidth == 16)")
    assert browser.run("document.title") == "int8, bf16 against fp32 · 7 pairs"
    shown = browser.run("[...document.querySelectorAll('#pairs .caption')].map(each => each.textContent)")
    assert sorted(shown) == sorted(HOSTILE)
    assert browser.run("document.querySelectorAll('#pairs script, #pairs .caption *').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert browser.run("document.querySelector('#table').textContent.includes('<b>near<br>')")
    assert is_silent(browser, page)
    page_of(folders, "--link")
    browser.requests.clear()
    browser.open(page)
    browser.until("[...document.images].every(image => image.complete && image.naturalWidth == 16)")
    roots = tuple(path.resolve().as_uri() for path in folders)
    assert not browser.problems and all(each.startswith(roots) for each in browser.requests)


def test_what_another_page_would_fetch_is_forbidden(browser: Browser, tmp_path: Path) -> None:
    """The policy holds even if somebody finds a way in."""
    page = page_of(hostile_folders(tmp_path)[:2])
    browser.open(page)
    for attempt in (
        "fetch('http://127.0.0.1:9/')",
        "new Promise((_, no) => { const i = new Image(); i.onerror = no; i.src = 'http://127.0.0.1:9/x.png' })",
        "new Promise((_, no) => { const s = document.createElement('script'); s.onerror = no; s.src = 'data:,1';"
        " document.body.append(s) })",
    ):
        with pytest.raises(RuntimeError):
            browser.run(attempt)
    browser.run(
        "(s => { s.textContent = 'document.title = 1'; document.body.append(s) })(document.createElement('script'))"
    )
    assert browser.run("document.title") != "1"
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_300_pairs_are_usable(browser: Browser, tmp_path: Path) -> None:
    made = noise_images(300, edge=32)
    other = {key: pixels + np.uint8(1 + key[1] % 50) for key, pixels in made.items()}
    page = page_of([folder(tmp_path / "fp32", made, precision="fp32"), folder(tmp_path / "int8", other)])
    browser.open(page)
    built = "document.querySelectorAll('#pairs .pair').length"
    assert 0 < browser.run(built) <= 36  # as they are scrolled to, and no more: what keeps a large page usable
    browser.run("$('order').click(), document.body.offsetHeight")
    assert 0 < browser.run(built) <= 36
    rounds = 0
    while rounds < 300:
        rounds += 1
        if browser.run(built) == 300:
            break
        browser.run("scrollTo({ top: document.body.scrollHeight, behavior: 'instant' })")
        browser.run("new Promise(requestAnimationFrame)")
    assert rounds > 5 and len(set(browser.run(SEEDS).split())) == 300
    assert is_silent(browser, page)
