"""README and docs name what is there: files, sections, functions, flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tables
from conftest import ROOT

DOCUMENTS = tables.documents()
SCRIPTS = ("create_metadata.py", "train_text_to_image_qat.py", "text2images.py", "evaluate.py")
# Of branches that are not merged yet: empty this then.
# Of other programs, as the documents show them.
FOREIGN = {
    "--caption_col",
    "--check",
    "--download",
    "--extra-index-url",
    "--format",
    "--help",
    "--index-url",
    "--input_format",
}
FOREIGN |= {"--nnodes", "--nproc_per_node", "--num_processes", "--output_folder", "--output_format", "--rdzv_backend"}
FOREIGN |= {"--input_format", "--rdzv_endpoint", "--rdzv_id", "--shutdown_timeout", "--url_col", "--url_list", "--cpu"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "lab-notes.md"], ids=lambda p: p.name)
def test_every_flag_is_one_of_a_script(document: Path) -> None:
    files = [*(ROOT / name for name in SCRIPTS), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("demo/*.py")]
    known = "\n".join(path.read_text(encoding="utf-8") for path in files)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text(encoding="utf-8"))) - {"--adam_"}
    unknown = {flag for flag in flags if f'"{flag}"' not in known}
    assert unknown <= FOREIGN


def test_readme_is_short_and_names_functions_that_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    section = text.partition("## How it works")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z_]\w+)`", section)) - {"prepare"}  # of Intel Neural Compressor
    scripts = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert len(names) > 5
    assert [name for name in names if not re.search(rf"^(def|class) {name}\b", scripts, re.M)] == []


def test_the_commands_of_the_original_stand_as_they_were() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python create_metadata.py --image_path /path/to/image_text_pairs_folder\n" in text
    train, generate = (
        text.partition(f"```bash\n{start}")[2].partition("```")[0] for start in ("accelerate", "python text")
    )
    for flag in (
        "--pretrained_model_name_or_path runwayml/stable-diffusion-v1-5 --use_ema --resolution=512 --center_crop "
        "--random_flip --train_batch_size=4 --gradient_accumulation_steps=1 --gradient_checkpointing "
        '--max_train_steps=300 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler="constant" --lr_warmup_steps=0 '
        '--output_dir="sdv1-5-qat_kd" --use_cpu'
    ).split():
        assert flag in train.split()
    assert "--quantized_model_name_or_path sdv1-5-qat_kd/quant_model.pt" in generate
    assert '--captions "a photo of an astronaut riding a horse on mars"' in generate
