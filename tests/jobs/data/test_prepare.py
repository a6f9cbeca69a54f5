"""What `data prepare` prints and tracks while it runs."""

import pytest

from loomvideo.jobs.data.prepare import PrepareProgress


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
