"""Judges against a server that speaks the real protocols and misbehaves on demand."""

import json

import numpy as np
import pytest

from loomvideo.pipelines.evaluation.judges import rubrics
from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer, PixelJudge
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.session import JudgeSession
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.vlm.clients import GeminiClient, OpenAIClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, labelled
from loomvideo.pipelines.vlm.session import AnswerCache, Prices, Session
from loomvideo.platform.errors import UserError

AXES = ("instruction", "preservation", "quality")
SAMPLING = FrameSampling(num_frames=3, max_side=32)


def video(seed=0, frames=9):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (8, 12, 3)).repeat(6, 0).repeat(6, 1)
    return np.stack([np.roll(base, i, 1) for i in range(frames)]).astype(np.uint8)


def request(seed=0, sampling=SAMPLING, **changes):
    reference = np.full((20, 20, 3), 80, np.uint8)
    return VLMRequest(
        labelled("Is it red?", media_for_item(sampling, video(seed), video(1), [reference])), AXES, **changes
    )


def session(tmp_path, client, **changes):
    return JudgeSession(Session(client, AnswerCache(tmp_path / "answers"), sleep=lambda s: None, **changes))


def clients(server):
    return {
        "openai": OpenAIClient(f"{server.base_url}/v1", "judge", timeout_s=0.4),
        "gemini": GeminiClient("judge", base_url=f"{server.base_url}/v1beta", timeout_s=0.4),
    }


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_a_judgement_and_what_was_sent(tmp_path, kind):
    with FakeJudgeServer(score=4).running() as server:
        judgement = session(tmp_path, clients(server)[kind], prices=Prices(2.0, 8.0)).judge(request())
    assert judgement.parsed.sample == 4
    assert judgement.parsed.scores == dict.fromkeys(AXES, 4.0)
    assert judgement.cost_usd == pytest.approx((1000 * 2 + 50 * 8) / 1e6)
    assert judgement.model in ("judge-0613", "gemini-fake-001")
    # Three frames each of source and result and one reference, the same for every judge.
    pictures = server.pictures(0)
    assert [p.shape for p in pictures] == [(21, 32, 3)] * 3 + [(20, 20, 3)] + [(21, 32, 3)] * 3
    text = json.dumps(server.calls[0][1])
    assert text.index("Before editing") < text.index("Reference picture 1") < text.index("After editing")


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_films_play_the_same_frames(tmp_path, kind):
    sampling = FrameSampling(num_frames=3, max_side=32, as_video=True)
    with FakeJudgeServer().running() as server:
        assert session(tmp_path, clients(server)[kind]).judge(request(sampling=sampling)).parsed.sample == 4
    assert json.dumps(server.calls[0][1]).count("video/mp4") == 2
    assert len(server.pictures(0)) == 1


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_answers_are_cached_by_everything_that_matters(tmp_path, kind):
    with FakeJudgeServer().running() as server:
        client = clients(server)[kind]
        asking = session(tmp_path, client)
        assert not asking.judge(request()).cached
        again = session(tmp_path, client).judge(request())
        assert again.cached
        assert again.cost_usd == 0
        assert again.parsed.sample == 4
        assert len(server.calls) == 1
        for changed in (request(seed=5), request(repeat=1), request(sampling=FrameSampling(2, 32))):
            assert not asking.judge(changed).cached
        other = type(client)(**{**client.__dict__, "model": "other"})
        assert not session(tmp_path, other).judge(request()).cached
        assert len(server.calls) == 5


@pytest.mark.parametrize(
    ("script", "sample", "failure", "calls"),
    [
        (["503", "429", "ok"], 4, "", 3),
        (["503"] * 9, None, "server error", 3),
        (["429"] * 9, None, "rate limited", 3),
        (["slow", "ok"], 4, "", 2),
        (["slow"] * 9, None, "timeout", 3),
        (["400"], None, "bad request", 1),
        (["refuse"], None, "blocked", 1),
        (["empty", "ok"], 4, "", 2),
        (["garbage", "ok"], 4, "", 2),
        (["garbage", "garbage", "ok"], None, "unparsable", 2),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_failures_are_retried_or_counted_by_reason(tmp_path, kind, script, sample, failure, calls):
    with FakeJudgeServer(behaviour=lambda call: script[min(call, len(script) - 1)]).running() as server:
        judgement = session(tmp_path, clients(server)[kind], max_attempts=3).judge(request())
        assert (judgement.parsed.sample, judgement.parsed.failure) == (sample, failure)
        assert len(server.calls) == calls


def test_an_unreachable_judge_is_a_failure(tmp_path):
    client = OpenAIClient("http://127.0.0.1:9/v1", "judge", timeout_s=1)
    assert session(tmp_path, client, max_attempts=2).judge(request()).parsed.failure == "unreachable"


def test_keys_come_from_the_environment_only(tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    remote = OpenAIClient("https://judge.example/v1", "judge", api_key_env="SOME_KEY")
    with pytest.raises(UserError, match="set SOME_KEY in the environment"):
        session(tmp_path, remote).judge(request())
    monkeypatch.setenv("SOME_KEY", "secret-1")
    with FakeJudgeServer().running() as server:
        client = OpenAIClient(f"{server.base_url}/v1", "judge", api_key_env="SOME_KEY")
        session(tmp_path, client).judge(request())
        assert server.calls[0][2]["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in "".join(p.read_text() for p in (tmp_path / "answers").rglob("*.json"))
    assert "secret-1" not in repr(client)


def test_pixel_judge_tells_a_copy_from_an_edit_and_noise(tmp_path):
    asking = session(tmp_path, PixelJudge(noise=0))
    source = video(1)
    edited = source.copy()
    edited[:, 8:30, 8:40] = (220, 20, 20)
    noisy = np.random.default_rng(0).integers(0, 256, source.shape).astype(np.uint8)

    def scores(result):
        return asking.judge(VLMRequest(labelled("x", media_for_item(SAMPLING, result, source, [])), AXES)).parsed.scores

    assert scores(source)["instruction"] == 1
    assert scores(source)["preservation"] == 5
    assert scores(edited)["instruction"] > 3
    assert scores(noisy)["quality"] < scores(edited)["quality"]
    assert scores(edited) == scores(edited)


def test_own_rubrics_cover_every_task_and_fashion_category():
    own = rubrics.own_rubrics()
    for task in ("t2i", "t2v", "image_edit", "video_edit", "ref_edit", "mi2v"):
        question = own.question(EvalItem("sample", "k", task, "any", "make it blue", source="s.mp4"))
        assert "make it blue" in question.text
        assert all(f"- {axis}:" in question.text for axis in question.axes)
    fashion = own.question(EvalItem("fashion", "k", "video_edit", "garment_text", "x", source="s"))
    assert "garment_pattern" in fashion.axes


def test_official_rubrics_come_from_the_users_copy(tmp_path):
    python = tmp_path / "bench.py"
    long = "Grade the edit from 1 to 5. Instruction: <edit_prompt>. " * 2
    python.write_text(f"import os\nLocal_Add = '''{long}'''\nshort = 'x'\nraise SystemExit\n")
    loaded = rubrics.official_rubrics(python)
    question = loaded.question(("local_add",), "add a hat", AXES)
    assert "Instruction: add a hat." in question.text
    with pytest.raises(UserError, match="no rubric 'camera_edit'; it has local_add"):
        loaded.question(("camera_edit",), "x", AXES)
    as_json = tmp_path / "prompts.json"
    as_json.write_text(json.dumps({"add": long}))
    assert rubrics.official_rubrics(as_json).digest != loaded.digest
    with pytest.raises(UserError, match="no such file"):
        rubrics.official_rubrics(tmp_path / "none.py")
