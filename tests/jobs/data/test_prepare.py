"""What `data prepare` prints and tracks while it runs, and what `data report` says of a store that takes nothing."""

import errno

import pytest

from loomvideo.jobs.data import tools
from loomvideo.jobs.data.prepare import PrepareProgress
from loomvideo.platform.errors import UserError


def report(**changes):
    found = {
        "stage": "encode",
        "unit": "train-000000",
        "written": 10,
        "lost": 0,
        "num_bytes": 2_000_000,
        "load_s": 40.0,
    }
    return {**found, "load_s": 40.0, "wait_s": 1.0, "encode_s": 98.0, "hold_s": 1.0, "decoders": 3, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "encoding limits: encoders 98% busy, 3 decoders a builder"),
        ({"wait_s": 90.0, "encode_s": 9.0, "decoders": 1}, "decoding limits: encoders 9% busy, 1 decoders a builder"),
        ({"hold_s": 90.0, "encode_s": 9.0}, "writing limits: encoders 9% busy"),
    ],
)
def test_the_limiting_stage_and_how_busy_the_encoders_are(changes, words):
    tracked = []
    with PrepareProgress(lambda figures, step: tracked.append(figures)) as progress:
        assert words in progress._build_rate(report(**changes), 10.0) or not progress._total
        progress(report(**changes), 4)
        assert words in progress._build_rate(report(**changes), 10.0)
    assert tracked[-1]["encoder_busy_share"] == pytest.approx(report(**changes)["encode_s"] / 100)
    assert tracked[-1]["decoders"] == report(**changes)["decoders"]


def test_the_bar_of_shards_grows_with_what_is_built_beside_another_stage():
    with PrepareProgress(lambda figures, step: None) as progress:
        for total in (1, 1 + 2):
            progress(report(), total)
            progress({"stage": "caption", "unit": "caption-000000", "captioned": 64}, 7)
        totals = {task.description: (task.completed, task.total) for task in progress._bar.tasks}
    assert totals == {"encode": (2, 3), "caption": (2, 7)}


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), OSError(errno.EROFS, "Read-only file system")])
def test_a_report_into_a_store_that_takes_nothing_is_refused_in_one_line(monkeypatch, error):
    def refused(*arguments):
        raise error

    monkeypatch.setattr("loomvideo.platform.shards.reader.ShardDataset.open", lambda folder: None)
    monkeypatch.setattr("loomvideo.pipelines.gallery.report.write_report", refused)
    with pytest.raises(UserError, match=r"s3://bucket/set: a report is written beside .*data inspect s3://bucket/set"):
        tools.report("s3://bucket/set", 1, 1.0, serve=False, port=1)
    monkeypatch.setattr("loomvideo.pipelines.gallery.report.is_current", lambda dataset: False)
    with pytest.raises(UserError, match="takes no writing"):
        tools.report("s3://bucket/set", 1, 1.0, serve=True, port=0)
