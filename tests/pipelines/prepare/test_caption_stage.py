"""Captions as a stage of the prepare job: made once, redone with the model, and nothing but what depends on them."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions import CaptionOptions
from loomvideo.pipelines.captions.options import CaptionWorkers
from loomvideo.pipelines.captions.ray_llm import RequestWriter, ask_ray_llm
from loomvideo.pipelines.prepare.caption_stage import caption_pool, run_captions
from loomvideo.pipelines.prepare.config import LimitOptions
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.pools import Pool
from loomvideo.pipelines.prepare.quarantine import retriable_work
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.sources.samples import write_jsonl
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.pipelines.vlm.requests import decode_frames
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset


class Model:
    """Says its name and how bright the pictures are; fails for samples whose key it was told."""

    def __init__(self, name, asked, failing):
        self.name, self.asked, self.failing = name, asked, failing

    def identity(self):
        return {"model": self.name}

    def complete(self, request):
        self.asked.append(request.sample_key)
        if request.sample_key in self.failing:
            raise VLMError("server error", retryable=False)
        level = round(decode_frames(request.media[-1]).mean())
        return Reply(json.dumps({"id": request.code, "sentence": f"{self.name} sees {level}"}), self.name, 1, 1, 0.0)


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """A prepare job with a caption stage; what was asked; whose answers fail."""
    built = without_ray(monkeypatch)
    asked, failing = [], set()
    monkeypatch.setattr(
        "loomvideo.pipelines.captions.captioner.build_client", lambda options: Model(options.model, asked, failing)
    )
    samples = raw_samples(tmp_path / "raw", 12)
    # Two without a word, as raw clips come.
    lines = [json.loads(sample.to_json()) for sample in samples]
    for number in (1, 3):
        del lines[number]["caption"]
    (tmp_path / "raw" / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = CaptionOptions("openai", "caption", "one", cache=str(tmp_path / "cache"), num_frames=2, max_side=32)
    config = prepare_config(tmp_path / "raw", tmp_path / "out", captions=options, limits=LimitOptions(max_loss=0.5))
    return config, samples, built, asked, failing


def texts(config) -> dict[str, str]:
    dataset = ShardDataset.open(config.output)
    return {key: dataset.read(row).metadata["text"] for key, row in dataset.rows_by_key.items()}


def test_actors_that_ask_a_server_take_no_gpu_and_share_its_limit(captioned, monkeypatch):
    config, *_ = captioned
    config.captions.per_minute, config.caption_workers = 60.0, CaptionWorkers(count=3, gpus=1.0)
    assert caption_pool(config) == Pool(3, 1.0, 0.0)
    started = []

    def note(worker, arguments, work, pool):
        started.append((arguments[0].captions.per_minute, pool.size))
        return iter(())

    monkeypatch.setattr("loomvideo.pipelines.prepare.caption_stage.map_on_actors", note)
    monkeypatch.setattr("loomvideo.pipelines.prepare.caption_stage._samples", lambda storage, row: [])
    for num_units in (2, 8):
        list(run_captions(config, [{"unit": str(number)} for number in range(num_units)]))
    # Two units keep two of the three busy.
    assert started == [(30.0, 3), (20.0, 3)]


def test_only_missing_texts_are_made(captioned):
    config, samples, built, asked, _ = captioned
    result = prepare(config)
    assert sorted(asked) == ["sample-001", "sample-003"]
    assert built[0] == "caption-000000"
    assert result.summary()["written"] == 12
    assert (result.work["captioned"], result.work["asked"]) == (6, 2)
    found = texts(config)
    assert found["sample-001"].startswith("one sees")
    assert found["sample-005"] == samples[5].caption
    dataset = ShardDataset.open(config.output)
    metadata = dataset.read(dataset.rows_by_key["sample-003"]).metadata
    assert metadata["extra"]["captions"]["model"] == "one"
    built.clear()
    asked.clear()
    assert stale_parts(config) == []
    assert prepare(config).reason == "up to date"
    assert (built, asked) == ([], [])


def test_another_model_redoes_what_depends_on_text(captioned, monkeypatch):
    config, samples, _, asked, _ = captioned
    config.captions.overwrite = True
    prepare(config)
    before = {row: ShardDataset.open(config.output).read(row) for row in range(12)}
    asked.clear()
    config.captions.model = "two"
    stale = stale_parts(config)
    assert {(part.what, part.members) for part in stale} == {("config", "mllm"), ("caption", "mllm")}
    # No picture is encoded again.
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.SampleEncoder._moments", None)
    result = prepare(config)
    assert "captions" in result.reason
    num_captions = sum(not TASKS[sample.task].needs_source for sample in samples)
    assert len(asked) == num_captions
    assert result.work["made.mllm"] == num_captions
    assert result.work["made.target"] == 0
    dataset = ShardDataset.open(config.output)
    for row, sample in before.items():
        again = dataset.read(row)
        same = TASKS[sample.metadata["task"]].needs_source
        assert again.metadata["text"].startswith("two") != same
        assert again.tensors["target"]["mean.0"].equal(sample.tensors["target"]["mean.0"])
        assert again.tensors["mllm"]["full.0"].shape == sample.tensors["mllm"]["full.0"].shape or not same
        if same:
            assert again.tensors["mllm"]["full.0"].equal(sample.tensors["mllm"]["full.0"])


def test_a_failed_text_is_a_loss_that_can_be_retried(captioned):
    config, _, built, asked, failing = captioned
    failing.add("sample-003")
    result = prepare(config)
    (row,) = pq.read_table(f"{config.output}/quarantine.parquet").to_pylist()
    assert [row[name] for name in ("key", "stage", "reason", "retriable")] == [
        "sample-003", "caption", "server_error", True]  # fmt: skip
    assert result.summary()["quarantined"] == 1
    failing.clear()
    asked.clear()
    built.clear()
    again = prepare(config, again=retriable_work(config.output))
    assert again.summary()["written"] == 12
    # The answer that succeeded before comes from the cache.
    assert asked == ["sample-003"]


def test_a_cost_over_the_budget_ends_it_before_the_first_question(captioned, monkeypatch, caplog):
    config, samples, *_ = captioned
    started = []
    module = "loomvideo.pipelines.prepare.caption_stage"
    monkeypatch.setattr(f"{module}.map_on_actors", lambda *arguments: iter(started.append(arguments) or ()))
    clips = [dataclasses.replace(sample, caption=None) for sample in samples if sample.task == "t2v"]
    monkeypatch.setattr(f"{module}._samples", lambda storage, row: clips)
    config.captions.input_usd, config.captions.budget_usd = 1000.0, 0.5
    with pytest.raises(UserError, match=rf"captions.budget_usd=0.5: {2 * len(clips)} questions, .* USD are estimated"):
        list(run_captions(config, [{"unit": "a"}, {"unit": "b"}]))
    assert started == []
    config.captions.budget_usd = 50.0
    list(run_captions(config, [{"unit": "a"}, {"unit": "b"}]))
    assert len(started) == 1
    assert f"captions: {2 * len(clips)} questions" in caplog.text


def test_without_the_stage_missing_texts_are_losses(captioned):
    config, _, _, asked, _ = captioned
    config.captions.backend = "existing"
    assert prepare(config).summary()["quarantined"] == 2
    rows = pq.read_table(f"{config.output}/quarantine.parquet").to_pylist()
    assert {row["reason"] for row in rows} == {"no_text"}
    assert asked == []


def test_vllm_has_to_be_installed(captioned):
    config = captioned[0]
    config.captions.backend = "vllm"
    with pytest.raises(UserError, match="vllm is not installed; pip install vllm"):
        prepare(config)


@pytest.mark.slow
def test_engines_in_the_cluster_are_asked_again_for_what_fails(ray_cluster, tmp_path):
    samples = raw_samples(tmp_path / "raw", 6)
    write_jsonl(samples, tmp_path / "raw" / "samples.jsonl")
    options = CaptionOptions("openai", "caption", "m", overwrite=True, num_frames=2, max_side=32)
    rounds = []

    def generate(dataset):
        rounds.append(dataset.count())
        first = len(rounds) == 1

        def answer(row):
            pictures = sum(part["type"] == "image_url" for part in json.loads(row["messages"])[0]["content"])
            code = "00000000" if first and "-003" in row["sample"] else row["code"]
            return {**row, "generated_text": json.dumps({"id": code, "sentence": f"{pictures} pictures"}),
                    "__inference_error__": ""}  # fmt: skip

        return dataset.map(answer)

    ask = ask_ray_llm(CaptionWorkers(), str(tmp_path / "raw"), generate)
    asked = [sample for sample in samples if not TASKS[sample.task].needs_source]
    results = {sample.key: (sample, result) for sample, result in ask(options, asked)}
    assert set(results) == {sample.key for sample in asked}
    assert rounds == [3, 1]
    assert {result.status for _, result in results.values()} == {"made"}
    assert results["sample-003"][0].caption == "2 pictures"
    assert results["sample-001"][0].caption == "1 pictures"


@pytest.mark.slow
def test_engines_in_the_cluster_are_asked_a_second_time(ray_cluster, tmp_path):
    samples = raw_samples(tmp_path / "raw", 6)
    options = CaptionOptions("openai", "instruction", "m", overwrite=True, num_frames=2, max_side=32, verify=True)

    def generate(dataset):
        def answer(row):
            made = {"id": row["code"], "instruction": "make it darker"}
            verdict = "no" if f'"{edits[0].key}"' in row["sample"] else "yes"
            second = {"id": row["code"], "reason": "it is the same", "verdict": verdict}
            text = json.dumps(second if row["instruction"] else made)
            return {**row, "generated_text": text, "__inference_error__": ""}

        return dataset.map(answer)

    edits = [sample for sample in samples if TASKS[sample.task].needs_source]
    ask = ask_ray_llm(CaptionWorkers(), str(tmp_path / "raw"), generate)
    results = {sample.key: result for sample, result in ask(options, edits)}
    assert [results[sample.key].status for sample in edits] == ["not_verified"] + ["made"] * (len(edits) - 1)
    assert results[edits[1].key].fields == {"instruction": "make it darker", "verified": "it is the same"}


def test_a_file_that_does_not_decode_is_its_own_failure(tmp_path):
    samples = raw_samples(tmp_path / "raw", 2)
    (tmp_path / "raw" / samples[1].target).unlink()
    options = CaptionOptions("openai", "caption", num_frames=2, max_side=32)
    writer = RequestWriter(options, str(tmp_path / "raw"))
    row = writer({"sample": samples[1].to_json(), "instruction": ""})
    assert json.loads(row["failure"])["status"] == "missing_file"
    row = writer({"sample": samples[0].to_json(), "instruction": ""})
    content = json.loads(row["messages"])[0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "text"]
    assert row["code"] in content[-1]["text"]
    assert np.isin(["id", "sentence"], list(json.loads(row["schema"])["properties"])).all()
    writer.reader.close()
