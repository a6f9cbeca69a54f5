"""Batches of questions: both providers' dialects, failures asked again, kills that cost nothing twice, budgets."""

import json

import pytest
from fixtures.batch_server import BatchServer

from loomvideo.pipelines.vlm.batch_session import PENDING, BatchBook, BatchedSession
from loomvideo.pipelines.vlm.batches import batch_provider
from loomvideo.pipelines.vlm.clients import GeminiClient, OpenAIClient, VLMError
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.pipelines.vlm.session import AnswerCache, Budget, Prices
from loomvideo.platform.errors import UserError

# A request of the server is billed 1000 tokens in and 50 out; in a batch half of 0.15 USD.
PRICES = Prices(input_usd=50.0, output_usd=500.0, output_tokens=50, max_output_tokens=100)
BILL = 0.075


def client_of(server, kind="openai"):
    return OpenAIClient(f"{server.root}/v1", "m") if kind == "openai" else GeminiClient("m", f"{server.root}/v1beta")


def session(tmp_path, client, sleep=lambda s: None, cap=10.0, attempts=3):
    cache, budget = AnswerCache(tmp_path / "answers"), Budget(cap, tmp_path / "spending.jsonl")
    book = BatchBook(
        batch_provider(client), tmp_path / "batches", cache, PRICES, budget, attempts, 60.0, sleep, lambda line: None
    )
    return BatchedSession(client, cache, PRICES, budget, max_attempts=attempts, book=book)


def request(number):
    return VLMRequest((f"question {number} " + "\u2028" + "x" * 4000,), ("quality",))


def ask(asking, count):
    """Rounds until every question has an answer or a failure."""
    asking.book.resume()
    answers = [asking.ask(request(n)) for n in range(count)]
    while asking.book.send():
        answers = [asking.ask(request(n)) for n in range(count)]
    return answers


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_one_batch_answers_all_at_its_price_and_later_runs_ask_nothing(tmp_path, kind):
    with BatchServer().running() as server:
        slept = []
        asking = session(tmp_path, client_of(server, kind), slept.append)
        assert asking.ask(request(0)).failure == PENDING
        answers = ask(asking, 3)
        assert [json.loads(a.reply.text)["quality"] for a in answers] == [4, 4, 4]
        assert [a.cost_usd for a in answers] == pytest.approx([BILL] * 3)
        assert not any(a.cached for a in answers)
        assert [len(batch) for batch in server.submitted] == [3]
        assert slept == [60.0]
        assert asking.budget.spent_usd == pytest.approx(3 * BILL)
        again = session(tmp_path, client_of(server, kind))
        assert [a.cached for a in ask(again, 3)] == [True] * 3
        assert len(server.submitted) == 1
        assert not list((tmp_path / "batches").glob("*.jsonl"))


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_what_fails_is_asked_again_and_what_is_refused_is_not(tmp_path, kind):
    def act(batch, number):
        return ("429", "400", "refuse", "expired", "ok")[number] if batch == 0 else "ok"

    with BatchServer(act).running() as server:
        answers = ask(session(tmp_path, client_of(server, kind)), 5)
        assert [a.failure for a in answers] == ["", "bad request", "blocked", "", ""]
        assert [len(batch) for batch in server.submitted] == [5, 2]
    with BatchServer(lambda batch, number: "expired").running() as server:
        answers = ask(session(tmp_path / "never", client_of(server, kind), attempts=2), 2)
        assert [a.failure for a in answers] == ["not answered"] * 2
        assert len(server.submitted) == 2


def test_a_kill_anywhere_leads_to_no_second_submission(tmp_path):
    for moment in ("upload", "submit", "state", "answers"):
        with BatchServer().running() as server:
            client = client_of(server)
            place = tmp_path / moment
            killed = session(place, client)
            real = getattr(type(killed.book._provider), moment)

            def dies(self, *arguments, real=real, moment=moment):
                # The provider has done its part, and the answer is not written down.
                found = real(self, *arguments)
                list(found) if moment == "answers" else None
                raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(killed.book._provider), moment, dies)
                with pytest.raises(KeyboardInterrupt):
                    ask(killed, 3)
            asking = session(place, client)
            answers = ask(asking, 3)
            assert all(a.reply for a in answers), moment
            assert len(server.submitted) == 1, moment
            assert server.answered == 3
            # The bill replaces what the killed process had set aside.
            assert asking.budget.spent_usd == pytest.approx(3 * BILL), moment
            assert Budget(10.0, place / "spending.jsonl").spent_usd == pytest.approx(3 * BILL), moment


def test_a_kill_while_questions_are_gathered_costs_nothing(tmp_path):
    with BatchServer().running() as server:
        session(tmp_path, client_of(server)).ask(request(7))
        assert list((tmp_path / "batches").glob("*.jsonl"))
        asking = session(tmp_path, client_of(server))
        ask(asking, 1)
        assert [len(batch) for batch in server.submitted] == [1]
        assert asking.budget.spent_usd == pytest.approx(BILL)


def test_a_submission_whose_answer_is_lost_is_found_again(tmp_path):
    with BatchServer(lost=[0]).running() as server:
        assert all(a.reply for a in ask(session(tmp_path, client_of(server)), 2))
        assert len(server.submitted) == 1


def test_the_budget_stops_exactly(tmp_path):
    with BatchServer().running() as server:
        asking = session(tmp_path, client_of(server), cap=0.35)
        # The most of a request is 0.1: three fit, and the fourth is not sent.
        assert PRICES.most_usd(request(0)) == pytest.approx(0.1, abs=0.005)
        answers = ask(asking, 5)
        assert [a.failure for a in answers] == ["", "", "", "budget", "budget"]
        assert [len(batch) for batch in server.submitted] == [3]
        assert asking.budget.spent_usd == pytest.approx(3 * BILL)
        # What is left of the cap, 0.125, allows one more in a run that goes on.
        more = ask(session(tmp_path, client_of(server), cap=0.35), 5)
        assert [a.failure for a in more] == ["", "", "", "", "budget"]
        assert server.answered == 4


def test_files_are_split_as_providers_ask(tmp_path, monkeypatch):
    monkeypatch.setattr("loomvideo.pipelines.vlm.batch_session.MAX_BYTES", 10_000)
    with BatchServer().running() as server:
        assert all(a.reply for a in ask(session(tmp_path, client_of(server)), 5))
        assert [len(batch) for batch in server.submitted] == [2, 2, 1]


def test_a_refused_or_cancelled_batch_ends_the_run_with_the_providers_words(tmp_path):
    with BatchServer(end="failed").running() as server:
        asking = session(tmp_path, client_of(server))
        with pytest.raises(UserError, match="refuses batch batch_0: enqueued token limit"):
            ask(asking, 2)
        assert asking.budget.spent_usd == 0
    with BatchServer(lambda batch, number: "ok" if number == 0 else "expired", end="cancelled").running() as server:
        with pytest.raises(UserError, match="batch batch_0 was cancelled at the provider"):
            ask(session(tmp_path / "c", client_of(server)), 2)
        server.end = "completed"
        server.act = lambda batch, number: "ok"
        assert all(a.reply for a in ask(session(tmp_path / "c", client_of(server)), 2))
        assert [len(batch) for batch in server.submitted] == [2, 1]


def test_a_server_without_batches_or_away_says_so(tmp_path):
    with BatchServer().running() as server:
        wrong = OpenAIClient(f"{server.root}/v2", "m")
        with pytest.raises(UserError, match=r"judge\.batch: bad request: HTTP 404"):
            ask(session(tmp_path, wrong), 1)

    def away(self, batch):
        raise VLMError("unreachable", True)

    with BatchServer().running() as server, pytest.MonkeyPatch.context() as patch:
        asking = session(tmp_path / "away", client_of(server))
        patch.setattr(type(asking.book._provider), "state", away)
        with pytest.raises(UserError, match="goes on with batch batch_0 when it is started again"):
            ask(asking, 1)
        patch.undo()
        assert ask(session(tmp_path / "away", client_of(server)), 1)[0].reply
        assert len(server.submitted) == 1
