"""demo/scenes.py draws what it says, and demo/check_scenes.py sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import check_scenes
import scenes

DEMO = Path(check_scenes.__file__).parent
BUNDLED_MODEL = DEMO / "tiny-stable-diffusion"
FIT_COUNT = 450  # half of the script's default: quick, and it still separates every attribute


@pytest.fixture(scope="module")
def classifier() -> tuple[dict, dict]:
    return check_scenes.fit_classifier(FIT_COUNT)


@pytest.fixture(scope="module")
def drawn() -> tuple[list[dict[str, str]], list[dict]]:
    """What 60 captions of a collection ask for, and the features of their untouched images."""
    pairs = [scenes.make_pair(index, seed=5, size=128) for index in range(60)]
    return [check_scenes.parse_caption(caption) for caption, _, _ in pairs], [check_scenes.look(p[2]) for p in pairs]


def write_results(folder: Path, captions: list[str], images: list[Image.Image]) -> None:
    """A folder as text2images.py leaves it."""
    rows = []
    for index, (caption, image) in enumerate(zip(captions, images, strict=True)):
        image.save(folder / f"{index}.png")
        rows.append({"caption": caption, "file": f"{index}.png", "seed": index})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- scenes.py


def test_a_pair_depends_on_nothing_but_its_index_and_seed() -> None:
    caption, scene, image = scenes.make_pair(3, seed=7, size=64)
    scenes.make_pair(4, seed=7, size=64)
    again = scenes.make_pair(3, seed=7, size=64)
    assert (caption, scene, image.tobytes()) == (again[0], again[1], again[2].tobytes())
    assert image.tobytes() != scenes.make_pair(3, seed=8, size=64)[2].tobytes()
    assert image.tobytes() != scenes.make_pair(4, seed=7, size=64)[2].tobytes()
    assert image.size == (64, 64)


def test_a_collection_is_in_the_layout_of_img2dataset_and_can_be_made_again_to_the_byte(tmp_path: Path) -> None:
    def collection(folder: Path) -> dict[str, bytes]:
        command = [sys.executable, DEMO / "scenes.py", "--output_dir", folder, "--count", "5", "--size", "32"]
        child = subprocess.run(command, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    first = collection(tmp_path / "first")
    assert sorted(first) == [f"00000/{index:09d}.{kind}" for index in range(5) for kind in ("jpg", "txt")]
    assert first["00000/000000002.txt"].decode() == scenes.make_pair(2, seed=0, size=32)[0] + "\n"
    assert first == collection(tmp_path / "second")
    assert first == collection(tmp_path / "first")  # over what is there


def test_every_value_of_every_attribute_is_drawn_and_put_into_words() -> None:
    rng = np.random.default_rng(0)
    scenes_drawn = [scenes.random_scene(rng) for _ in range(400)]
    captions = " | ".join(scenes.describe(scene, rng) for scene in scenes_drawn)
    for attribute, names in {**check_scenes.NAMES, "side": scenes.SIDES}.items():
        assert {getattr(scene, attribute) for scene in scenes_drawn} == set(names)
    for phrases in check_scenes.PHRASES.values():
        for phrase in phrases.values():
            assert phrase in captions
    assert "none" not in captions


def test_the_original_captions_are_in_a_collection() -> None:
    pairs = [scenes.random_pair(np.random.default_rng([0, index])) for index in range(800)]
    for caption, facts in (
        (scenes.ASTRONAUT_CAPTION, {"ground": "mars", "object": "astronaut"}),
        (scenes.MILKY_WAY_CAPTION, {"sky": "milky way", "mountains": "golden", "object": "none"}),
    ):
        stood_for = [scene for text, scene in pairs if text == caption]
        assert 25 <= len(stood_for) <= 75  # one in sixteen of 800 is 50
        assert all(getattr(scene, name) == value for scene in stood_for for name, value in facts.items())


# ---------------------------------------------------------------- captions, back into facts


def test_captions_are_turned_back_into_what_they_were_made_of() -> None:
    rng = np.random.default_rng(1)
    for _ in range(600):
        scene = scenes.random_scene(rng)
        assert check_scenes.parse_caption(scenes.describe(scene, rng)) == check_scenes.facts(scene)


@pytest.mark.parametrize(
    ("caption", "stated"),
    [
        (scenes.ASTRONAUT_CAPTION, {"ground": "mars", "object": "astronaut"}),
        (scenes.MILKY_WAY_CAPTION, {"sky": "milky way", "mountains": "golden"}),
        (
            "Golden snow mountains behind a lake, the Milky Way above",
            {"sky": "milky way", "mountains": "golden", "ground": "lake", "object": "none"},
        ),
        ("a red car in a meadow", {}),
        ("snowy mountains and red mountains under a pink dawn, by a lake", {}),
        ("snowy mountains under a pink dawn, in a deserted street", {}),
        ("", {}),
    ],
)
def test_no_more_is_read_from_a_caption_than_it_says(caption: str, stated: dict[str, str]) -> None:
    assert check_scenes.parse_caption(caption) == stated


# ---------------------------------------------------------------- the classifier


def test_the_classifier_sees_what_was_drawn_even_if_it_is_blurred_and_tinted(classifier: tuple[dict, dict]) -> None:
    _, ceiling = classifier
    assert all(ceiling[name][0] >= 100 for name in ceiling)
    assert min(ceiling[name][1] for name in ("sky", "mountains", "ground")) >= 95
    assert min(ceiling[name][1] for name in ("object", "side")) >= 90


def test_right_captions_are_confirmed(classifier: tuple[dict, dict], drawn: tuple[list, list]) -> None:
    asked, looks = drawn
    table = check_scenes.accuracy(asked, check_scenes.see(classifier[0], looks))
    assert all(percent >= 95 for _, percent in table.values())
    assert table["sky"][0] < len(asked)  # the astronaut's captions leave the sky open


def test_wrong_captions_are_noticed(classifier: tuple[dict, dict], drawn: tuple[list, list]) -> None:
    """Captions of other images are right by chance only: one in five or six, and half of the sides."""
    asked, looks = drawn
    seen = check_scenes.see(classifier[0], looks)
    shifted = [check_scenes.accuracy(asked[k:] + asked[:k], seen) for k in (7, 19, 31, 43)]
    for name, chance in (("sky", 100 / 6), ("mountains", 20), ("ground", 20), ("object", 100 / 6)):
        assert abs(np.mean([table[name][1] for table in shifted]) - chance) < 15
    assert np.mean([table["side"][1] for table in shifted]) < 60


def test_the_side_is_that_of_the_object_and_nowhere_without_one(classifier: tuple[dict, dict]) -> None:
    rng = np.random.default_rng(2)
    scene = scenes.Scene("blue", "green", "meadow", "rocket", "right")
    empty = scenes.Scene("blue", "green", "meadow", "none", "right")
    seen = check_scenes.see(classifier[0], [check_scenes.look(scenes.draw_scene(s, rng)) for s in (scene, empty)])
    assert [s["side"] for s in seen] == ["right", "nowhere"]
    assert [s["object"] for s in seen] == ["rocket", "none"]


def test_features_do_not_depend_on_the_size_of_the_image() -> None:
    image = scenes.make_pair(1, seed=9, size=256)[2]
    small = image.resize((128, 128), Image.Resampling.BOX)
    for name, values in check_scenes.look(image).items():
        np.testing.assert_allclose(values, check_scenes.look(small)[name], atol=1e-12)


# ---------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, classifier: tuple[dict, dict]) -> None:
    """Fit once for all tests of the command."""
    monkeypatch.setattr(check_scenes, "fit_classifier", lambda count: classifier)


@pytest.mark.usefixtures("quick")
def test_a_folder_of_images_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [scenes.make_pair(index, seed=11, size=128) for index in range(12)]
    captions = [caption for caption, _, _ in pairs]
    write_results(tmp_path, [*captions, "a red car"], [*(image for _, _, image in pairs), Image.new("RGB", (128, 128))])
    with (tmp_path / "results.jsonl").open("a") as rows:  # as text2images.py would report an image that failed
        rows.write(json.dumps({"caption": captions[0], "file": None}) + "\n")
    check_scenes.main(["--image_dir", str(tmp_path), "--json", str(tmp_path / "out.json"), "--min_accuracy", "90"])
    printed = capsys.readouterr().out
    assert "left out: 1 with a caption that is not of scenes.py, 1 without an image" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["images"]) == 12
    asked = [check_scenes.parse_caption(caption) for caption in captions]
    assert [row["asked"] for row in result["images"]] == asked
    for name, row in result["attributes"].items():
        assert row["images"] == sum(name in facts for facts in asked)
        assert row["percent_as_asked"] >= 90
        assert f"{row['percent_as_asked']:.1f} %" in next(
            line for line in printed.splitlines() if line.startswith(name)
        )
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("quick")
def test_images_below_the_minimum_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    caption = "snowy mountains behind a lake, a pink dawn above"
    shown = scenes.draw_scene(scenes.Scene("dawn", "snowy", "mars", "none", "left"), np.random.default_rng(0))
    write_results(tmp_path, [caption], [shown])
    with pytest.raises(SystemExit) as stop:
        check_scenes.main(["--image_dir", str(tmp_path), "--min_accuracy", "50"])
    assert stop.value.code == "below --min_accuracy 50: ground"  # a message as exit code: Python prints it, exits 1
    assert "ground mars for lake (1x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (None, "no results.jsonl"),
        ('{"caption": "a red car", "file": "0.png"}\n', "no image with a caption of scenes.py"),
        ("nonsense\n", "line 1"),
        (json.dumps({"caption": scenes.ASTRONAUT_CAPTION, "file": "gone.png"}), "gone.png"),
    ],
)
def test_a_bad_folder_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: str | None, message: str
) -> None:
    if results is not None:
        (tmp_path / "results.jsonl").write_text(results)
    with pytest.raises(SystemExit) as stop:
        check_scenes.main(["--image_dir", str(tmp_path)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--image_dir" in last
    assert message in last


@pytest.mark.usefixtures("quick")
def test_a_damaged_image_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, [scenes.ASTRONAUT_CAPTION], [Image.new("RGB", (128, 128))])
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(SystemExit) as stop:
        check_scenes.main(["--image_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "0.png cannot be read" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--pretrained_model_name_or_path", "not there"], "--pretrained_model_name_or_path"),
        (["--image_dir", ".", "--count", "0"], "--count"),
        (["--image_dir", ".", "--min_accuracy", "101"], "--min_accuracy"),
        (["--image_dir", ".", "--json", "not/there.json"], "--json"),
        (["--image_dir", ".", "--pretrained_model_name_or_path", "."], "--image_dir"),
        ([], "--image_dir"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        check_scenes.main(arguments)
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err.strip().splitlines()[-1]


def test_help_is_quick_because_torch_is_not_imported() -> None:
    code = "import sys, check_scenes; assert not {'torch', 'diffusers'} & set(sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(DEMO)}
    )
    assert child.returncode == 0, child.stderr


# ---------------------------------------------------------------- the bundled model


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(not (BUNDLED_MODEL / "model_index.json").is_file(), reason=f"{BUNDLED_MODEL} is not there")
def test_bundled_model_generates_what_is_asked(tmp_path: Path) -> None:
    check_scenes.main(
        ["--pretrained_model_name_or_path", str(BUNDLED_MODEL), "--count", "24", "--num_inference_steps", "20"]
        + ["--json", str(tmp_path / "out.json"), "--min_accuracy", "75"]
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["images"]) == 24
    assert min(result["attributes"][name]["percent_as_asked"] for name in ("sky", "mountains", "ground")) >= 75


def test_stressed_variant_computes_the_same_with_outliers(model_dir: Path, tmp_path: Path) -> None:
    stressed = tmp_path / "stressed"
    command = [sys.executable, str(DEMO / "stress.py"), "--pretrained_model_name_or_path", str(model_dir)]
    subprocess.run([*command, "--output_dir", str(stressed), "--factor", "64"], check=True, capture_output=True)
    outputs, ranges = [], []
    for folder in (model_dir, stressed):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        inputs = pipeline.tokenizer("a", padding="max_length", return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(0)
        noisy_latents = torch.randn(1, 4, 16, 16, generator=generator)
        with torch.no_grad():
            hidden_states = pipeline.text_encoder(inputs)[0]
            outputs.append(pipeline.unet(noisy_latents, 500, hidden_states).sample)
        ranges.append((hidden_states.abs().max() / hidden_states.abs().median()).item())
    assert torch.allclose(*outputs, atol=1e-5 * outputs[0].abs().max().item())
    assert ranges[1] > 5 * ranges[0]
