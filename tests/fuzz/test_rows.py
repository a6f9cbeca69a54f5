"""Random rows, tables, overrides and names: anything but a sample, a rejection or one line is a fault."""

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("hypothesis", reason="make setup-dev")
from hypothesis import given
from hypothesis import strategies as st

from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.fields import KEY_PATTERN
from loomvideo.pipelines.sources.samples import Sample, parse_sample
from loomvideo.platform.config import load_config, option, to_yaml
from loomvideo.platform.errors import UserError
from loomvideo.platform.tracking import metric_name

FIELDS = [f.name for f in dataclasses.fields(Sample)]

text = st.text(st.characters(codec=None), max_size=40)
# Half of all texts are such as rows really have.
usual = st.sampled_from(
    ["a.mp4", "b.png", "t2v", "image_edit", "train", "val", "s3://b/k.mp4", "17", "N/A", "a dress", "../x"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text | usual,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(st.sampled_from(FIELDS) | usual | text, usual | json_values, max_size=12)


def read(path, format="auto", **options):
    outcomes = list(open_source(str(path), format, **options))
    for outcome in outcomes:
        if isinstance(outcome, Rejected):
            assert outcome.reason
            json.dumps([outcome.where, outcome.detail], ensure_ascii=False).encode("utf-8", "backslashreplace")
        else:
            outcome.validate("fuzz")
            assert KEY_PATTERN.fullmatch(outcome.key)
            # What is accepted can be stored and read again.
            assert parse_sample(outcome.to_json().encode().decode(), "fuzz") == outcome
    return outcomes


@given(st.lists(rows, min_size=1, max_size=4))
def test_lines_of_samples(fresh, found):
    path = fresh() / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    assert len(read(path, "jsonl")) == len(found)


@given(st.lists(rows, min_size=1, max_size=4))
def test_rows_of_tables(fresh, found):
    path = fresh() / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    try:
        assert len(read(path, "table")) == len(found)
    except UserError as error:
        assert "which column is the target" in str(error)


@given(
    st.binary(max_size=300),
    st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.xz", "json.bz2"]),
)
def test_bytes_as_tables(fresh, content, suffix):
    folder = fresh()
    (folder / f"t.{suffix}").write_bytes(content)
    (folder / "good.csv").write_text("video,caption\na.mp4,x\n")
    assert any(isinstance(outcome, Sample) for outcome in read(folder, "table"))


@given(st.text(st.sampled_from(list('",;\t|\n\r\0 aé"')) | st.characters(codec="utf-8"), max_size=200))
def test_text_as_csv(fresh, content):
    folder = fresh()
    (folder / "t.csv").write_text("video,caption\n" + content, encoding="utf-8", newline="")
    read(folder / "t.csv", "table")


@given(st.data())
def test_flipped_bits_in_parquet(fresh, data):
    path = fresh() / "t.parquet"
    pq.write_table(pa.Table.from_pylist([{"video": f"{n}.mp4", "caption": "a dress"} for n in range(20)]), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        read(path, "table")
    except UserError as error:
        assert "which column is the target" in str(error)


@dataclasses.dataclass
class Config:
    prompt: str = option("", "text")
    refs: list[str] = option([], "texts")
    number: int = option(1, "number")
    rate: float | None = option(None, "number")
    flag: bool = option(True, "boolean")
    anything: dict[str, Any] = option({}, "whatever")


@given(text)
def test_prompts(fresh, prompt):
    try:
        config = load_config(Config, [f"prompt={prompt}"])
    except UserError as error:
        assert "\n" not in str(error) or "\n" in prompt
        assert prompt == "???" or any("\ud800" <= character <= "\udfff" for character in prompt)
        return
    assert config.prompt == prompt
    path = fresh() / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(Config, [], path) == config


@given(
    st.sampled_from(["refs", "number", "rate", "flag", "prompt", "", "x", "refs.a", "anything.a", "anything.b.c"])
    | text,
    text,
)
def test_overrides(key, value):
    try:
        load_config(Config, [f"{key}={value}"])
    except UserError:
        pass


@given(st.text(st.characters(codec="utf-8"), max_size=120))
def test_presets(fresh, content):
    path = fresh() / "p.yaml"
    path.write_text(content, encoding="utf-8", newline="")
    try:
        load_config(Config, [], path)
    except UserError:
        pass


@given(text)
def test_metric_names(name):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_name(name))
