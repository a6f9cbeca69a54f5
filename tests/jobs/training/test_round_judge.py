"""The judge of preference rounds: checked before anything is made, one for all actors, gone when the round is."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from ray.exceptions import RayActorError

from loomvideo.jobs.command import job_config
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.jobs.training.round_judge import ANSWERS_FOLDER, check_judge, round_judge
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.platform.errors import UserError

ROUNDS = [
    "data.shards=[x]", "prefer.method=nft", "prefer.nft.rounds=2", "prefer.nft.steps_per_round=10",
    "training.steps=20", "prefer.nft.prompts=4", "prefer.nft.repeats=4",
]  # fmt: skip
JUDGED = [*ROUNDS, "prefer.rewards.weights={judge: 1.0}"]


def config(*overrides):
    made = job_config(PreferJobConfig, "prefer", [*JUDGED, *overrides])
    made.check()
    return made


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with FakeJudgeServer(score="yes").running() as running:
        yield running


def of(server):
    return "judge.kind=openai", "judge.model=m", f"judge.base_url={server.base_url}/v1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"prefer.rewards: judge needs a judge; set judge.kind"),
        (["prefer.rewards.weights.judge=0", "judge.kind=fake"], r"no reward is a judge's"),
        (["judge.kind=fake", "prefer.method=source"], r"judge.kind=fake: nothing is generated"),
        (["judge.kind=fake", "judge.threads=0"], r"judge.threads, judge.actors and judge.max_attempts: at least 1"),
        (["judge.kind=openai"], r"judge.kind=openai: set judge.model"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


def test_spending_is_asked_for_before_a_round_and_one_call_is_tried(server, tmp_path):
    tasks, paid = {"image_edit", "t2v"}, ("judge.input_usd=1", "judge.output_usd=4")
    with pytest.raises(UserError, match=r"judge.budget_usd: about [\d.]+ USD would be spent"):
        check_judge(config(*of(server), *paid), tmp_path, tasks, 2)
    with pytest.raises(UserError, match=r"budget_usd=0.01: 32 calls are expected .*prefer.nft.prompts"):
        check_judge(config(*of(server), *paid, "judge.budget_usd=0.01"), tmp_path, tasks, 2)
    # Nothing is left to be judged.
    check_judge(config(*of(server), *paid), tmp_path, tasks, 0)
    assert not server.calls
    check_judge(config(*of(server), *paid, "judge.budget_usd=100"), tmp_path, tasks, 2)
    ((_, body, _),) = server.calls
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["grey"]["enum"] == ["yes", "no"]
    server.behaviour = lambda call: "401"
    with pytest.raises(UserError, match=r"the trial call failed: .*401"):
        check_judge(config(*of(server)), tmp_path / "other", tasks, 1)


def test_every_task_needs_a_checklist_with_what_is_rewarded(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("questions: {done/all: Is all done}\nchecklists: {image_edit: [done/all]}\n")
    own = "judge.kind=fake", f"judge.checklists={file}"
    check_judge(config(*own, "prefer.rewards.weights.judge_union=1"), tmp_path, {"image_edit", "t2v"}, 1)
    with pytest.raises(UserError, match=r"own.yaml: has none for video_edit"):
        check_judge(config(*own), tmp_path, {"image_edit", "video_edit"}, 1)
    (tmp_path / "broken.yaml").write_text("questions: {done/all: All?}\n")
    with pytest.raises(UserError, match=r"broken.yaml: is no YAML: .*line 1"):
        check_judge(config("judge.kind=fake", f"judge.checklists={tmp_path}/broken.yaml"), tmp_path, {"image_edit"}, 1)
    with pytest.raises(UserError, match=r"own.yaml: that of image_edit has no question for judge_preserved"):
        check_judge(config(*own, "prefer.rewards.weights.judge_preserved=1"), tmp_path, {"image_edit"}, 1)


def test_a_round_has_one_judge_that_remembers_and_comes_back(server, ray_cluster, tmp_path):
    item = EvalItem("round", "k", "image_edit", "", "red", source="k")
    result = np.zeros((1, 32, 32, 3), np.uint8)
    inputs = LoadedItem(item, result, (), result, None, (32, 32), 1, 24.0)
    with round_judge(config(*of(server)), tmp_path) as judge:
        assert judge(result, inputs)[0]["judge"] == 1.0
        (handle,) = judge.judge.handles
        # Ray starts a lost one again, and its answers are on disk.
        ray_cluster.kill(handle, no_restart=False)
        assert judge(result, inputs)[0]["judge"] == 1.0
        assert len(server.calls) == 1
        assert list((tmp_path / ANSWERS_FOLDER).rglob("*.json"))
    # Killing takes a moment, in which the judge would still answer.
    with contextlib.suppress(RayActorError):
        while True:
            ray_cluster.get(handle.ready.remote())
    with pytest.raises(UserError, match="its process ended and is not started again"):
        judge(np.ones_like(result), inputs)
    # The next round's knows the answers too.
    with round_judge(config(*of(server)), tmp_path) as judge:
        assert replace(judge, threads=2)(result, inputs)[0]["judge_done"] == 1.0
    assert len(server.calls) == 1


def test_without_a_judge_there_is_none(tmp_path):
    plain = job_config(PreferJobConfig, "prefer", [*ROUNDS, "prefer.rewards.weights={outside: 1.0}"])
    check_judge(plain, tmp_path, {"image_edit"}, 1)
    with round_judge(plain, tmp_path) as judge:
        assert judge is None
    assert not list(tmp_path.iterdir())
