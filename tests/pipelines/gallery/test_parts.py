"""The gallery's parts: nothing is lost in them, filters are numbers a row, the sample covers every kind."""

import json

import numpy as np
import pytest

from loomvideo.pipelines.gallery.parts import (
    FACETS,
    ROWS_IN_A_PART,
    GalleryWriter,
    read_part,
    read_rows,
    sampled,
    write_part,
)
from loomvideo.pipelines.gallery.rows import GalleryRow
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.storage import Storage


def gallery_row(number: int, **changes) -> GalleryRow:
    """A row; every tenth was left out, and scores come up late."""
    lost = number % 10 == 9
    values = {
        "key": f"key-{number}",
        "dataset": f"set-{number % 3}",
        "task": ("video_edit", "t2v")[number % 2],
        "split": "" if lost else "train",
        "outcome": "filtered" if lost else "written",
        "reason": "no_op" if lost else "",
        "message": "",
        "text": f"text {number} </script> é",
        "group": "",
        "licence": "CC0",
        "size": None if lost else [64, 64],
        "frames": None if lost else 9,
        "fps": None if lost else 24.0,
        "target": f"media/{number} #1.mp4",
        "source": None,
        "references": [],
        "scores": {"sharpness": number / 3} if number >= ROWS_IN_A_PART else {},
    }
    return GalleryRow(**{**values, **changes})


@pytest.fixture
def written(tmp_path):
    storage = Storage(tmp_path)
    writer = GalleryWriter(storage)
    rows = [gallery_row(number) for number in range(2 * ROWS_IN_A_PART + 5)]
    writer.add_all(rows)
    return storage, rows, writer, writer.finish()


def test_rows_come_back(written):
    storage, rows, _, facts = written
    numbers = [0, ROWS_IN_A_PART - 1, ROWS_IN_A_PART, len(rows) - 1]
    for number, row in read_rows(storage, numbers):
        scores = {name: pytest.approx(value, rel=1e-4) for name, value in rows[number]["scores"].items()}
        assert row == rows[number] | {"scores": scores}
    assert facts["rows"] == len(rows)
    with pytest.raises(UserError, match="no row"):
        next(read_rows(storage, [len(rows)]))
    storage.write_bytes("report/rows-000001.js", b"loom(")
    with pytest.raises(UserError, match="damaged; run"):
        next(read_rows(storage, [ROWS_IN_A_PART]))


def test_filters_are_numbers_of_all_rows(written):
    storage, rows, writer, facts = written
    for facet in FACETS:
        codes = np.frombuffer(read_part(storage, f"column-{facet}"), "<u2")
        names = [name for name, _ in facts["facets"][facet]]
        assert [names[code] for code in codes] == [row[facet] for row in rows]
        counts = [sum(row[facet] == name for row in rows) for name in names]
        assert [count for _, count in facts["facets"][facet]] == counts
    measure = facts["measures"]["sharpness"]
    values = np.frombuffer(read_part(storage, measure["file"]), "<f4")
    assert len(values) == len(rows)
    assert np.isnan(values[:ROWS_IN_A_PART]).all()
    assert measure["rows"] == ROWS_IN_A_PART + 5 == sum(measure["bins"])
    assert writer.codes().shape == (len(rows), len(FACETS))
    # What the page knows at first has no row in it.
    assert len(json.dumps(facts)) < 2000


def test_many_values_of_a_facet_share_an_entry(tmp_path):
    writer = GalleryWriter(Storage(tmp_path))
    writer.add_all(gallery_row(number, dataset=f"set-{number}") for number in range(ROWS_IN_A_PART + 3))
    names = dict(writer.finish()["facets"]["dataset"])
    assert len(names) == 1001
    assert names["(other)"] == ROWS_IN_A_PART + 3 - 1000


def test_no_rows_are_a_gallery_too(tmp_path):
    writer = GalleryWriter(Storage(tmp_path))
    assert writer.finish() == {"rows": 0, "part": ROWS_IN_A_PART, "facets": {f: [] for f in FACETS}, "measures": {}}
    assert sampled(writer.codes(), 10) == []


def test_parts_are_written_to_a_store_side_by_side():
    storage = Storage("memory://gallery")
    write_part(storage, "strips", b"{}")
    assert read_part(storage, "strips") == b"{}"
    writer = GalleryWriter(storage)
    writer.add_all(gallery_row(number) for number in range(20 * ROWS_IN_A_PART))
    writer.finish()
    assert set(storage.names("report")) == writer.files | {"strips.js"}
    assert next(read_rows(storage, [19_500]))[1]["key"] == "key-19500"


def test_the_sample_covers_every_kind():
    kinds = np.zeros((1000, len(FACETS)), np.uint16)
    kinds[500:503, FACETS.index("reason")] = 1
    kinds[600:, FACETS.index("task")] = 1
    chosen = sampled(kinds, 60)
    assert len(chosen) == len(set(chosen)) == 60
    assert {500, 501, 502} <= set(chosen)
    assert min(chosen) == 0
    assert max(chosen) == 999
    assert sum(row >= 600 for row in chosen) == pytest.approx(28, abs=2)
    assert sampled(kinds, 2000) == list(range(1000))
    assert sampled(kinds, 0) == []
