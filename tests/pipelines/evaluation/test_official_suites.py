"""Converters on fixtures in the official layouts, with the official counts."""

import csv
import json

import pytest
import yaml

from loomvideo.pipelines.evaluation.suites import covebench, official
from loomvideo.platform.errors import UserError


def spread(counts):
    return [name for name, count in counts.items() for _ in range(count)]


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as out:
        csv.writer(out).writerows([header, *rows])


def make_geneval(root):
    rows = [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo {i}"}
        for i, tag in enumerate(spread(official.GENEVAL_COUNTS))
    ]
    (root / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_imgedit(root):
    types = ["alter" if t == "adjust" else t for t in spread(official.IMGEDIT_COUNTS)]
    rows = {str(i): {"id": f"animal/{i % 50}.jpg", "prompt": f"edit {i}", "edit_type": t} for i, t in enumerate(types)}
    (root / "Basic" / "animal").mkdir(parents=True)
    (root / "Basic" / "basic_edit.json").write_text(json.dumps(rows))


def make_vbench(root):
    # The dimensions share prompts: one set of 72, one of 93, and sets of their own.
    motion = ["subject_consistency", "dynamic_degree", "motion_smoothness"]
    shared = ["overall_consistency", "aesthetic_quality", "imaging_quality"]
    rows = [{"prompt_en": f"moving {i}", "dimension": motion} for i in range(72)]
    rows += [{"prompt_en": f"nice {i}", "dimension": shared} for i in range(93)]
    rows += [{"prompt_en": f"place {i}", "dimension": ["scene", "background_consistency"]} for i in range(86)]
    for name, count in official.VBENCH_COUNTS.items():
        if name not in (*motion, *shared, "scene", "background_consistency"):
            rows += [{"prompt_en": f"{name} {i}", "dimension": [name]} for i in range(count)]
    (root / "VBench_full_info.json").write_text(json.dumps(rows))


def make_openve(root):
    types = [official.OPENVE_TYPES[i % 8] for i in range(431)]
    rows = [[t, f"change {i}", f"videos/{i:04d}.mp4"] for i, t in enumerate(types)]
    write_csv(root / "benchmark_videos.csv", ["edited_type", "prompt", "original_video"], rows)


def make_refvie(root):
    rows = [
        {
            "src_video": f"source_videos/{i}.mp4",
            "ref_img": f"ref_images/{i}.png",
            "instruction": f"use it {i}",
            "edit_type": "subject" if i % 2 else "background",
        }
        for i in range(120)
    ]
    (root / "refvie_bench.yaml").write_text(yaml.safe_dump(rows))


def make_tiv2v(root):
    header = ["edited_type", "index", "condition_video", "condition_image", "prompt"]
    rows = [
        [t, f"{i:05d}", f"IntelligentVBench/videos/TIV2V/{i:05d}.mp4", f"IntelligentVBench/images/{i:05d}.png", "swap"]
        for i, t in enumerate(spread(official.TIV2V_COUNTS), 1)
    ]
    write_csv(root / "csvs" / "TIV2V.csv", header, rows)


def make_mi2v(root):
    for count, total in ((1, 130), (2, 120), (3, 70)):
        header = ["index", *[f"subject_img_{k + 1}" for k in range(count)], "background_img", "prompt"]
        rows = [
            [
                f"{i:05d}",
                *[f"IntelligentVBench/{count}/{i}-{k}.png" for k in range(count)],
                "bg.png" if i % 2 else "",
                "p",
            ]
            for i in range(total)
        ]
        write_csv(root / "csvs" / f"Compositional_MI2V_subject{count}.csv", header, rows)


@pytest.mark.parametrize(
    ("make", "convert", "total", "task"),
    [
        (make_geneval, official.geneval, 553, "t2i"),
        (make_imgedit, official.imgedit, 737, "image_edit"),
        (make_vbench, official.vbench, 946, "t2v"),
        (make_vbench, official.vbench_subset, 165, "t2v"),
        (make_openve, official.openve, 431, "video_edit"),
        (make_refvie, official.refvie, 120, "ref_edit"),
        (make_tiv2v, official.ivbench_tiv2v, 210, "ref_edit"),
        (make_mi2v, official.ivbench_mi2v, 320, "mi2v"),
    ],
)
def test_official_layout_converts_with_its_counts(tmp_path, make, convert, total, task):
    make(tmp_path)
    manifest = convert(tmp_path)
    assert len(manifest.items) == total
    assert manifest.problems == ()
    assert {item.task for item in manifest.items} == {task}
    assert all(item.text for item in manifest.items)
    assert len({item.key for item in manifest.items}) == total


def test_loomvideo_config_has_2536_samples(tmp_path):
    total = 0
    for name in ("geneval", "imgedit", "vbench_subset", "openve", "refvie", "ivbench_tiv2v", "ivbench_mi2v"):
        root = tmp_path / name
        root.mkdir()
        makers = {"vbench_subset": make_vbench, "ivbench_tiv2v": make_tiv2v, "ivbench_mi2v": make_mi2v}
        makers.get(name, globals().get(f"make_{name}"))(root)
        total += len(getattr(official, name)(root).items)
    assert total == 2536


def test_deviations_from_the_official_counts_are_listed(tmp_path):
    make_openve(tmp_path)
    path = tmp_path / "benchmark_videos.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:101]))
    assert official.openve(tmp_path).problems == ("100 samples, the official benchmark has 431",)
    make_geneval(tmp_path)
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(path.read_text().replace('"counting"', '"colors"', 1))
    problems = official.geneval(tmp_path).problems
    assert problems == (
        "colors: 95 samples, the official benchmark has 94",
        "counting: 79 samples, the official benchmark has 80",
    )


def test_missing_media_are_reported_by_key(tmp_path):
    make_refvie(tmp_path)
    manifest = official.refvie(tmp_path)
    (tmp_path / "source_videos").mkdir()
    (tmp_path / "source_videos" / "0.mp4").touch()
    missing = manifest.missing()
    assert len(missing) == 239
    assert missing[0] == "0000: ref_images/0.png"


def test_clusters_are_sources_and_rubrics_know_the_background(tmp_path):
    make_imgedit(tmp_path)
    assert len({item.unit for item in official.imgedit(tmp_path).items}) == 50
    make_mi2v(tmp_path)
    items = official.ivbench_mi2v(tmp_path).items
    assert {(i.extra["subjects"], len(i.references)) for i in items if i.extra["with_background"]} == {
        (1, 2),
        (2, 3),
        (3, 4),
    }
    assert {i.category for i in items} == {"1subject", "2subject", "3subject"}


def test_errors_name_the_file_and_the_field(tmp_path):
    with pytest.raises(UserError, match=r"no benchmark_videos\.csv here"):
        official.openve(tmp_path)
    write_csv(tmp_path / "benchmark_videos.csv", ["prompt", "original_video"], [["x", "y"]])
    with pytest.raises(UserError, match="column 'edited_type' is missing"):
        official.openve(tmp_path)
    (tmp_path / "refvie_bench.yaml").write_text(yaml.safe_dump([{"src_video": "a"}]))
    with pytest.raises(UserError, match="row 0: field 'ref_img' is missing"):
        official.refvie(tmp_path)


def test_limited_takes_from_every_category(tmp_path):
    make_openve(tmp_path)
    manifest = official.openve(tmp_path).limited(16)
    assert set(manifest.counts().values()) == {2}
    assert manifest.digest != official.openve(tmp_path).digest


def test_covebench_keeps_questions_with_their_sample(tmp_path):
    question = {
        "id": "Q1",
        "type": "Single-TF",
        "dimension": "Physical Logic",
        "question": "?",
        "expected_answer": "No",
    }
    groups = [{"questions": [question]}, {"questions": [question | {"id": "Q2", "type": "Score-MCQ"}]}]
    row = {"id": 7, "editing_instruction": "darker", "videoA_path": "data/6.mp4", "evaluation_groups": groups}
    (tmp_path / "checklist.json").write_text(json.dumps([row | {"category": [{"Level 1": "Camera"}]}]))
    manifest = covebench.covebench(tmp_path)
    assert [(i.key, i.category, i.cluster) for i in manifest.items] == [("7", "1 edits", "data/6.mp4")]
    assert [q.name for q in covebench.questions_of(manifest.items[0])] == ["plausible/Q1", "plausible/Q2"]
    assert "2 questions, the official benchmark has 9990" in manifest.problems
    (tmp_path / "checklist.json").write_text(json.dumps([{"id": 1}]))
    with pytest.raises(UserError, match="row 0: field 'editing_instruction' is missing"):
        covebench.covebench(tmp_path)
