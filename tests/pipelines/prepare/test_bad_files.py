"""Files as they come: each ends written or with its reason, the totals add up, nothing hangs."""

import pyarrow.parquet as pq
import pytest
from fixtures.media import bad_files, moving_frames, write_picture, write_video
from fixtures.raw import prepare_config, without_ray

from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.reader import ShardDataset


@pytest.fixture
def built(monkeypatch):
    return without_ray(monkeypatch)


def odd_but_usable(folder):
    """``{name: task}`` of files that look wrong and are not."""
    frames = moving_frames(13, 64, 64)
    write_video(folder / "rotated.mp4", frames, rotation=90)
    write_video(folder / "ten bit.mp4", frames, pixel_format="yuv420p10le")
    write_video(folder / "vfr.mp4", frames, times_ms=[n * 40 + (300 if n > 6 else 0) for n in range(13)])
    write_video(folder / "odd.mkv", moving_frames(13, 66, 50))
    write_video(folder / "-dash ünïcode.mp4", frames)
    write_video(folder / "really_a_video.mp4", frames).rename(folder / "really_a_video.png")
    write_picture(folder / "grey.png", frames[0][..., 0])
    for number, frame in enumerate(frames):
        write_picture(folder / "folder of frames" / f"{number}.png", frame)
    videos = ["rotated.mp4", "ten bit.mp4", "vfr.mp4", "odd.mkv", "-dash ünïcode.mp4", "really_a_video.png"]
    return dict.fromkeys([*videos, "folder of frames"], "t2v") | {"grey.png": "t2i"}


def test_every_file_ends_written_or_with_its_reason(tmp_path, built):
    media = tmp_path / "raw" / "my media"
    media.mkdir(parents=True)
    usable, unusable = odd_but_usable(media), bad_files(media)
    write_video(media / "one.mp4", moving_frames(1))
    write_video(media / "long.mp4", moving_frames(25))
    write_video(media / "small.mp4", moving_frames(13, 48, 32))
    samples = [
        Sample(f"ok-{n}", task, "odd", f"my media/{name}", caption="a bar")
        for n, (name, task) in enumerate(usable.items())
    ]
    samples += [
        Sample(f"bad-{n}", "t2v" if name.endswith(".mp4") or "." not in name else "t2i", "bad", f"my media/{name}",
               caption="a bar")
        for n, name in enumerate(unusable)
    ]  # fmt: skip
    samples += [
        Sample("one-frame", "t2v", "bad", "my media/one.mp4", caption="a bar"),
        Sample("lengths-differ", "video_edit", "odd", "my media/small.mp4", "my media/long.mp4", instruction="cut it"),
        Sample("source-missing", "video_edit", "bad", "my media/long.mp4", "my media/gone.mp4", instruction="cut it"),
        Sample("special-token", "t2i", "bad", "my media/grey.png", caption="a <|image_pad|> bar"),
    ]
    lines = [sample.to_json() for sample in samples] + ["{not json", '{"key": "no-target", "task": "t2i"}']
    (tmp_path / "raw" / "samples.jsonl").write_text("\n".join(lines) + "\n")
    config = prepare_config(tmp_path / "raw", tmp_path / "out", limits=LimitOptions(max_loss=1.0))
    result = prepare(config)

    reasons = {row["key"]: row["reason"] for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()}
    written = set(ShardDataset.open(tmp_path / "out").rows_by_key)
    expected = {f"ok-{n}" for n in range(len(usable))} | {"lengths-differ"}
    assert written == expected, {key: reasons.get(key) for key in expected - written}
    for number, (name, expected) in enumerate(unusable.items()):
        assert reasons.pop(f"bad-{number}") in expected, name
    assert reasons.pop("one-frame") == "too_short"
    assert reasons.pop("source-missing") == "missing_file"
    assert reasons.pop(f"samples.jsonl:{len(samples)}") == "invalid_text"  # a special token in the caption
    assert len(reasons) == 2  # the two lines that are no samples
    summary = result.summary()
    assert summary["inputs"] == len(lines) == summary["written"] + summary["filtered"] + summary["quarantined"]
    pair = ShardDataset.open(tmp_path / "out").read(ShardDataset.open(tmp_path / "out").rows_by_key["lengths-differ"])
    assert pair.tensors["target"]["mean.0"].shape == pair.tensors["source"]["mean.0"].shape
