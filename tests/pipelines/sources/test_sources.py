"""Readers of published layouts, each on a tiny fixture in the real layout; the media are empty: nothing decodes."""

import csv
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loomvideo.pipelines.sources import FORMATS, Rejected, open_source
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_csv(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read(path: Path | str, format: str = "auto", **options) -> tuple[list[Sample], list[Rejected]]:
    outcomes = list(open_source(str(path), format, **options))
    samples = [o for o in outcomes if isinstance(o, Sample)]
    assert len({s.key for s in samples}) == len(samples), "keys must be unique"
    for sample in samples:
        sample.validate("fixture")
    return samples, [o for o in outcomes if isinstance(o, Rejected)]


def test_own_jsonl(tmp_path):
    lines = [
        {"key": "a", "task": "t2v", "dataset": "d", "target": "m/a.mp4", "caption": "a cat"},
        {"key": "b", "task": "video_edit", "dataset": "d", "target": "b.mp4", "caption": "no source"},
        {"key": "c", "task": "t2v", "dataset": "d", "target": "s3://x/c.mp4", "caption": "remote"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{broken\n\n"
    (tmp_path / "samples.jsonl").write_text(text)
    for place in (tmp_path, tmp_path / "samples.jsonl"):
        samples, rejected = read(place)
        assert [s.target for s in samples] == [f"{tmp_path}/m/a.mp4", "s3://x/c.mp4"]
        assert [(r.where, r.reason) for r in rejected] == [
            (f"{tmp_path}/samples.jsonl:2", "invalid_sample"),
            (f"{tmp_path}/samples.jsonl:4", "invalid_json"),
        ]


def test_own_parquet(tmp_path):
    rows = [{"key": "a", "task": "mi2v", "dataset": "d", "target": "a.mp4", "references": ["r.png"], "caption": "x",
             "extra": '{"k": 1}'},
            {"key": "b", "task": "mi2v", "dataset": "d", "target": "a.mp4", "references": [], "caption": "x",
             "extra": None}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    samples, rejected = read(tmp_path / "s.parquet")
    assert samples[0].references == [f"{tmp_path}/r.png"]
    assert samples[0].extra == {"k": 1}
    assert rejected[0].reason == "invalid_sample"


def test_loomvideo_folder_with_all_six_templates(tmp_path):
    templates = [
        {"text": "a dog", "path": "v/0.mp4"},
        {"caption": "a cat", "image_path": "i/1.png"},
        {"source_video_path": "v/s.mp4", "instruction": "red", "target_video_path": "v/t.mp4"},
        {"source_image_path": "i/s.png", "instruction": "blue", "target_image_path": "i/t.png"},
        {"instruction": "dance", "reference_image_paths": ["i/r.png", "i/q.png"], "target_video_path": "v/m.mp4"},
        {"source_video_path": "v/s.mp4", "reference_image_paths": ["i/r.png"], "instruction": "wear",
         "target_video_path": "v/u.mp4", "save_path": "out.mp4"},
        {"title": "what is this"},
    ]  # fmt: skip
    for number, row in enumerate(templates):
        write_json(tmp_path / "single_jsons" / f"{number}.json", row)
    (tmp_path / "single_jsons" / "10.json").write_text("{")
    samples, rejected = read(tmp_path)
    assert [s.task for s in samples] == ["t2v", "t2i", "video_edit", "image_edit", "mi2v", "ref_edit"]
    assert samples[4].references == [f"{tmp_path}/i/r.png", f"{tmp_path}/i/q.png"]
    assert samples[2].group == samples[5].group
    assert [r.reason for r in rejected] == ["missing_field", "invalid_json"]


def test_kiwi_csv_of_images_and_videos_and_refvie_parquet(tmp_path):
    write_csv(tmp_path / "image_edit_metadata/a.csv",
              {"src_video": "img/1.png", "tgt_video": "img/1e.png", "prompt": "make it night"})  # fmt: skip
    write_csv(tmp_path / "video_edit_metadata/b.csv",
              {"src_video": "vid/1.mp4", "tgt_video": "vid/1e.mp4", "prompt": "add snow", "ref_image": ""},
              {"src_video": "vid/2.mp4", "tgt_video": "vid/2e.mp4", "prompt": "use it", "ref_image": "r.png"},
              {"src_video": "vid/3.mp4", "tgt_video": "", "prompt": "x", "ref_image": ""})  # fmt: skip
    picture = b"\x89PNG" + b"0" * 20
    (tmp_path / "refvie_477k").mkdir()
    row = {"iid": 7, "prompt": "swap", "src_video": "vid/1.mp4", "tgt_video": "vid/4.mp4", "ref_image_bytes": picture}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "refvie_477k/chunk_0.parquet")
    samples, rejected = read(tmp_path, extract=str(tmp_path / "extracted"))
    assert [s.task for s in samples] == ["image_edit", "video_edit", "ref_edit", "ref_edit"]
    assert Path(samples[3].references[0]).read_bytes() == picture
    assert samples[1].group == samples[3].group == "vid/1.mp4"
    assert [r.detail for r in rejected] == ["no tgt_video"]


def test_ditto(tmp_path):
    touch(tmp_path, "videos/source/a.mp4", "videos/global/h_0.mp4")
    write_json(tmp_path / "training_metadata/global.json",
               [{"source_path": "source/a.mp4", "edited_path": "global/h_0.mp4", "instruction": "as a painting"},
                {"source_path": "source/a.mp4", "edited_path": "global/h_1.mp4"}])  # fmt: skip
    write_json(tmp_path / "source_video_captions/c.json", [{"path": "source/a.mp4", "caption": "a street"}])
    samples, rejected = read(tmp_path)
    assert samples[0].source == f"{tmp_path}/videos/source/a.mp4"
    assert samples[0].extra["source_caption"] == "a street"
    assert samples[0].licence == "CC-BY-NC-SA-4.0"
    assert rejected[0].detail == "no instruction"


def test_openve_needs_a_map_for_unknown_columns_only(tmp_path):
    write_csv(tmp_path / "local_add.csv", {"original_video": "a.mp4", "edited_video": "b.mp4", "prompt": "add a hat"})
    samples, _ = read(tmp_path / "local_add.csv", "openve")
    assert (samples[0].task, samples[0].instruction) == ("video_edit", "add a hat")
    write_csv(tmp_path / "odd.csv", {"before": "a.mp4", "after": "b.mp4", "words": "add a hat"})
    with pytest.raises(UserError, match=r"set columns.target=…; columns: before, after, words"):
        read(tmp_path / "odd.csv", "openve")
    columns = {"source": "before", "target": "after", "instruction": "words"}
    samples, _ = read(tmp_path / "odd.csv", "openve", columns=columns)
    assert samples[0].source == f"{tmp_path}/a.mp4"


def test_openvid_keys_and_groups(tmp_path):
    names = ["---_iRTHryQ_13_0to241.mp4", "---_iRTHryQ_14_0to80.mp4"]
    touch(tmp_path, *(f"video/{n}" for n in names))
    scores = {"aesthetic score": 5.1, "motion score": 2, "temporal consistency score": 0.9, "camera motion": "static"}
    row = {"caption": "a reef", **scores, "frame": 240, "fps": 24, "seconds": 10}
    write_csv(tmp_path / "data/train/OpenVid-1M.csv", *({"video": n, **row} for n in names))
    samples, _ = read(tmp_path)
    assert [s.target for s in samples] == [f"{tmp_path}/video/{n}" for n in names]
    assert {s.group for s in samples} == {"---_iRTHryQ"}
    assert samples[0].extra["aesthetic_score"] == 5.1
    assert samples[0].extra["camera_motion"] == "static"


def test_koala_with_cut_clips_and_whole_videos(tmp_path):
    touch(tmp_path, "videos/abc_1.mp4", "videos/x-Y_z.mp4")
    row = {"timestamp": "['0:00:10.500', '0:01:02.000']", "caption": "a lake", "clarity_score": 0.9}
    write_csv(tmp_path / "koala.csv",
              {"videoID": "abc_1", "url": "https://www.youtube.com/watch?v=abc", **row},
              {"videoID": "x-Y_z_3", "url": "https://www.youtube.com/watch?v=x-Y_z", **row},
              {"videoID": "gone_3", "url": "https://www.youtube.com/watch?v=gone", **row},
              {"videoID": "x-Y_z_4", "url": "", **row, "timestamp": "later"})  # fmt: skip
    samples, rejected = read(tmp_path)
    assert [s.target for s in samples] == [f"{tmp_path}/videos/abc_1.mp4", f"{tmp_path}/videos/x-Y_z.mp4#t=10.5,62"]
    assert [s.group for s in samples] == ["abc", "x-Y_z"]
    assert [r.reason for r in rejected] == ["missing_media", "invalid_field"]


def test_phantom_cuts_references_out_of_koala(tmp_path):
    touch(tmp_path, "clips/a_1.mp4", "clips/b_2.mp4")
    relative = {"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0}
    pixels = {"x_min": 76, "y_min": 0, "x_max": 152, "y_max": 100}
    rows = [
        {"vid": "a_1", "video_caption": "a man", "cross_pair": json.dumps(
            {"a man": {"obj_from_tgt_video": {}, "refer_result": [{"bbox": relative, "frame_idx": 0.5}]},
             "a hat": {"refer_result": [{"vid": "b_2", "bbox": pixels, "frame_idx": 0.25}]}})},
        {"vid": "a_1", "video_caption": "nobody", "cross_pair": "{}"},
        {"vid": "zz", "video_caption": "gone", "cross_pair": "{}"},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "koala36M_multi_ref_merged_filtered.parquet")
    samples, rejected = read(tmp_path / "koala36M_multi_ref_merged_filtered.parquet")
    assert samples[0].references == [f"{tmp_path}/clips/a_1.mp4#at=0.5&xywh=percent:25,50,50,50",
                                     f"{tmp_path}/clips/b_2.mp4#at=0.25&xywh=pixel:76,0,76,100&side=768"]  # fmt: skip
    assert samples[0].extra["subjects"] == ["a man", "a hat"]
    assert [r.reason for r in rejected] == ["unpaired", "missing_media"]


def test_opens2v(tmp_path):
    clip = {
        "metadata": {"cut": [10, 91], "crop": [0, 1280, 0, 720], "fps": 24, "path": "v/a.mp4", "cap": ["a woman"],
                     "aesthetic": 5.0},
        "annotation": {"ann_frame_data": {"ann_frame_idx": 12, "annotations": [
            {"class_name": "hat", "bbox": [10, 10, 30, 30]}, {"class_name": "woman", "bbox": [0, 0, 300, 600]}]}},
    }  # fmt: skip
    write_json(tmp_path / "part1.json", {"a_cut": clip, "b_cut": {"metadata": {}}})
    samples, rejected = read(tmp_path / "part1.json")
    assert samples[0].target == f"{tmp_path}/v/a.mp4#frames=10,91&xywh=pixel:0,0,1280,720"
    assert samples[0].references[0] == f"{tmp_path}/v/a.mp4#frame=12&xywh=pixel:0,0,300,600"
    assert samples[0].extra["subjects"] == ["woman", "hat"]
    assert rejected[0].detail == "no metadata.path"


def uses(samples: list[Sample]) -> list[str]:
    return [s.extra["use"] for s in samples]


def test_viton_hd_pairs_the_test_set_by_name(tmp_path):
    touch(tmp_path, *(f"{part}/{d}/{n}" for part, n in (("train", "00001_00.jpg"), ("test", "00002_00.jpg"))
                      for d in ("image", "cloth", "agnostic-v3.2")), "test/cloth/00009_00.jpg")  # fmt: skip
    (tmp_path / "train_pairs.txt").write_text("00001_00.jpg 00001_00.jpg\n00003_00.jpg 00003_00.jpg\n")
    (tmp_path / "test_pairs.txt").write_text("00002_00.jpg 00009_00.jpg\n")
    samples, rejected = read(tmp_path)
    assert uses(samples) == ["try_on_image", "wear", "t2i_ref"] * 2
    test = samples[3]
    assert (test.split, test.source) == ("heldout", f"{tmp_path}/test/agnostic-v3.2/00002_00.jpg")
    assert test.references == [f"{tmp_path}/test/cloth/00002_00.jpg"]
    assert test.extra["unpaired_garment"] == f"{tmp_path}/test/cloth/00009_00.jpg"
    assert rejected[0].detail == "no train/image/00003_00.jpg"


def test_dresscode(tmp_path):
    touch(tmp_path, "dresses/images/020714_0.jpg", "dresses/images/020714_1.jpg", "upper_body/images/048392_0.jpg")
    (tmp_path / "dresses/train_pairs.txt").write_text("020714_0.jpg\t020714_1.jpg\n")
    (tmp_path / "upper_body/test_pairs_paired.txt").write_text("048392_0.jpg 048392_1.jpg\nodd\n")
    samples, rejected = read(tmp_path, uses=["wear", "flat_lay"])
    assert [s.instruction for s in samples] == ["Show this dress worn by a person.",
                                                "Show the dress alone as a product picture."]  # fmt: skip
    assert {s.group for s in samples} == {"020714"}
    assert [r.reason for r in rejected] == ["missing_media", "invalid_field"]


def test_vivid_in_both_layouts(tmp_path):
    flat, cut = tmp_path / "flat", tmp_path / "cut"
    touch(flat, "videos/video0.mp4", "videos/video1.mp4", "agnostic/video0.mp4", "cloth/cloth0.jpg")
    samples, rejected = read(flat)
    assert uses(samples) == ["try_on_video", "mi2v"]
    assert samples[0].task == "ref_edit"
    assert rejected[0].reason == "unpaired"
    touch(cut, "dresses/videos/803137_in_xl.mp4", "dresses/images/803137_in_xl.jpg",
          "dresses/agnostic_mask_smoothed/803137_in_xl.mp4")  # fmt: skip
    rows = [{"video": "803137_in_xl.mp4", "image": "803137_in_xl.jpg", "front_seqs": [5, 40], "subdir": "dresses"},
            {"video": "gone.mp4", "image": "gone.jpg", "front_seqs": [0, 1], "subdir": "dresses"}]  # fmt: skip
    samples, _ = read(cut)
    assert samples[0].caption == "A person wearing the dress of the reference image."
    (cut / "test_data_180.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, rejected = read(cut, front_only=True)
    assert samples[0].target == f"{cut}/dresses/videos/803137_in_xl.mp4#frames=5,40"
    assert samples[0].split == "heldout"
    assert rejected[0].reason == "missing_media"


def test_vvt_groups_people_with_the_garments_shown_on_them(tmp_path):
    for person in ("4he21d00f-g11", "rah421001-q11", "lonely"):
        touch(tmp_path, f"test_frames/{person}/{person}_001.png", f"test_agn_mask_new/{person}/1.png")
    for person in ("4he21d00f-g11", "rah421001-q11"):
        touch(tmp_path, f"lip_clothes_person/{person}/{person}_cloth_front.jpg", f"lip_clothes_person/{person}/p.jpg")
    (tmp_path / "test_person_clothes_pose_tuple.txt").write_text("4he21d00f-g11 rah421001-q11 4he21d00f-g11\n")
    samples, rejected = read(tmp_path)
    assert [s.task for s in samples] == ["mi2v", "mi2v"]
    assert samples[0].target == f"{tmp_path}/test_frames/4he21d00f-g11"
    assert len({s.group for s in samples}) == 1
    assert rejected[0].reason == "unpaired"


@pytest.mark.parametrize("names", [("garment.png", "garment_caption.txt"), ("in.png", "caption.txt")])
def test_eevee_under_both_sets_of_names(tmp_path, names):
    garment, caption = names
    folder = "dresses/00030"
    touch(tmp_path, *(f"{folder}/{n}" for n in (garment, "garment_detail.png", "person.png", "person_agnostic.png",
          "video_0.mp4", "video_0_agnostic.mp4", "video_1.mp4")))  # fmt: skip
    (tmp_path / folder / caption).write_text("a long dress")
    write_csv(tmp_path / "dresses_test.csv", {"Person": "dresses/00030"})
    samples, rejected = read(tmp_path)
    assert uses(samples) == ["try_on_image", "wear", "t2i_ref", "try_on_video", "mi2v", "mi2v"]
    assert {s.split for s in samples} == {"heldout"}
    assert len(samples[4].references) == 2
    assert not rejected
    assert uses(read(tmp_path, shots="close")[0])[-1] == "mi2v"


def test_deepfashion_multimodal(tmp_path):
    stem = "WOMEN-Dresses-id_00000002-02"
    names = [f"{stem}_1_front.jpg", f"{stem}_2_side.jpg", f"{stem}_6_flat.jpg"]
    touch(tmp_path, *(f"images/{n}" for n in names), "images/odd.jpg")
    write_json(tmp_path / "captions.json", {names[0]: "She wears a long dress."})
    (tmp_path / "labels/texture").mkdir(parents=True)
    (tmp_path / "labels/texture/fabric_ann.txt").write_text(f"{names[0]} 1 7 7\n")
    samples, rejected = read(tmp_path)
    assert [s.task for s in samples] == ["t2i", "image_edit", "image_edit", "t2i"]
    assert samples[0].extra["upper_fabric"] == "cotton"
    assert samples[1].instruction == "Show the person from the side."
    assert {s.group for s in samples} == {"WOMEN-Dresses-id_00000002"}
    assert rejected[0].reason == "invalid_field"


def test_product_feed(tmp_path):
    write_csv(
        tmp_path / "feed.csv",
        {"sku": "A1", "image_paths": "a/flat.jpg|a/model.jpg|a/back.jpg", "video_path": "a/v.mp4",
         "title": "Red wrap dress", "attributes": '{"category": "dress", "colour": "red"}'},
        {"sku": "A2", "image_paths": "b/flat.jpg", "video_path": "", "title": "Hat", "attributes": ""},
        {"sku": "", "image_paths": "c.jpg", "video_path": "", "title": "", "attributes": ""},
        {"sku": "A4", "image_paths": "c.jpg|d.jpg", "video_path": "", "title": "x", "attributes": "{"},
    )  # fmt: skip
    samples, rejected = read(tmp_path / "feed.csv")
    assert uses(samples) == ["wear", "t2i_ref", "t2i", "mi2v", "animate", "t2v", "wear", "t2i_ref", "t2i"]
    assert {s.group for s in samples} == {"A1"}
    assert samples[0].extra["attributes"]["colour"] == "red"
    assert [r.reason for r in rejected] == ["unpaired", "missing_field", "invalid_field"]
    renamed = read(tmp_path / "feed.csv", "product_feed", columns={"title": "sku"}, uses=["t2v"])[0]
    assert renamed[0].caption == "A1"


def test_column_map(tmp_path):
    row = {"id": "7", "clip file": "a.mp4", "ctrl": "b.mp4", "say": "light", "r1": "x.png", "r2": "", "score": "0.5"}
    write_csv(tmp_path / "t.csv", row, row | {"id": "8", "clip file": ""})
    columns = {"key": "clip-{id}", "target": "clip file", "source": "{ctrl}", "instruction": "say",
               "references": ["r1", "r2"]}  # fmt: skip
    samples, rejected = read(tmp_path / "t.csv", "table", columns=columns, media="/media", licence="own")
    assert samples[0].key == "clip-7"
    assert (samples[0].task, samples[0].target, samples[0].source) == ("ref_edit", "/media/a.mp4", "/media/b.mp4")
    assert samples[0].references == ["/media/x.png"]
    assert samples[0].extra == {"score": "0.5"}
    assert [r.detail for r in rejected] == ["no target"]
    with pytest.raises(UserError, match="no column 'klip'; columns: id, clip file"):
        read(tmp_path / "t.csv", "table", columns={"target": "klip"})
    with pytest.raises(UserError, match=r"columns.colour: no such field"):
        read(tmp_path / "t.csv", "table", columns={"colour": "id"})


@pytest.mark.parametrize(
    ("row", "task"),
    [({"path": "a.mp4", "cap": "x"}, "t2v"), ({"file_path": "a.png", "text": "x", "type": "image"}, "t2i"),
     ({"video_path": "a.mp4", "control_path": "b.mp4", "caption": "x"}, "video_edit"),
     ({"media_path": "a.mp4", "reference_video": "b.mp4", "caption": "x"}, "video_edit"),
     ({"video": "a.mp4", "prompt": "x"}, "t2v")],
)  # fmt: skip
def test_tables_of_other_trainers_need_no_map(tmp_path, row, task):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\nnot json\n[1]\n")
    samples, rejected = read(tmp_path / "t.jsonl")
    assert samples[0].task == task
    assert samples[0].text == "x"
    assert [r.reason for r in rejected] == ["invalid_json", "invalid_json"]


def test_tsv_with_byte_order_mark_and_ragged_rows(tmp_path):
    (tmp_path / "t.tsv").write_text("\ufeffvideo\tcaption\na.mp4\tx\nb.mp4\nc.mp4\ty\tz\n", encoding="utf-8")
    samples, rejected = read(tmp_path / "t.tsv")
    assert [s.caption for s in samples] == ["x"]
    assert [r.reason for r in rejected] == ["invalid_field"] * 2


def test_object_storage_gives_urls():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/train_pairs.txt", b"1_0.jpg 1_0.jpg\n")
    for folder in ("image", "cloth"):
        fs.pipe_file(f"/bucket/train/{folder}/1_0.jpg", b"x")
    samples, _ = read("memory://bucket")
    assert samples[0].source.startswith("memory://")
    assert fsspec.open(samples[0].source).open().read() == b"x"


def test_same_rows_have_the_same_keys_wherever_they_are_read_from(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "/x/a.mp4", "caption": "x"}))
    first = read(tmp_path / "a.jsonl", dataset="d")[0][0].key
    (tmp_path / "b.jsonl").write_text('\n{"caption": "x", "video": "/x/a.mp4"}\n')
    assert read(tmp_path / "b.jsonl", dataset="d")[0][0].key == first


def test_mistakes_name_the_fix(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(UserError, match="format not recognised"):
        read(tmp_path)
    with pytest.raises(UserError, match="did you mean viton_hd"):
        read(tmp_path, "vitonhd")
    with pytest.raises(UserError, match="unknown option 'use'; its options: uses"):
        read(tmp_path, "viton_hd", use=["wear"])
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "gone")
    touch(tmp_path, "train/cloth/1.jpg", "train/image/1.jpg")
    (tmp_path / "train_pairs.txt").write_text("1.jpg 1.jpg\n")
    with pytest.raises(UserError, match="'try_on' is none of"):
        read(tmp_path, "viton_hd", uses=["try_on"])


def test_every_format_has_help():
    assert all(f.help.endswith(".") for f in FORMATS.values())
