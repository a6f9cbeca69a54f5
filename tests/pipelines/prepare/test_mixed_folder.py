"""One folder with everything people bring goes through one prepare: every row is written or has its reason."""

import collections
import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures import media_corpus as corpus
from fixtures.media import write_picture
from fixtures.raw import prepare_config, without_ray

from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.platform.shards.reader import ShardDataset

ONE = 1 << 16


def everything(folder):
    """Write the files; returns rows and, for each, None when it must be written or its reasons."""
    clip = corpus.numbered(12, 64, 64)
    quarters = corpus.quarters(64, 64)

    def squeeze(stream):
        stream.codec_context.sample_aspect_ratio = 2

    def hdr(stream):
        stream.codec_context.color_trc = 16

    def groups(stream):
        stream.options = {"crf": "4", "bf": "2", "g": "8", "sc_threshold": "0"}

    videos = {
        "turned.mp4": lambda p: corpus.video(p, clip, matrix=(0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30)),
        "mirrored.mp4": lambda p: corpus.video(p, clip, matrix=(-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)),
        "squeezed.mp4": lambda p: corpus.video(p, clip, prepare=squeeze),
        "raw.h264": lambda p: corpus.video(p, clip, container_format="h264"),
        "old.avi": lambda p: corpus.video(p, clip, "mpeg4"),
        "ten bits #1.mp4": lambda p: corpus.video(p, clip, pixel_format="yuv420p10le"),
        "alpha?v=1.mov": lambda p: corpus.video(p, clip, "prores_ks", "yuva444p10le"),
        "fragments%20.mp4": lambda p: corpus.video(p, clip, options={"movflags": "frag_keyframe+empty_moov"}),
        "cut.mp4": lambda p: corpus.stream_copy(
            corpus.video(p.with_suffix(".mkv"), corpus.numbered(24, 64, 64), prepare=groups), p, 5
        ),
        "fast.mp4": lambda p: corpus.video(p, corpus.numbered(24, 64, 64), rate=48),
        "play.gif": lambda p: corpus.animation(p, 40, "GIF", 12),
    }
    pictures = {
        "oriented.jpg": lambda p: corpus.oriented(p, 6),
        "profile.jpg": lambda p: corpus.jpeg_with_profile(p, quarters, 1.8),
        "clear.png": lambda p: write_picture(p, np.dstack((quarters, quarters[..., :1]))),
        "grey.png": lambda p: write_picture(p, quarters[..., 0]),
        "\N{DRESS}.webp": lambda p: write_picture(p, quarters),
    }
    bad = {
        "empty.mp4": (b"", "empty_file"),
        "page.mp4": (b"<!DOCTYPE html><html>", "not_media"),
        "pointer.mp4": (b"version https://git-lfs.github.com/spec/v1\n", "not_media"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported"),
        "bomb.png": (corpus.bomb(), "too_large"),
        "noise.mp4": (np.random.default_rng(0).bytes(3000), "unreadable"),
    }
    rows = []
    for name, make in (videos | pictures).items():
        make(folder / name)
        rows.append(({"task": "t2v" if name in videos else "t2i", "target": name, "caption": f"{name} grey"}, None))
    corpus.video(folder / "hdr.mp4", clip, pixel_format="yuv420p10le", prepare=hdr)
    rows.append(({"task": "t2v", "target": "hdr.mp4", "caption": "x"}, "hdr"))
    for name, (content, reason) in bad.items():
        (folder / name).write_bytes(content)
        rows.append(({"task": "t2i" if "png" in name else "t2v", "target": name, "caption": "x"}, reason))
    good = {"task": "t2i", "target": "grey.png", "caption": "a"}
    rows += [
        (good | {"target": "absent.png"}, "missing_file"),
        (good | {"caption": 12}, "invalid_field"),
        (good | {"caption": float("nan")}, "no_text"),
        (good | {"caption": "half \ud83d"}, "invalid_text"),
        (good | {"caption": "<|im_end|>"}, "invalid_text"),
        (good | {"target": ["a", "b"]}, "invalid_field"),
        (good | {"split": "holdback"}, "invalid_field"),
        (good | {"task": "dance"}, "invalid_sample"),
    ]
    return [(row | {"key": f"{n}.0/é", "dataset": "mixed"}, reason) for n, (row, reason) in enumerate(rows)]


@pytest.mark.slow
def test_every_row_of_a_mixed_folder_is_written_or_has_its_reason(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = everything(folder)
    (folder / "._samples.jsonl").write_bytes(b"\0\5\26\7")
    lines = [json.dumps(row) for row, _ in rows] + ["{no json", "[" * 10_000]
    (folder / "samples.jsonl").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    config = prepare_config(folder, tmp_path / "out", limits=LimitOptions(max_loss=1.0))
    config = dataclasses.replace(config, heldout_fraction=0.0)
    prepare(config)

    lost = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    expected = collections.Counter(reason for _, reason in rows if reason) + collections.Counter(invalid_json=2)
    assert collections.Counter(row["reason"] for row in lost) == expected, [(r["reason"], r["message"]) for r in lost]
    dataset = ShardDataset.open(tmp_path / "out")
    assert len(dataset) == sum(reason is None for _, reason in rows)
    assert all("\n" not in row["message"] for row in lost)
    # Read, written and lost add up.
    assert len(dataset) + len(lost) == len(rows) + 2
