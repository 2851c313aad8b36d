"""evaluate.py: its figures against ones worked out by hand, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import evaluate
from conftest import ROOT
from data import FACTS, folder, noise_images

pytestmark = pytest.mark.usefixtures("empty_hub")


def test_psnr_of_a_known_difference() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert evaluate.psnr(black, grey) == pytest.approx(-20 * np.log10(0.2))
    assert evaluate.psnr(black, black) == evaluate.MAX_PSNR


def test_interval_holds_the_mean_and_narrows_with_the_sample() -> None:
    values = np.random.default_rng(1).normal(50, 2, 400).tolist()
    mean, low, high = evaluate.interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)  # 95 % of a normal mean
    wide = evaluate.interval(values[:25])
    assert wide[2] - wide[1] > 3 * (high - low)


def test_report_of_three_folders(tmp_path: Path, capsys) -> None:
    reference = folder(tmp_path / "fp32", noise_images(6), precision="fp32", seconds=8.0)
    near = folder(tmp_path / "near", noise_images(5, shift=1))
    far = folder(tmp_path / "far", noise_images(6, shift=10))
    evaluate.main([str(reference), str(far), str(near)])
    summary = json.loads((near / "report.json").read_text())
    assert summary["pairs"] == 5
    printed = capsys.readouterr().out
    assert "fp32: 1 of 6 images have no partner" in printed
    assert printed.count("not measured") == 1 and "LPIPS, FID, CLIP score: not measured" in printed
    rows = {Path(row["folder"]).name: row for row in summary["folders"]}
    assert rows["near"]["psnr"] == pytest.approx([-20 * np.log10(1 / 255)] * 3)
    assert rows["far"]["psnr"] == pytest.approx([-20 * np.log10(10 / 255)] * 3)
    assert rows["near"]["speedup"] == 4
    assert rows["near"]["ssim"][0] > rows["far"]["ssim"][0] > 0.9
    assert summary["differences"][0]["psnr"] == pytest.approx([20.0] * 3)
    sheet = Image.open(near / "contact_sheet.png")
    left, top = 3 * 8 + 2 * 256, 28 + 44  # of the first difference
    assert sheet.getpixel((left + 9, top + 9)) == (20, 20, 20)  # one level, times 20
    reference_tile = sheet.crop((8, top, 8 + 256, top + 256)).resize((16, 16), Image.Resampling.NEAREST)
    assert any(np.array_equal(np.asarray(reference_tile), pixels) for pixels in noise_images(5).values())


def test_gate_of_min_psnr(tmp_path: Path) -> None:
    reference, other = folder(tmp_path / "a", noise_images(2)), folder(tmp_path / "b", noise_images(2, shift=10))
    evaluate.main([str(reference), str(other), "--min_psnr", "28"])
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(reference), str(other), "--min_psnr", "28.2"])
    assert left.value.code == 1


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    reference = folder(tmp_path / "a", noise_images(2))
    with pytest.raises(evaluate.UsageError, match="generated with steps 9, not 4"):
        evaluate.main([str(reference), str(folder(tmp_path / "b", noise_images(2), steps=9))])
    stranger = folder(tmp_path / "c", {("another", 0): np.zeros((16, 16, 3), np.uint8)})
    with pytest.raises(evaluate.UsageError, match="no caption and seed is in all"):
        evaluate.main([str(reference), str(stranger)])
    with open(reference / "results.jsonl", "a") as file:
        file.write((reference / "results.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(evaluate.UsageError, match="two images of 'a caption' with seed 0"):
        evaluate.main([str(reference), str(reference)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(reference), str(tmp_path / "empty")])
    assert left.value.code == 2


# ---------------------------------------------------------------- measuring with networks


def test_frechet_distance_of_known_normal_distributions() -> None:
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()  # uncorrelated
    spread = corners / corners.std(dim=0)
    first, second = spread * torch.tensor([1.0, 2, 3]), spread * torch.tensor([1.5, 1, 7]) + 2
    expected = 3 * 2**2 + 0.5**2 + 1**2 + 4**2
    assert evaluate.frechet_distance(first, second) == pytest.approx(expected)
    assert evaluate.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    wide = torch.randn(5, 40, dtype=torch.float64)  # fewer images than features
    assert evaluate.frechet_distance(wide, 3 + wide) == pytest.approx(40 * 9)


def test_lpips_of_known_features() -> None:
    first = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1) / 5, torch.ones(1, 1, 2, 2)]
    second = [torch.tensor([4.0, 3.0]).view(1, 2, 1, 1) / 5, torch.tensor([1.0, 1, 1, 0]).view(1, 1, 2, 2)]
    heads = {"lin0.model.1.weight": torch.tensor([2.0, 5.0]).view(1, 2, 1, 1)}
    heads["lin1.model.1.weight"] = torch.full((1, 1, 1, 1), 8.0)
    assert evaluate.lpips(first, second, heads) == pytest.approx((2 + 5) * 0.2**2 + 8 / 4)


def small_alexnet() -> dict[str, torch.Tensor]:
    weights, channels = {}, 3
    for layer, edge in ((0, 11), (3, 5), (6, 3), (8, 3), (10, 3)):
        weights[f"features.{layer}.weight"] = torch.randn(4, channels, edge, edge) / edge
        weights[f"features.{layer}.bias"], channels = torch.randn(4), 4
    return weights


def small_inception() -> dict[str, torch.Tensor]:
    """Every convolution of FID's Inception, with 2 output channels each."""
    stem = {"Conv2d_1a_3x3": 3, "Conv2d_2a_3x3": 2, "Conv2d_2b_3x3": 2, "Conv2d_3b_1x1": 2, "Conv2d_4a_3x3": 2}
    kernels = {name: (channels, (3, 3) if name.endswith("3x3") else (1, 1)) for name, channels in stem.items()}
    a = "branch1x1:1x1 branch5x5_1:1x1 branch5x5_2:5x5 branch3x3dbl_1:1x1 branch3x3dbl_2:3x3 branch3x3dbl_3:3x3"
    b = "branch3x3:3x3 branch3x3dbl_1:1x1 branch3x3dbl_2:3x3 branch3x3dbl_3:3x3"
    c = "branch1x1:1x1 branch7x7_1:1x1 branch7x7_2:1x7 branch7x7_3:7x1 branch7x7dbl_1:1x1 branch7x7dbl_2:7x1"
    c += " branch7x7dbl_3:1x7 branch7x7dbl_4:7x1 branch7x7dbl_5:1x7"
    d = "branch3x3_1:1x1 branch3x3_2:3x3 branch7x7x3_1:1x1 branch7x7x3_2:1x7 branch7x7x3_3:7x1 branch7x7x3_4:3x3"
    e = "branch1x1:1x1 branch3x3_1:1x1 branch3x3_2a:1x3 branch3x3_2b:3x1 branch3x3dbl_1:1x1 branch3x3dbl_2:3x3"
    e += " branch3x3dbl_3a:1x3 branch3x3dbl_3b:3x1"
    blocks = {"5b": (a, 2), "5c": (a, 8), "5d": (a, 8), "6a": (b, 8), "6b": (c, 12), "6c": (c, 8), "6d": (c, 8)}
    blocks |= {"6e": (c, 8), "7a": (d, 8), "7b": (e, 12), "7c": (e, 12)}
    for block, (convs, channels) in blocks.items():
        for conv in (convs + ("" if block in ("6a", "7a") else " branch_pool:1x1")).split():
            name, _, shape = conv.partition(":")
            first = name in ("branch1x1", "branch3x3", "branch_pool") or name.endswith("_1")  # of its tower
            kernels[f"Mixed_{block}.{name}"] = (channels if first else 2, tuple(map(int, shape.split("x"))))
    weights = {}
    for name, (channels, shape) in kernels.items():
        weights[f"{name}.conv.weight"] = torch.randn(2, channels, *shape) / math.sqrt(channels * math.prod(shape) / 2)
        weights |= {f"{name}.bn.{part}": torch.zeros(2) for part in ("running_mean", "bias")}
        weights |= {f"{name}.bn.{part}": torch.ones(2) for part in ("running_var", "weight")}
    return weights


def test_inception_features_are_those_of_torch_fidelity() -> None:
    """The figures are what torch-fidelity 0.4.0 makes of the same image with the same weights."""
    torch.manual_seed(0)
    x = (torch.arange(3 * 299 * 299) * 7919 % 251 - 128).view(1, 3, 299, 299) / 128
    expected = [9.00963e-4, 2.06137e-5, 1.19799e-2, 8.88090e-6, 1.01153e-5, 1.75504e-4, 5.96555e-4, 2.14038e-3]
    expected += [1.42109e-3, 4.55666e-4, 1.41412e-2, 1.74800e-2]
    assert evaluate.inception_features(x, small_inception())[0].tolist() == pytest.approx(expected, rel=1e-3)


def save_hashed(weights: dict[str, torch.Tensor], folder: Path) -> str:
    """A file:// URL whose name ends with the file's hash, as in torch.hub."""
    torch.save(weights, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    return (folder / "new.pth").rename(folder / f"net-{digest}.pth").as_uri()


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three files of LPIPS and FID, small ones, where --download would find them."""
    torch.manual_seed(0)
    folder = tmp_path / "published"
    folder.mkdir()
    heads = {f"lin{layer}.model.1.weight": torch.rand(1, 4, 1, 1) for layer in range(5)}
    files = {"ALEXNET": small_alexnet(), "LPIPS_HEADS": heads, "INCEPTION": small_inception()}
    for name, weights in files.items():
        monkeypatch.setattr(evaluate, name, save_hashed(weights, folder))
    monkeypatch.setattr(evaluate, "LPIPS_FILE", evaluate.LPIPS_HEADS.rpartition("/")[2])
    monkeypatch.setattr(evaluate, "clip_score", lambda *_: None)
    return folder


def test_lpips_and_fid_with_weights_on_disk(networks: Path, empty_hub: Path, tmp_path: Path, capsys) -> None:
    reference = folder(tmp_path / "fp32", noise_images(6, edge=48))
    folders = [reference] + [folder(tmp_path / f"{shift}", noise_images(6, shift, 48)) for shift in (40, 3, 0)]
    evaluate.main([*map(str, folders)])
    assert "LPIPS, FID, CLIP score: not measured" in capsys.readouterr().out and not any(empty_hub.iterdir())
    evaluate.main([*map(str, folders), "--download"])
    assert len(list(empty_hub.iterdir())) == 3
    for file in networks.iterdir():
        file.unlink()
    (empty_hub / evaluate.INCEPTION.rpartition("/")[2]).rename(empty_hub / evaluate.INCEPTION_FILE)
    capsys.readouterr()
    evaluate.main([*map(str, folders)])  # from the disk now
    printed = capsys.readouterr().out
    assert "LPIPS |" in printed and "FID |" in printed and "FID of 6 images" in printed
    assert "\nCLIP score: not measured" in printed
    fp32, far, near, equal = json.loads((folders[-1] / "report.json").read_text())["folders"]
    assert "lpips" not in fp32 and "fid" not in fp32
    assert equal["lpips"] == [0, 0, 0] and equal["fid"] < 1e-6 * near["fid"]
    assert far["lpips"][0] > 2 * near["lpips"][0] > 0 and far["fid"] > 2 * near["fid"] > 0
    assert near["lpips"][1] < near["lpips"][0] < near["lpips"][2]


def test_damaged_weights_are_named(networks: Path, empty_hub: Path, tmp_path: Path) -> None:
    folders = [str(folder(tmp_path / name, noise_images(2, edge=48))) for name in ("a", "b")]
    name = evaluate.INCEPTION.rpartition("/")[2]
    (networks / name).write_bytes(b"not what was published")
    with pytest.raises(evaluate.UsageError, match=f"{name}.*invalid hash value"):
        evaluate.main([*folders, "--download"])
    assert not (empty_hub / name).exists()
    (empty_hub / name).write_bytes(b"cut off")
    with pytest.raises(evaluate.UsageError, match=f"{name}.*delete it"):
        evaluate.main(folders)


def test_clip_score_is_the_cosine_of_both_embeddings(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 673, "bos_token_id": 671, "eos_token_id": 672}
    config = CLIPConfig(text_config=text, vision_config={**small, "patch_size": 32}, projection_dim=8)
    model = CLIPModel(config).eval()
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "demo/tiny-stable-diffusion/tokenizer")
    for part in (model, tokenizer, CLIPImageProcessorPil()):
        part.save_pretrained(tmp_path / "clip")

    made = {
        ("a lake", 0): noise_images(1)["a caption", 0],
        ("a very " * 100 + "large mountain", 1): noise_images(2)["a caption", 1],
    }
    reference, other = folder(tmp_path / "a", made), folder(tmp_path / "b", made)
    evaluate.main([str(reference), str(other), "--clip_model", str(tmp_path / "clip")])
    score = evaluate.ClipScore(str(tmp_path / "clip"))
    expected = []
    for (caption, _), pixels in made.items():
        pixel_values = CLIPImageProcessorPil()(images=[Image.fromarray(pixels)], return_tensors="pt").pixel_values
        words = tokenizer(caption, truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(pixel_values).pooler_output)
            text = model.text_projection(model.text_model(words).pooler_output)
            expected.append(max(0, 100 * torch.cosine_similarity(image, text).item()))
            assert score(pixels, caption) == pytest.approx(expected[-1], abs=1e-3)
    assert max(expected) > 0
    report = json.loads((other / "report.json").read_text())
    for row in report["folders"]:
        assert row["clip_score"][0] == pytest.approx(np.mean(expected), abs=1e-3)

    cached = tmp_path / "cache/models--nobody--has-this"  # the usual model, in the hub's cache
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("123")
    (tmp_path / "clip").rename(cached / "snapshots/123")
    evaluate.main([str(reference), str(other)])
    assert json.loads((other / "report.json").read_text()) == report
    (cached / "snapshots/123/model.safetensors").unlink()  # its configuration alone
    evaluate.main([str(reference), str(other)])
    assert "LPIPS, FID, CLIP score: not measured" in capsys.readouterr().out


def test_clip_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    folders = [str(folder(tmp_path / name, noise_images(2))) for name in ("a", "b")]
    with pytest.raises(evaluate.UsageError, match="--clip_model nowhere/at-all: .*name a folder, or --download"):
        evaluate.main([*folders, "--clip_model", "nowhere/at-all"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"caption": "a capt', "line 3 is damaged or of another program"),
        ("[1]", "line 3 is damaged or of another program"),
        ("\xff\xfe", "line 3 is damaged or of another program"),
        ('{"caption": ["x"], "seed": 1, "file": "1.png", "status": "ok"}', "line 3 is damaged or of another program"),
        ('{"caption": "x", "seed": 1}', r"line 3 is damaged or of another program \('file'\)"),
        ('{"caption": "x", "seed": 1, "file": "1.png", "status": "ok"}', r"of another program \(precision\)"),
        (json.dumps({"caption": "x", "seed": 1, "file": "1.png", **FACTS, "seconds": 0}), r"program \(seconds\)"),
        (json.dumps({"caption": "x", "seed": 1, "file": "1.png", "seconds": 2, **FACTS, "unet_mb": "7"}), "(unet_mb)"),
        (
            json.dumps({"caption": "x", "seed": 1, "file": "1.png", "seconds": math.inf, **FACTS}),
            r"program \(seconds\)",
        ),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    first, second = (folder(tmp_path / name, noise_images(2)) for name in "ab")
    with open(second / "results.jsonl", "a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(evaluate.UsageError, match=f"{second}/results.jsonl, .*{message}"):
        evaluate.main([str(first), str(second)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "truncated"),
        (lambda file: file.write_bytes(b"no image"), "cannot identify"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, spoil, message: str) -> None:
    first, second = (folder(tmp_path / name, noise_images(2)) for name in "ab")
    spoil(second / "1.png")
    with pytest.raises(evaluate.UsageError, match=f"{second}/1.png: .*{message}.*; generate it again"):
        evaluate.main([str(first), str(second)])
    assert not (second / "report.json").exists()


def test_a_folder_that_cannot_be_written_to_and_images_that_differ_in_clip_skip(tmp_path: Path) -> None:
    first, second = (folder(tmp_path / name, noise_images(2)) for name in "ab")
    with pytest.raises(evaluate.UsageError, match="--output_dir .* cannot be written to: Not a directory"):
        evaluate.main([str(first), str(second), "--output_dir", str(first / "0.png" / "x")])
    third = folder(tmp_path / "c", noise_images(2), clip_skip=1)
    with pytest.raises(evaluate.UsageError, match="generated with clip_skip 1, not None"):
        evaluate.main([str(first), str(third)])


def test_lpips_weights_in_one_file_are_those_of_the_two(networks: Path, tmp_path: Path, capsys) -> None:
    alexnet, heads = evaluate.lpips_weights(None, download=True)
    tensors = {f"conv{i}.{part}": alexnet[f"features.{layer}.{part}"].clone()
               for i, layer in enumerate((0, 3, 6, 8, 10)) for part in ("weight", "bias")}  # fmt: skip
    tensors |= {f"lin{i}.weight": heads[f"lin{i}.model.1.weight"].clone() for i in range(5)}
    save_file(tensors, tmp_path / "lpips.safetensors")
    ours = evaluate.lpips_weights(tmp_path / "lpips.safetensors", download=False)
    for mine, theirs in zip(ours, (alexnet, heads)):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    first, second = (
        folder(tmp_path / "a", noise_images(2, edge=64)),
        folder(tmp_path / "b", noise_images(2, 9, edge=64)),
    )
    evaluate.main([str(first), str(second), "--lpips_weights", str(tmp_path / "lpips.safetensors")])
    assert "LPIPS |" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["gone", "text", "other"])
def test_lpips_weights_that_cannot_be_used_are_refused(tmp_path: Path, spoil: str) -> None:
    file = tmp_path / "lpips.safetensors"
    if spoil == "text":
        file.write_text("no tensors")
    if spoil == "other":
        save_file({"conv0.weight": torch.zeros(1)}, file)
    folders = [str(folder(tmp_path / name, noise_images(1))) for name in "ab"]
    with pytest.raises(evaluate.UsageError, match=f"--lpips_weights {file}: .*see --help"):
        evaluate.main([*folders, "--lpips_weights", str(file)])
