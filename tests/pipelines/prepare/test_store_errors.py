"""A remote store that answers with errors for a while, and one that never stops."""

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.files import local_copies
from loomvideo.pipelines.prepare.units import read_planned
from loomvideo.platform.shards import storage
from loomvideo.platform.shards.storage import Storage


@pytest.fixture
def failing(monkeypatch):
    """Makes a method of the in-memory store fail a number of times; retries do not wait."""
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    kind = type(fsspec.filesystem("memory"))

    def fail(method, times):
        working, left = getattr(kind, method), [times]

        def flaky(self, *arguments, **options):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError("500 internal error")
            return working(self, *arguments, **options)

        monkeypatch.setattr(kind, method, flaky)

    return fail


def test_a_plan_is_read_through_a_bad_moment(failing):
    store = Storage("memory://plans")
    with store.staged("work/plans/part.parquet") as path:
        pq.write_table(pa.table({"unit": ["train-0"], "slot": [0], "key": ["a"]}), path)
    failing("_open", 3)
    row = {"unit": "train-0", "part": "part.parquet", "group": 0}
    assert read_planned(store, row) == [{"unit": "train-0", "slot": 0, "key": "a"}]
    with pytest.raises(RuntimeError, match="row group 0 is not train-9"):
        read_planned(store, row | {"unit": "train-9"})


def test_media_are_fetched_through_a_bad_moment_and_lost_with_a_reason_after_it(failing):
    fsspec.filesystem("memory").pipe_file("/media/clip.mp4", b"film")
    failing("_open", 2)
    with local_copies(["memory://media/clip.mp4"]) as names:
        assert Path(names["memory://media/clip.mp4"]).read_bytes() == b"film"
    failing("_open", 9)
    with pytest.raises(DecodeError, match="500 internal error") as lost, local_copies(["memory://media/clip.mp4"]):
        pass
    assert lost.value.reason == "download_failed"
