"""Shards built beside captioning: as early as their texts are there, with the bytes and accounts of stages in a row."""

import dataclasses
import json
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.pipelines.captions import CaptionOptions
from loomvideo.pipelines.captions.options import CaptionWorkers
from loomvideo.pipelines.prepare import ahead, stages
from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.inputs import read_inputs
from loomvideo.pipelines.prepare.job import UP_TO_DATE, prepare
from loomvideo.pipelines.prepare.stages import ASSESS, CAPTION, ENCODE, JUDGE
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.platform.shards.storage import Storage


class Server:
    """Captions; answers some samples only when it is let, fails for some, and may end the run."""

    def __init__(self):
        self.asked, self.failing, self.held, self.let = [], set(), set(), threading.Event()
        self.dies_after = 10**6

    def identity(self):
        return {"model": "m"}

    def complete(self, request):
        self.asked.append(request.sample_key)
        if len(self.asked) > self.dies_after:
            raise KeyboardInterrupt
        if request.sample_key in self.held:
            assert self.let.wait(60)
        if request.sample_key in self.failing:
            raise VLMError("server error", retryable=False)
        answer = {"id": request.code, "sentence": f"what {request.sample_key} shows"}
        properties = request.schema()["properties"]
        if "wordings" in properties:
            answer["wordings"] = [
                f"{number} of {request.sample_key}" for number in range(properties["wordings"]["minItems"])
            ]
        return Reply(json.dumps(answer), "m", 1, 1, 0.0)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Clips without texts, in shards of two or so and chunks of two; the server; what is encoded and when."""
    without_ray(monkeypatch)
    server, encoded = Server(), []
    monkeypatch.setattr("loomvideo.pipelines.captions.captioner.build_client", lambda options: server)
    monkeypatch.setattr(stages, "_SAMPLES_IN_A_CHUNK", 2)
    monkeypatch.setattr(ahead, "FEWEST_SHARDS", 1)
    described = SampleEncoder._described

    def note(self, loaded, *rest):
        encoded.append(loaded.sample.key)
        # As soon as a shard is begun, the server goes on.
        server.let.set()
        return described(self, loaded, *rest)

    monkeypatch.setattr(SampleEncoder, "_described", note)
    samples = [sample for sample in raw_samples(tmp_path / "raw", 24) if sample.task in ("t2v", "t2i")]
    lines = [json.loads(sample.to_json()) | {"caption": None} for sample in samples]
    (tmp_path / "raw" / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def config(name, **changes):
        options = CaptionOptions("openai", "caption", "m", cache=str(tmp_path / name / "cache"), num_frames=2,
                                 max_side=32, concurrency=1, max_attempts=1)  # fmt: skip
        made = prepare_config(tmp_path / "raw", tmp_path / name / "out", captions=options, **changes)
        made.limits, made.heldout_fraction = LimitOptions(max_loss=0.9), 0.0
        made.shards.max_samples, made.clips.num_frames = 2, 5
        return made

    return config, server, encoded


def everything(config) -> dict[str, bytes]:
    root = Path(config.output)
    files = [*(root / "shards").iterdir(), *(root / name for name in ("index.parquet", "manifest.json",
             "quarantine.parquet"))]  # fmt: skip
    return {file.name: file.read_bytes() for file in files}


def in_a_row(config, server):
    """The same job, stages after each other."""
    server.let.set()
    config.workers.ahead = False
    prepare(config)
    return everything(config)


def last_asked(config):
    """The sample whose text is asked for last."""
    plan = CAPTION.plan(Storage(config.output), read_inputs(config), config)
    return plan.table.column("key")[int(plan.units[-1].rows[-1])].as_py()


def test_shards_are_built_while_texts_are_asked_for(job):
    config, server, encoded = job
    one = config("ahead")
    server.held = {last_asked(one)}
    result = prepare(one)
    # The server waited for the first shard before it gave the last text.
    assert server.held <= set(server.asked)
    assert sorted(encoded) == sorted(set(encoded))
    assert result.built_shards == len(result.manifest.shards)
    assert not [name for name in Storage(one.output).names("work/plans") if "-ahead-" in name]
    assert everything(one) == in_a_row(config("row"), server)
    assert prepare(one).reason == UP_TO_DATE


def test_a_text_that_is_lost_gives_the_same_dataset(job):
    config, server, _ = job
    one = config("ahead")
    server.held = {last_asked(one)}
    keys = [json.loads(line)["key"] for line in Path(one.input).read_text().splitlines()]
    # A third of them: there are fewer shards than were planned, so those built ahead are not those of the end.
    server.failing = set(keys[::3])
    prepare(one)
    rows = pq.read_table(f"{one.output}/quarantine.parquet").to_pylist()
    assert {row["key"] for row in rows} == server.failing
    assert everything(one) == in_a_row(config("row"), server)


@pytest.mark.parametrize("wordings", [0, 2])
def test_killed_while_captioning_it_ends_the_same(job, wordings):
    config, server, encoded = job
    whole = config("row")
    whole.captions.wordings = wordings
    expected = in_a_row(whole, server)
    paid = len(server.asked)
    one = config("ahead")
    one.captions.wordings = wordings
    server.asked.clear()
    server.dies_after = paid - 3
    with pytest.raises(KeyboardInterrupt):
        prepare(one)
    assert not Storage(one.output).exists("manifest.json")
    server.dies_after = 10**6
    before = list(server.asked)
    encoded.clear()
    assert prepare(one).reason == "built"
    # What was answered is not asked again; the one at which it died is.
    assert len(server.asked) == len(before) + paid - (len(before) - 1)
    assert everything(one) == expected


def test_what_shards_may_be_built_beside(job):
    config, *_ = job
    one = config("ahead")
    row = [CAPTION, ENCODE]
    assert ahead.may_build_beside(CAPTION, row, one)
    assert not ahead.may_build_beside(CAPTION, [CAPTION, JUDGE, ENCODE], one)
    # Duplicates are decided over all samples.
    assert not ahead.may_build_beside(ASSESS, [ASSESS, ENCODE], one)
    in_a_row = dataclasses.replace(one, workers=dataclasses.replace(one.workers, ahead=False))
    assert not ahead.may_build_beside(CAPTION, row, in_a_row)
    one.captions.backend, one.caption_workers = "transformers", CaptionWorkers(gpus=1.0)
    assert not ahead.may_build_beside(CAPTION, row, one)


def test_what_ends_the_building_ends_the_run(job, monkeypatch):
    config, server, _ = job
    server.let.set()

    def broken(self, *arguments):
        raise RuntimeError("no store")

    monkeypatch.setattr(ahead.ReadyShards, "rows", broken)
    with pytest.raises(RuntimeError, match="no store"):
        prepare(config("ahead"))
