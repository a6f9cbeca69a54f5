"""Rewards: metrics in one direction, a server that is asked, and failures that are never a number."""

import http.server
import json
import threading

import numpy as np
import pytest

from loomvideo.pipelines.evaluation import outage
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.rewards import Rewarder, Score, group_rewards
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.platform.errors import UserError


def loaded(size=32):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (1, size, size, 3), dtype=np.uint8)
    target = source.copy()
    target[:, 8:20, 8:20] = (200, 30, 30)
    item = EvalItem("t", "k", "image_edit", "", "red", aligned=True, extra={"garment": True})
    return LoadedItem(item, source, (), target, None, (size, size), 1, 24.0)


def test_a_reward_that_fails_is_counted_and_is_never_a_number():
    inputs = loaded()
    rewarder = Rewarder({"garment_colour": 1.0, "outside": 0.5}, {"outside_psnr_db": 25})
    good = rewarder.score(inputs.target, inputs)
    assert good.total == pytest.approx(good.rewards["garment_colour"] + 0.5 * good.rewards["outside"])
    assert good.rewards["garment_colour"] == pytest.approx(0, abs=1e-3)
    nothing_changed = rewarder.score(inputs.target, LoadedItem(**{**vars(inputs), "target": inputs.source}))
    assert nothing_changed.total is None
    assert "garment_delta_e" in nothing_changed.failure
    wrong = rewarder.score(inputs.target[:, :16], inputs)
    assert wrong.total is None
    assert wrong.failure
    noise = np.random.default_rng(1).integers(0, 255, inputs.target.shape, dtype=np.uint8)
    assert rewarder.score(noise, inputs).floored == ("outside_psnr_db",)
    assert group_rewards([good, nothing_changed, wrong], 1.0) == [None, None, None]
    without = Rewarder({"garment_colour": 1.0, "outside": 0.0, "beauty": 0.0}, {}).score(inputs.target, inputs)
    assert set(without.rewards) == {"garment_colour"}
    with pytest.raises(UserError, match="give at least one reward"):
        Rewarder({"outside": 0.0}, {})
    # Only what is looked at is measured.
    assert set(good.metrics) == {"garment_delta_e", "outside_psnr_db"}
    with pytest.raises(UserError, match=r"beauty is none of garment_colour.*rewards.server"):
        Rewarder({"beauty": 1.0}, {})
    with pytest.raises(UserError, match=r"rewards.floors: outside_psnr is no metric.*mean outside_psnr_db\?"):
        Rewarder({"outside": 1.0}, {"outside_psnr": 25})
    with pytest.raises(UserError, match=r"rewards.watched: beauty is no metric.*there are asked_area"):
        Rewarder({"outside": 1.0}, {}, watched=["beauty"])


def test_rewards_of_a_group_compare_with_its_mean():
    scores = [Score({}, total=value) for value in (1.0, 2.0, 3.0)]
    assert group_rewards(scores, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert group_rewards(scores, 2.0)[2] == pytest.approx(0.5 + 1 / (4 * np.std([1, 2, 3])))
    failed = Score({}, failure="x")
    assert group_rewards([*scores, failed], 1.0)[3] is None
    floored = Score({}, total=9.0, floored=("f",))
    assert group_rewards([*scores, floored], 1.0) == [*group_rewards(scores, 1.0), 0.0]
    assert group_rewards([Score({}, total=2.0)] * 3, 1.0) == [0.5] * 3


def test_a_server_that_is_down_for_a_while_changes_nothing(monkeypatch):
    monkeypatch.setattr("loomvideo.pipelines.evaluation.rewards.FIRST_PAUSE_S", 0.01)
    nonsense = [{}, [1], {"error": "warming up"}, {"rewards": None}, {"rewards": {}}, {"rewards": {"beauty": True}}]
    answers = ["down", *nonsense, {"rewards": {"beauty": "1"}}, "ok", "ok"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers.pop(0)
            self.send_response(503 if answer == "down" else 200)
            self.end_headers()
            body = {"rewards": {"beauty": 0.25 + len(sent["result"])}} if answer == "ok" else answer
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        inputs, url = loaded(), f"http://127.0.0.1:{server.server_port}"
        broken = Rewarder({"beauty": 2.0}, {}, url).score(inputs.target, inputs)
        whole = Rewarder({"beauty": 2.0}, {}, url).score(inputs.target, inputs)
        assert broken == whole
        assert whole.total == 2.5
    finally:
        server.shutdown()
        server.server_close()
    gone = Rewarder({"beauty": 2.0}, {}, url, patience_s=0.0).score(inputs.target, inputs)
    assert gone.total is None
    assert gone.away
    assert url in gone.failure


def test_patience_is_for_an_outage_and_not_for_every_question(monkeypatch):
    seconds = iter([0.0, 5.0, 11.0, 12.0, 100.0])
    monkeypatch.setattr(outage.time, "monotonic", lambda: next(seconds))
    away = outage.Outage(10.0)
    assert [away.may_wait(1.0) for _ in range(4)] == [True, True, False, False]
    away.is_over()
    assert away.may_wait(1.0)
