"""The documentation against the code: every size and count that a page states, its links and the files it names."""

import re
from collections import Counter

import pytest
import torch
from fixtures.pages import DOCS

from loomvideo.model.codec import LatentGrid, build_codec
from loomvideo.model.conditioning.vocabulary import WORDS_FILE
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import SIZES, model_size
from loomvideo.model.tasks import WORDINGS
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.pipelines.sample_data.generate import plan_groups

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]


def page(name: str) -> str:
    """A page's text in one line, so that line breaks do not matter."""
    return " ".join((DOCS / name).read_text().split())


def rows(name: str, header: str) -> list[list[str]]:
    """The cells of the table under a header line."""
    lines = (DOCS / name).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return table


def test_model_sizes():
    stated = {cells[0]: cells[1:] for cells in rows("model.md", "| model | blocks |")}
    assert set(stated) == set(SIZES)
    for name, cells in stated.items():
        size = model_size(name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in LoomVideoDiT(size.dit).parameters())
        codec = {"dct": "embedded codec", "learned": "learned codec", "wan": "Wan2.2 VAE"}[size.codec.kind]
        millions = f"{parameters / 1e6:,.1f} M" if parameters < 1e9 else f"{parameters / 1e6:,.0f} M"
        assert cells == [
            str(size.dit.num_layers),
            str(size.dit.inner_dim),
            f"{size.dit.num_attention_heads} x {size.dit.attention_head_dim}",
            f"{size.dit.in_channels} ({codec})",
            f"{size.mllm.num_hidden_layers} layers x {size.mllm.hidden_size}"
            + (" (Qwen3-VL-8B)" if size.mllm.kind == "qwen3_vl" else ""),
            millions,
        ]


def test_the_sample_dataset():
    config = SampleDataConfig()
    counts = Counter(plan.split for plan in plan_groups(config) for _ in plan.tasks)
    total, train, heldout = counts.total(), counts["train"], counts["heldout"]
    text = page("sources.md")
    number = {6: "six", 7: "seven", 8: "eight"}[len(config.task_weights)]
    assert f"makes {total:,} samples of {number} tasks ({train:,} train, {heldout} held out)" in text
    assert f"mp4 clips of {config.width}x{config.height}" in text


def test_the_messages_of_the_tasks():
    stated = {cells[0]: cells[1] for cells in rows("conditioning.md", "| kind | content |")}
    assert list(stated) == list(WORDINGS)
    for name, content in stated.items():
        assert content.startswith(WORDINGS[name].opening.rstrip())


def test_codecs_and_vocabulary():
    text = page("conditioning.md")
    channels = {cells[0] for cells in rows("conditioning.md", "| channels |")}
    assert f"{model_size('small').dit.in_channels} (small)" in channels
    tiny = model_size("tiny").codec
    assert f"4x{tiny.spatial_stride}x{tiny.spatial_stride} pixels to {tiny.latent_channels} channels" in text
    assert not [label for label in channels if "(" in label and label.split()[1].strip("()") not in SIZES]
    grid = LatentGrid.of(build_codec(model_size("tiny").codec), model_size("tiny").dit.patch_size)
    assert grid.latent_shape(4 * 3 + 1, 64, 32) == (3 + 1, 32 // tiny.spatial_stride, 64 // tiny.spatial_stride)
    assert "maps 4k+1 frames to k+1 latent frames, 16 times smaller (the learned codec: 8 times)" in text
    words = len(set(WORDS_FILE.read_text().split()))
    assert f"about {round(words, -2)} words of fashion captions" in text


def test_what_stored_features_cost():
    size = model_size("5b")
    kibibytes = size.dit.num_layers * size.mllm.hidden_size * 2 // 1024
    assert f"{kibibytes} KiB in bf16 for the 5b model" in page("data.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_named_are_there(path):
    folders = "platform|model|pipelines|jobs|tests|infra|benchmarks|docs"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)", path.read_text())
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert missing == []


def test_every_page_is_reached_from_the_readme():
    reached = set(re.findall(r"\(docs/([\w./-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert {path.relative_to(DOCS).as_posix() for path in PAGES[1:]} == reached
