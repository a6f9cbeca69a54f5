"""Our requests and scores beside those of the benchmarks' own code (``exchanges/record.py`` made the recording)."""

import importlib.util
import json
from pathlib import Path

import pytest

from loomvideo.pipelines.evaluation.judge_stage import JudgeStage
from loomvideo.pipelines.evaluation.judges.rubrics import official_rubrics, own_rubrics
from loomvideo.pipelines.evaluation.judges.session import JudgeSession
from loomvideo.pipelines.evaluation.judges.transports import transports
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites.covebench import covebench_official
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.evaluation.suites.parsers import checked
from loomvideo.pipelines.evaluation.suites.protocols import Judged
from loomvideo.pipelines.evaluation.suites.registry import SUITES
from loomvideo.pipelines.vlm import clients
from loomvideo.pipelines.vlm.clients import GeminiClient, OpenAIClient, VLMError
from loomvideo.pipelines.vlm.requests import FrameSampling
from loomvideo.pipelines.vlm.session import AnswerCache, Session

FOLDER = Path(__file__).with_name("exchanges")
RECORDED = json.loads((FOLDER / "exchanges.json").read_text(encoding="utf-8"))
_spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

COVE_FORMS = list(record.COVE_REPLIES)
COVE_FORMS_OF = {"AB-MCQ": 0, "Single-TF": 1, "Dual-TF": 2, "Score-MCQ": 3}
ITEMS = {
    "openve": EvalItem("openve", "0", "video_edit", "local_add", record.INSTRUCTION, "source.mp4"),
    "imgedit": EvalItem("imgedit", "0", "image_edit", "add", record.INSTRUCTION, "source.jpg"),
    "refvie": EvalItem("refvie", "0", "ref_edit", "subject", record.INSTRUCTION, "source.mp4", ("one.jpg",)),
    "ivbench_tiv2v": EvalItem(
        "ivbench_tiv2v", "0", "ref_edit", "local_add", record.INSTRUCTION, "source.mp4", ("one.jpg",)
    ),
    "ivbench_mi2v": EvalItem(
        "ivbench_mi2v", "0", "mi2v", "2subject", record.INSTRUCTION,
        references=("one.jpg", "two.png", "background.png"), extra={"subjects": 2, "with_background": True},
    ),
    "covebench": EvalItem(
        "covebench", "1", "video_edit", "2 edits", record.INSTRUCTION, "source.mp4",
        extra={"questions": record.COVE_QUESTIONS},
    ),
}  # fmt: skip
RUBRICS = {
    "openve": {"Local_Add": record.EDIT},
    "imgedit": {"add": record.EDIT, "ADD_PROMPT": record.EDIT},
    "refvie": {"SUBJECT_REFERENCE_PROMPT": record.REFVIE},
    "ivbench_tiv2v": {"tiv2v_local_add": record.EDIT, "TIV2V_LOCAL_ADD_PROMPT": record.EDIT},
    "ivbench_mi2v": {"Compositional_MI2V_multi_subjects_with_background": record.MAKE},
    "covebench": {form: f"{form}: answer these questions about videos, please, as JSON." for form in COVE_FORMS},
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Makes the judge stage of an exchange over the media that the recording was made with."""
    for name in record.FILES:
        (tmp_path / name).write_bytes(f"the bytes of {name}".encode())

    def make(suite, mode, api):
        path = tmp_path / "rubrics.json"
        path.write_text(json.dumps(RUBRICS[suite]))
        model = next(t.model for name, t in transports().items() if name.startswith(f"{suite}/{mode}"))
        local = "http://127.0.0.1:1"
        client = OpenAIClient(local, model) if api == "openai" else GeminiClient(model, local)
        session = JudgeSession(Session(client, AnswerCache(tmp_path / "answers"), sleep=lambda s: None))
        official = {suite: official_rubrics(path)}
        return JudgeStage(Store(tmp_path), session, FrameSampling(), own_rubrics(), official, mode)

    return make


@pytest.mark.parametrize("name", list(RECORDED))
def test_the_same_request_and_the_same_score(stage, tmp_path, monkeypatch, name):
    suite, mode, *form = name.split("/")
    recorded, item = RECORDED[name], ITEMS[suite]
    judge = stage(suite, mode, recorded["request"]["api"])
    asked = judge.questions(item)[COVE_FORMS_OF[form[0]] if form else 0]
    sent = []

    def post(url, body, headers, timeout_s):
        sent.append(record.from_openai(body) if "chat/completions" in url else record.from_gemini(url, body))
        raise VLMError("bad request", False)

    monkeypatch.setattr(clients, "post_json", post)
    result = tmp_path / ("result.png" if suite == "imgedit" else "result.mp4")
    request = asked.transport.request(asked.text, item, tmp_path, result, asked.system)
    judge._session(asked).judge(request)
    assert sent == [recorded["request"]]

    for answer, official in zip(recorded["answers"], recorded["scores"], strict=True):
        parsed = asked.parser(answer, request.axes)
        if suite == "covebench":
            expected = (
                None if official is None else {k: v / 10 if form == ["Score-MCQ"] else v for k, v in official.items()}
            )
            assert (None if parsed.failure else {k.split("/")[1]: v for k, v in parsed.answers.items()}) == expected
        elif name == "refvie/official":
            assert (list(parsed.scores.values()) if parsed.sample is not None else None) == official
        elif name in ("ivbench_tiv2v/official", "ivbench_mi2v/official"):
            assert (parsed.sample, parsed.minimum) == tuple(v if v not in ("ERROR", "") else None for v in official)
        else:
            assert parsed.sample == (None if official == "ERROR" else official)


def test_covebench_counts_questions_for_its_figures_and_samples_for_the_union(stage):
    judge = stage("covebench", "official", "openai")
    asked = judge.questions(ITEMS["covebench"])
    replies = [RECORDED[f"covebench/official/{form}"]["answers"][0] for form in COVE_FORMS_OF]
    parsed = checked([a.parser(reply, ()) for a, reply in zip(asked, replies, strict=True)])
    # Q1 and Q4 right, Q2 and Q3 wrong, Q5 kept at 8 of 10.
    assert parsed.scores == pytest.approx({"done": 0.5, "plausible": 0.5, "preserved": 0.8, "union": 0.0})
    failed = checked([asked[0].parser("no idea", ()), asked[1].parser(replies[1], ())])
    assert (failed.sample, failed.failure) == (None, "unparsable")
    figures = covebench_official([Judged("2 edits", parsed), Judged("2 edits", failed)])
    assert figures == pytest.approx({"IFS": 200 / 3, "VRS": 100 / 3, "SEM": 80.0, "UAS": 0.0})


def test_every_judged_public_suite_says_how_its_code_asks():
    described = {name.removesuffix("-both") for name in transports()}
    modes = {f"{s.name}/{mode}" for s in SUITES.values() for mode in s.protocols if mode in ("official", "loomvideo")}
    assert described == modes
    deviations = transports()["openve/official"].deviations("gemini", "gemini-2.5-pro", 0.0, 3)
    assert [line.split("=")[0] for line in deviations] == [
        "judge.kind", "judge.model", "judge.temperature", "judge.repeats",
    ]  # fmt: skip
