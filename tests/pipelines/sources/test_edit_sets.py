"""Readers of published sets of edits, each on a tiny folder in the layout that its card or its own loader states."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError


def read(path: Path, format: str = "auto", **options) -> tuple[list[Sample], list[Rejected]]:
    found = list(open_source(str(path), format, **options))
    return [o for o in found if isinstance(o, Sample)], [o for o in found if isinstance(o, Rejected)]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gpt_row(task: str, name: str, **changes) -> dict:
    return {
        "id": f"omniedit_{task}_{name}", "dataset_source": "omniedit", "task": task, "input": f"input/{name}.png",
        "output": f"output/{name}.png", "instruction": "remove the car", "instruction_type": "original",
        "input_description": "a car", **changes,
    }  # fmt: skip


@pytest.fixture
def gpt_image_edit(tmp_path):
    root = tmp_path / "gpt-edit"
    for folder, rows in {
        "omniedit/removal": [gpt_row("removal", "1"), gpt_row("removal", "2", instruction="")],
        "omniedit/style": [gpt_row("style", "1", instruction_type="rewrite", instruction_original="oil")],
        "hqedit/edit": [gpt_row("edit", "7", dataset_source="hqedit")],
    }.items():
        for name in ("input", "output"):
            (root / folder / name).mkdir(parents=True)
        write(root / folder / "metadata" / f"{folder.replace('/', '_')}.json", json.dumps(rows))
    return tmp_path


def test_gpt_image_edit(gpt_image_edit):
    samples, rejected = read(gpt_image_edit)
    root = gpt_image_edit / "gpt-edit"
    assert [s.target for s in samples] == [
        f"{root}/{name}" for name in ("hqedit/edit/output/7.png", "omniedit/removal/output/1.png",
                                      "omniedit/style/output/1.png")
    ]  # fmt: skip
    assert samples[1].source == f"{root}/omniedit/removal/input/1.png"
    assert {s.task for s in samples} == {"image_edit"}
    # One input picture in two tasks of a set stays on one side of the split.
    assert samples[1].group == samples[2].group != samples[0].group
    assert samples[2].extra["instruction_original"] == "oil"
    assert samples[1].extra["source_id"] == "omniedit_removal_1"
    assert samples[0].licence == "CC-BY-4.0"
    assert [(r.reason, r.detail) for r in rejected] == [("missing_field", "no instruction")]


@pytest.mark.parametrize("place", ["gpt-edit", "gpt-edit/omniedit", "gpt-edit/omniedit/removal",
                                   "gpt-edit/omniedit/removal/metadata/omniedit_removal.json"])  # fmt: skip
def test_gpt_image_edit_from_any_of_its_folders(gpt_image_edit, place):
    format = "gpt_image_edit" if place.endswith(".json") else "auto"
    samples, _ = read(gpt_image_edit / place, format)
    wanted = f"{gpt_image_edit}/gpt-edit/omniedit/removal/output/1.png"
    assert wanted in [sample.target for sample in samples]


def seed_line(name: str, **changes) -> str:
    row = {"source_image": f"source_images/{name}.jpg", "target_image": f"target_images/{name}.jpg"}
    return json.dumps(row | {"instruction": "Erase the car."} | changes)


def test_seed_data_edit(tmp_path):
    base = tmp_path / "auto_editing/openimages"
    (base / "images/source_images").mkdir(parents=True)
    lines = [seed_line("f6"), seed_line("f6", instruction="Add a dog."), json.dumps({"source_image": "a.jpg"})]
    write(base / "annotations/split_0001.jsonl", "\n".join(lines))
    write(base / "annotations_GPT4V/split_0001.jsonl", seed_line("f6", instruction="Please take the car away."))
    for place in (tmp_path, base):
        samples, rejected = read(place)
        assert [s.instruction for s in samples] == ["Erase the car.", "Add a dog."]
        assert samples[0].source == f"{base}/images/source_images/f6.jpg"
        assert samples[0].target == f"{base}/images/target_images/f6.jpg"
        assert samples[0].group == samples[1].group
        assert samples[0].licence == "CC-BY-NC-4.0"
        assert rejected[0].detail == "no target_image"
    samples, _ = read(tmp_path, annotations="annotations_GPT4V")
    assert [s.instruction for s in samples] == ["Please take the car away."]
    with pytest.raises(UserError, match=r"annotations_x: no \.jsonl; set annotations"):
        read(tmp_path, annotations="annotations_x")
    with pytest.raises(UserError, match="unpack the archives"):
        read(tmp_path / "auto_editing", "seed_data_edit")


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_x2edit(tmp_path):
    stated = {"instruction": "make it night", "instruction_zh": "夜晚", "task": "tune_transfer", "label": "Kontext",
              "liqe_score": 4.1}  # fmt: skip
    tar_of(
        tmp_path / "00000.tar",
        {
            "000000000.1.0.jpg": jpeg(1), "000000000.2.jpg": jpeg(2), "000000000.json": json.dumps(stated).encode(),
            "000000000.txt": "夜晚[4.1]".encode(),
            # Older writers put a dot before the role.
            "000000001..1.jpg": jpeg(1), "000000001..2.jpg": jpeg(3),
            "000000001.json": json.dumps({"caption_en": ["a red box", "x"], "label": "AnyEdit"}).encode(),
            "000000002.1.0.jpg": jpeg(4), "000000002.json": b"{}",
            "000000003.1.0.jpg": jpeg(1), "000000003.2.jpg": jpeg(5), "000000003.json": b"{}",
        },
    )  # fmt: skip
    samples, rejected = read(tmp_path, extract=str(tmp_path / "extracted"))
    assert [s.instruction for s in samples] == ["make it night", "a red box"]
    assert Path(samples[0].source).read_bytes() == jpeg(1)
    assert Path(samples[0].target).read_bytes() == jpeg(2)
    assert samples[0].group == samples[1].group
    assert samples[0].extra == {"task": "tune_transfer", "label": "Kontext", "liqe_score": 4.1,
                                "source_id": "000000000"}  # fmt: skip
    assert [r.reason for r in rejected] == ["missing_media", "no_text"]


def test_other_tars_are_not_x2edit(tmp_path):
    tar_of(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"a box"})
    samples, _ = read(tmp_path, extract=str(tmp_path / "extracted"))
    assert (samples[0].dataset, samples[0].caption) == ("webdataset", "a box")


def test_insvie(tmp_path):
    lines = ["video,caption,instruct,edited_caption,folder", "pexel_1.mp4,a street,make it rain,a wet street,part1",
             "pexel_2.mp4,a street,,,part1", ",a,b,c,d"]  # fmt: skip
    write(tmp_path / "train.csv", "\n".join(lines))
    samples, rejected = read(tmp_path, "insvie", source="original", target="edited")
    (sample,) = samples
    assert (sample.source, sample.target) == (f"{tmp_path}/original/pexel_1.mp4", f"{tmp_path}/edited/pexel_1.mp4")
    assert (sample.task, sample.instruction) == ("video_edit", "make it rain")
    assert sample.extra == {"source_caption": "a street", "edit_caption": "a wet street"}
    assert [r.reason for r in rejected] == ["no_text", "missing_field"]
    with pytest.raises(UserError, match=r"set source_options\.target to the folder"):
        read(tmp_path, "insvie", source="original")
    write(tmp_path / "train.csv", "video,caption\na.mp4,b")
    with pytest.raises(UserError, match="2 columns; expected name, caption, instruction"):
        read(tmp_path, "insvie", source="original", target="edited")
