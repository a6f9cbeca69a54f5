"""Budgets that hold to the cent, also over kills, and answers that are paid for once."""

import json
import subprocess
import sys
import threading

import pytest

from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer
from loomvideo.pipelines.vlm.clients import OpenAIClient, Reply, VLMError
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.pipelines.vlm.session import AnswerCache, Budget, Pace, Prices, Session
from loomvideo.platform.errors import UserError

# A call of the server below is billed 1000 tokens in and 50 out.
PRICES = Prices(input_usd=100.0, output_usd=1000.0, output_tokens=50, max_output_tokens=100)
BILL = 0.1 + 0.05


def request(number: int, padding: int = 4000) -> VLMRequest:
    return VLMRequest((f"question {number} " + "x" * padding,), ("quality",))


def session(tmp_path, client, **changes) -> Session:
    return Session(client, AnswerCache(tmp_path / "answers"), prices=PRICES, sleep=lambda s: None, **changes)


def test_a_budget_sets_aside_the_most_a_call_can_cost_and_stops_exactly(tmp_path):
    with FakeJudgeServer().running() as server:
        asking = session(tmp_path, OpenAIClient(f"{server.base_url}/v1", "m"), budget=Budget(0.75))
        answers = [asking.ask(request(n)) for n in range(6)]
        # The most is 0.2 a call, the bill 0.15: after four calls (0.6) one more could pass 0.75.
        assert asking.prices.most_usd(request(0)) == pytest.approx(0.2, abs=0.01)
        assert [answer.failure for answer in answers] == [""] * 4 + ["budget"] * 2
        assert len(server.calls) == 4
        assert asking.budget.spent_usd == pytest.approx(BILL * 4)
        assert asking.budget.spent_usd <= 0.75
        assert asking.ask(request(0)).cached


def test_calls_at_once_do_not_pass_the_cap_together(tmp_path):
    with FakeJudgeServer().running() as server:
        asking = session(tmp_path, OpenAIClient(f"{server.base_url}/v1", "m"), budget=Budget(0.5))
        threads = [threading.Thread(target=asking.ask, args=(request(n),)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 2 <= len(server.calls) <= 3
        assert asking.budget.spent_usd <= 0.5


class Failing:
    """Fails as told; bills what the error says."""

    def __init__(self, *failures):
        self.failures = list(failures)

    def identity(self):
        return {"kind": "test"}

    def complete(self, request):
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return Reply("fine", "m", 1000, 50, 0.0)


def test_failed_calls_are_charged_with_what_they_cost(tmp_path):
    blocked = VLMError("blocked", False, tokens_in=1000, tokens_out=10)
    asking = session(tmp_path, Failing(blocked))
    answer = asking.ask(request(0))
    assert (answer.failure, answer.cost_usd) == ("blocked", pytest.approx(0.1 + 0.01))
    assert asking.budget.spent_usd == pytest.approx(answer.cost_usd)
    # A server that was given up on may have worked; one that refused has not.
    slow = session(tmp_path, Failing(VLMError("timeout", True), VLMError("rate limited", True)))
    answer = slow.ask(request(1))
    expected = PRICES.cost_usd(request(1).estimated_tokens(PRICES.tokens_per_frame), PRICES.output_tokens)
    assert answer.cost_usd == pytest.approx(expected + BILL)


def test_an_answer_that_does_not_hold_is_paid_and_not_kept(tmp_path):
    asking = session(tmp_path, Failing())
    refusals = [True, False]

    def check(reply):
        if refusals.pop(0):
            raise VLMError("invalid answer", True)

    answer = asking.ask(request(0), check)
    assert (answer.reply.text, answer.cost_usd) == ("fine", pytest.approx(2 * BILL))
    assert asking.cached(request(0)).text == "fine"


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_session import PRICES, request
from loomvideo.pipelines.vlm.clients import OpenAIClient
from loomvideo.pipelines.vlm.session import AnswerCache, Budget, Session
root = Path({root!r})
asking = Session(OpenAIClient({url!r}, "m"), AnswerCache(root / "answers"), PRICES, Budget(10, root / "spending.jsonl"))
for number in range(8):
    asking.ask(request(number))
"""


def test_a_killed_run_goes_on_without_a_repeated_paid_call_and_remembers_what_it_paid(tmp_path):
    processes = []

    def behaviour(call):
        if call == 3:
            processes[0].kill()
            processes[0].wait()
        return "ok"

    with FakeJudgeServer(behaviour).running() as server:
        url = f"{server.base_url}/v1"
        script = SCRIPT.format(folder=str(__file__).rsplit("/", 1)[0], root=str(tmp_path), url=url)
        processes.append(subprocess.Popen([sys.executable, "-c", script]))
        processes[0].wait(timeout=120)
        assert len(server.calls) == 4
        answered = {json.dumps(body) for _, body, _ in server.calls[:3]}
        asking = session(tmp_path, OpenAIClient(url, "m"), budget=Budget(10, tmp_path / "spending.jsonl"))
        # Three bills, and the most that the call under way could have cost.
        assert asking.budget.spent_usd == pytest.approx(3 * BILL + PRICES.most_usd(request(3)))
        for number in range(8):
            assert asking.ask(request(number)).reply is not None
        assert len(server.calls) == 4 + 5
        assert not answered & {json.dumps(body) for _, body, _ in server.calls[4:]}
    again = Budget(10, tmp_path / "spending.jsonl")
    assert again.spent_usd == pytest.approx(8 * BILL + PRICES.most_usd(request(3)))


def test_a_damaged_record_of_spending_is_an_error_but_for_a_last_line_cut_short(tmp_path):
    path = tmp_path / "spending.jsonl"
    path.write_text('{"call": 1, "reserved_usd": 0.2}\n{"call": 1, "paid_usd": 0.1}\n{"call": 2, "res')
    budget = Budget(1, path)
    assert budget.spent_usd == pytest.approx(0.1)
    budget.settle(budget.reserve(0.2), 0.2, 0.15)
    assert Budget(1, path).spent_usd == pytest.approx(0.25)
    path.write_text('{"call": 1, "rese\n{"call": 1, "paid_usd": 0.1}\n')
    with pytest.raises(UserError, match=r"spending\.jsonl:1: no JSON"):
        Budget(1, path)


def test_pace_spaces_calls(monkeypatch):
    clock, slept = [0.0], []
    monkeypatch.setattr("loomvideo.pipelines.vlm.session.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("loomvideo.pipelines.vlm.session.time.sleep", slept.append)
    pace = Pace(per_minute=30)
    for _ in range(3):
        pace.wait()
    assert slept == [0, 2, 4]
