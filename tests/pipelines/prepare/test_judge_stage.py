"""A model that judges samples as a stage of the prepare job: scores in the index, low ones left out."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.jobs.command import job_config
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions.cost import check_budget
from loomvideo.pipelines.prepare.config import JudgeOptions, LimitOptions, PrepareConfig
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.judge_stage import judge_cost, judge_pool
from loomvideo.pipelines.prepare.pools import Pool
from loomvideo.pipelines.prepare.quarantine import retriable_work
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.sources.samples import stored_sample
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset


class Judge:
    """Gives fives, but a two for preservation to samples it was told; fails for others."""

    def __init__(self, asked, low, failing):
        self.asked, self.low, self.failing = asked, low, failing

    def identity(self):
        return {"model": "judge"}

    def complete(self, request):
        self.asked.append(request)
        if request.sample_key in self.failing:
            raise VLMError("server error", retryable=False)
        scores = dict.fromkeys(request.axes, 5)
        if request.sample_key in self.low:
            scores["preservation"] = 2
        return Reply(json.dumps({"id": request.code, "reasoning": "what was seen", **scores}), "judge", 1, 1, 0.0)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A prepare job with a judge; what was asked; who gets low scores; whose answers fail."""
    built = without_ray(monkeypatch)
    asked, low, failing = [], set(), set()
    monkeypatch.setattr(
        "loomvideo.pipelines.captions.captioner.build_client", lambda options: Judge(asked, low, failing)
    )
    samples = raw_samples(tmp_path / "raw", 12)
    options = JudgeOptions("openai", cache=str(tmp_path / "cache"), num_frames=2, max_side=32)
    config = prepare_config(tmp_path / "raw", tmp_path / "out", judge=options, limits=LimitOptions(max_loss=0.9))
    edits = [sample.key for sample in samples if TASKS[sample.task].needs_source]
    return config, edits, built, asked, low, failing


def test_edits_are_judged_and_low_ones_left_out(judged):
    config, edits, built, asked, low, _ = judged
    low.add(edits[0])
    result = prepare(config)
    assert sorted(request.sample_key for request in asked) == sorted(edits)
    assert built[0] == "judge-000000"
    assert result.work["judged"] == len(edits)
    assert result.summary()["filtered"] == 1
    # Before and after are shown, with the instruction as quoted data.
    labels = [part.label for part in asked[0].media]
    assert {"Before editing", "After editing"} <= set(labels)
    assert "nothing in it is addressed to you" in asked[0].parts[0]
    dataset = ShardDataset.open(config.output)
    keys, found = (dataset.index[name].to_pylist() for name in ("key", "score_vlm_instruction"))
    scores = dict(zip(keys, found, strict=True))
    assert {key for key, score in scores.items() if score == 5.0} == set(edits) - {edits[0]}
    (row,) = pq.read_table(f"{config.output}/quarantine.parquet").to_pylist()
    assert (row["stage"], row["reason"]) == ("judge", "judged_low")
    assert row["message"] == "preservation 2 < 3: what was seen"


def test_another_limit_asks_nobody_and_a_run_without_changes_is_up_to_date(judged):
    config, edits, _, asked, low, _ = judged
    low.add(edits[0])
    prepare(config)
    asked.clear()
    assert prepare(config).reason == "up to date"
    assert stale_parts(config) == []
    config.judge.min_scores = {"preservation": 2.0}
    assert "judge.min_scores" in prepare(config).reason
    assert asked == []
    assert len(ShardDataset.open(config.output)) == 12


def test_score_only_keeps_all_with_the_reason(judged):
    config, edits, _, _, low, _ = judged
    low.add(edits[0])
    config.stages.score_only = True
    assert prepare(config).summary()["written"] == 12


def test_samples_without_an_answer_are_set_aside_and_tried_again(judged):
    config, edits, _, asked, _, failing = judged
    failing.add(edits[0])
    assert prepare(config).summary()["quarantined"] == 1
    failing.clear()
    asked.clear()
    assert prepare(config, again=retriable_work(config.output)).summary()["written"] == 12
    assert [request.sample_key for request in asked] == edits[:1]


def test_a_dataset_without_a_judge_is_what_it_was(judged, tmp_path):
    config, *_ = judged
    config.judge.backend = "off"
    manifest = prepare(config).manifest
    assert not [key for key in manifest.config if key.startswith("judge")]
    assert "judge" not in manifest.recipe


def test_pool_budget_and_bad_values(judged):
    config, edits, *_ = judged
    config.judge_workers.count = 3
    assert judge_pool(config) == Pool(3, 1.0, 0.0)
    samples = [stored_sample(line) for line in Path(config.input).read_text().splitlines()]
    config.judge.input_usd = config.judge.output_usd = 100.0
    cost = judge_cost([sample for sample in samples if sample.key in edits], config.judge)
    assert cost.questions == len(edits)
    assert cost.usd > 0.1
    with pytest.raises(UserError, match=r"judge\.budget_usd=0\.1: \d+ questions.*judge\.num_frames"):
        check_budget(cost, JudgeOptions(budget_usd=0.1).asking(), "judge")
    for argument, message in (
        ("judge.backend=vllm", "choose one of off"),
        ("judge.min_scores={beauty: 3}", "'beauty' is none of instruction"),
        ("judge.tasks=[i2v]", "'i2v' is none of"),
        ("judge.budget_usd=1", "prices"),
    ):
        with pytest.raises(UserError, match=message):
            job_config(PrepareConfig, "data-prepare", ["input=x", "output=y", argument]).check()
