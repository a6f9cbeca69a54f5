"""Captions: the right text on the right sample, whatever the server does."""

import dataclasses
import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from loomvideo.pipelines.captions import Captioner, CaptionOptions
from loomvideo.pipelines.captions.cost import caption_cost, check_budget
from loomvideo.pipelines.captions.schema import InvalidAnswerError, answer_schema, parse_answer
from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.pipelines.vlm.requests import VLMRequest, decode_frames
from loomvideo.platform.errors import UserError

GARMENT = {"category": "dress", "colour": "red", "pattern": "plain", "fabric": "silk", "fit": "flared",
           "neckline": "round", "sleeve": "short", "length": "knee", "closure": "zip", "logo": "none"}  # fmt: skip
LOOK = {"background": "a studio", "motion": "walking", "framing": "full body", "light": "soft studio"}


def sample(number: int, **fields) -> Sample:
    values = {"key": f"s{number}", "task": "t2v", "dataset": "d", "target": f"{number}.mp4"}
    return Sample(**(values | fields))


def frames(sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """A clip whose brightness is the sample's number."""
    number = int(sample.key[1:])
    clip = np.full((9, 32, 32, 3), 10 * number, np.uint8)
    return clip, clip + 5 if sample.source else None


class Model:
    """Describes the brightness it is shown; may fail as told."""

    def __init__(self, *failures: str | Exception):
        self.failures = list(failures)
        self.requests: list[VLMRequest] = []
        self.lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        return {"kind": "test", "model": "m1"}

    def complete(self, request: VLMRequest) -> Reply:
        with self.lock:
            self.requests.append(request)
            failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        if failure:
            return Reply(failure, "m1", 1, 1, 0.0)
        time.sleep(random.random() * 0.01)
        level = round(float(decode_frames(request.media[-1]).mean()) / 10)
        answer = {"id": request.code, "sentence": f"a grey field of level {level}"}
        if request.mode == "fashion":
            answer |= {"garments": [GARMENT]} | LOOK
        if request.mode == "instruction":
            answer = {"id": request.code, "instruction": "make it darker"}
        if request.wordings:
            answer["wordings"] = [
                "a grey field",
                *(f"what is shown is grey, number {n}" for n in range(1, request.wordings)),
            ]
        if request.mode == "verify":
            verdict = "yes" if level % 2 else "partly"
            answer = {"id": request.code, "reason": f"level {level} was asked for", "verdict": verdict}
        return Reply(json.dumps(answer), "m1", 1, 1, 0.0)


def captioner(tmp_path, model, **options) -> Captioner:
    values = {"backend": "openai", "mode": "caption", "cache": str(tmp_path / "cache"), "concurrency": 4} | options
    return Captioner(CaptionOptions(**values), model, sleep=lambda _: None)


def test_every_text_lands_on_its_sample_whatever_the_order(tmp_path):
    model = Model()
    results = list(captioner(tmp_path, model).run((sample(n) for n in range(20)), frames))
    assert len(results) == 20
    for captioned, result in results:
        assert captioned.caption == f"a grey field of level {captioned.key[1:]}"
        assert captioned.extra["captions"]["digest"] == result.digest
        assert result.status == "made"


def test_answers_are_paid_for_once(tmp_path):
    model = Model()
    for expected in ("made", "cached"):
        results = list(captioner(tmp_path, model).run([sample(3), sample(4)], frames))
        assert {r.status for _, r in results} == {expected}
        assert {s.caption for s, _ in results} == {"a grey field of level 3", "a grey field of level 4"}
    assert len(model.requests) == 2
    other = dataclasses.replace(sample(3), key="s5")
    assert captioner(tmp_path, model).caption(other, frames).status == "made"


def test_a_swapped_answer_is_seen_and_asked_again(tmp_path):
    swapped = json.dumps({"id": "deadbeef", "sentence": "somebody else's picture"})
    model = Model(swapped)
    result = captioner(tmp_path, model).caption(sample(2), frames)
    assert (result.status, result.fields["sentence"]) == ("made", "a grey field of level 2")
    always = Model(*[swapped] * 9)
    (kept, result), *_ = captioner(tmp_path, always, max_attempts=3).run([sample(6, caption=None)], frames)
    assert (result.status, kept.caption, len(always.requests)) == ("mixed_up", None, 3)
    assert captioner(tmp_path, Model()).caption(sample(6), frames).status == "made"


def test_failures_are_retried_or_counted_by_reason(tmp_path):
    limited = VLMError("rate limited", retryable=True, retry_after_s=0.5)
    slept: list[float] = []
    made = Captioner(CaptionOptions(backend="openai", mode="caption", cache=str(tmp_path)), Model(limited, limited),
                     sleep=slept.append).caption(sample(1), frames)  # fmt: skip
    assert made.status == "made"
    assert slept == [0.5, 0.5]
    blocked = Model(VLMError("blocked", retryable=False))
    result = captioner(tmp_path, blocked).caption(sample(7), frames)
    assert (result.status, len(blocked.requests), result.succeeded) == ("blocked", 1, False)
    garbage = Model(*["The video looks nice."] * 5)
    assert captioner(tmp_path, garbage).caption(sample(8), frames).status == "invalid_answer"


def test_fashion_attributes_and_a_sentence(tmp_path):
    (captioned, _), *_ = captioner(tmp_path, Model(), mode="fashion").run([sample(1)], frames)
    assert captioned.extra["captions"]["attributes"]["garments"] == [GARMENT]
    assert captioned.caption.startswith("a grey field")


def test_other_wordings_come_with_the_text(tmp_path):
    model = Model()
    (captioned, result), *_ = captioner(tmp_path, model, wordings=3).run([sample(1)], frames)
    others = ["a grey field", "what is shown is grey, number 1", "what is shown is grey, number 2"]
    assert (result.status, captioned.texts) == ("made", others)
    assert "attributes" not in captioned.extra["captions"]
    assert "Then write 3 other wordings" in model.requests[0].text
    # Asked without them it is another question, and one that gave too few is invalid.
    (captioned, _), *_ = captioner(tmp_path, model).run([sample(1)], frames)
    assert (len(model.requests), captioned.texts) == (2, [])
    with pytest.raises(InvalidAnswerError, match="wordings"):
        parse_answer('{"id": "c", "sentence": "a grey field", "wordings": ["a grey field"]}', "caption", "c", 2)
    with pytest.raises(UserError, match=r"captions\.wordings=9"):
        CaptionOptions(wordings=9).check()
    free, more = (caption_cost([sample(1)], CaptionOptions("openai", "caption", wordings=n)) for n in (0, 4))
    assert more.tokens_out == 5 * free.tokens_out


def test_instructions_are_written_from_pairs(tmp_path):
    pair = sample(2, task="video_edit", source="s.mp4")
    (captioned, _), *_ = captioner(tmp_path, Model(), mode="instruction").run([pair], frames)
    assert captioned.instruction == "make it darker"
    with pytest.raises(ValueError, match="needs source and target"):
        captioner(tmp_path, Model(), mode="instruction").caption(sample(1), frames)


def test_instructions_that_a_second_question_does_not_confirm_are_lost_with_its_words(tmp_path):
    pairs = [sample(number, task="video_edit", source="s.mp4") for number in (1, 2)]
    model = Model()
    for expected in ("made", "cached"):
        run = captioner(tmp_path, model, mode="instruction", verify=True).run(pairs, frames)
        (good, made), (bad, lost) = sorted(run, key=lambda item: item[0].key)
        assert (good.instruction, made.status) == ("make it darker", expected)
        assert good.extra["captions"]["attributes"] == {"verified": "level 1 was asked for"}
        assert (bad.instruction, lost.status) == (None, "not_verified")
        assert lost.detail == "partly: level 2 was asked for (instruction: make it darker)"
    assert len(model.requests) == 4
    again = [request for request in model.requests if request.mode == "verify"]
    assert all('"make it darker"' in request.text for request in again)
    broken = Model("", VLMError("blocked", retryable=False))
    broken.failures[0] = None
    result = captioner(tmp_path / "other", broken, mode="instruction", verify=True).caption(pairs[0], frames)
    assert (result.status, result.fields) == ("blocked", {})
    with pytest.raises(UserError, match=r"captions.verify=true: is about instructions, not captions.mode=fashion"):
        captioner(tmp_path, model, mode="fashion", verify=True)


def test_the_cost_is_known_before_the_first_question():
    clips = [sample(1), sample(2, caption="has one"), sample(3, task="t2i")]
    edit = sample(4, task="ref_edit", source="s.mp4", references=["a.png"])
    options = CaptionOptions("openai", "caption", num_frames=8, per_minute=1.0, input_usd=2.0, output_usd=10.0)
    cost = caption_cost(clips, options)
    assert cost.questions == 2
    pictures = 258 * (8 + 1)
    assert pictures < cost.tokens_in < pictures + 2 * 200
    assert cost.usd == pytest.approx((2 * cost.tokens_in + 10 * cost.tokens_out) / 1e6)
    assert cost.hours == pytest.approx(2 / 60)
    assert "2 questions" in str(cost)
    twice = caption_cost([edit], dataclasses.replace(options, mode="instruction", verify=True))
    assert twice.questions == 2
    assert twice.tokens_in > 2 * 258 * (8 + 8 + 1)
    check_budget(cost, options)
    with pytest.raises(UserError, match=r"captions.budget_usd=0.001: 2 questions, .* USD.* are estimated; raise it"):
        check_budget(cost, dataclasses.replace(options, budget_usd=0.001))
    with pytest.raises(UserError, match=r"needs captions.input_usd and output_usd"):
        CaptionOptions(budget_usd=1.0).check()
    assert caption_cost(clips, CaptionOptions()).questions == 0


def test_references_are_shown_by_name(tmp_path):
    edit = Sample("n1", "ref_edit", "d", "t.mp4", source="s.mp4", references=["a.png", "b.png"])
    model, picture = Model(), np.full((1, 32, 32, 3), 7, np.uint8)
    run = captioner(tmp_path, model, mode="instruction").run(
        [edit], lambda one: (*frames(one), (picture, picture + 90))
    )
    ((made, _),) = run
    assert made.instruction == "make it darker"
    (request,) = model.requests
    labels = ["Before editing", "After editing", "Reference 1", "Reference 2"]
    assert [media.label for media in request.media] == labels
    assert [len(media.frames) for media in request.media[2:]] == [1, 1]
    assert "such as 'the dress in the first picture'" in request.text
    ((_, alone),) = captioner(tmp_path, Model(), mode="instruction").run([edit], frames)
    assert alone.digest != request.digest


def test_existing_texts_are_kept(tmp_path):
    model = Model()
    kept = captioner(tmp_path, model).caption(sample(1, caption="mine"), frames)
    assert (kept.status, model.requests) == ("existing", [])
    again = captioner(tmp_path, model, overwrite=True).caption(sample(1, caption="mine"), frames)
    assert again.status == "made"
    existing = Captioner(CaptionOptions())
    assert existing.caption(sample(1, caption="mine"), frames).status == "existing"
    assert existing.caption(sample(1), frames).status == "no_text"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"garments": [GARMENT | {"colour": "reddish"}]}, "garments/0/colour"),
        ({"garments": [{k: v for k, v in GARMENT.items() if k != "sleeve"}]}, "garments/0: 'sleeve' is a required"),
        ({"light": "nice"}, "light"),
        ({"garments": []}, "garments"),
        ({"motion": None}, "motion"),
        ({"sentence": "short"}, "sentence"),
        ({"mood": "happy"}, "mood"),
    ],
)
def test_the_schema_holds(change, where):
    good = {
        "id": "x",
        "garments": [GARMENT],
        "sentence": "a red dress walks",
    } | LOOK
    assert parse_answer("```json\n" + json.dumps(good) + "\n```", "fashion", "x")["motion"] == "walking"
    with pytest.raises(InvalidAnswerError, match=where):
        parse_answer(json.dumps(good | change), "fashion", "x")


def test_the_openai_protocol_with_a_flaky_server(tmp_path, monkeypatch):
    class Server(FakeJudgeServer):
        def _answer(self, path: str, body: dict[str, Any], act: str) -> dict[str, Any]:
            form = body["response_format"]["json_schema"]["schema"]
            content = json.dumps({"id": form["properties"]["id"]["enum"][0], "sentence": "a plain grey field"})
            return {"model": "qwen", "choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    monkeypatch.setenv("CAPTION_KEY", "secret")
    with Server(lambda call: "429" if call == 0 else "500" if call == 1 else "ok").running() as server:
        options = CaptionOptions(backend="openai", mode="caption", base_url=f"{server.base_url}/v1", num_frames=3,
                                 api_key_env="CAPTION_KEY", cache=str(tmp_path))  # fmt: skip
        result = Captioner(options, sleep=lambda _: None).caption(sample(3), frames)
    assert (result.status, result.model, len(server.calls)) == ("made", "qwen", 3)
    assert server.calls[2][2]["Authorization"] == "Bearer secret"
    assert len(server.pictures(2)) == 3
    assert server.calls[2][1]["response_format"]["json_schema"]["schema"]["properties"]["sentence"]["minLength"] == 8
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_a_slow_reader_is_not_run_ahead_of(tmp_path):
    drawn = []

    def supply():
        for number in range(50):
            drawn.append(number)
            yield sample(number % 20)

    results = captioner(tmp_path, Model(), concurrency=2).run(supply(), frames)
    next(results)
    assert len(drawn) <= 5
    results.close()


def test_mistakes_name_the_fix():
    with pytest.raises(UserError, match=r"captions.backend=openapi: choose one of existing, openai, transformers"):
        Captioner(CaptionOptions(backend="openapi"))
    assert answer_schema("instruction", "c")["required"] == ["id", "instruction"]
