"""Asking a judge well: answers cached on disk, retries with back-off, a pace, a budget, and failures by reason."""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loomvideo.pipelines.evaluation.judges.clients import JudgeClient, JudgeError, Reply
from loomvideo.pipelines.evaluation.judges.requests import JudgeRequest
from loomvideo.pipelines.evaluation.suites.parsers import PARSERS, Parsed
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Prices:
    """US dollars a million tokens, and the tokens a call is expected to take."""

    input_usd: float = 0.0
    output_usd: float = 0.0
    tokens_per_frame: int = 258
    expected_output_tokens: int = 400

    def cost_usd(self, tokens_in: int, tokens_out: int) -> float:
        """Price of a call."""
        return (tokens_in * self.input_usd + tokens_out * self.output_usd) / 1e6

    def estimate_usd(self, request: JudgeRequest) -> float:
        """Expected price of a request."""
        return self.cost_usd(request.estimated_tokens(self.tokens_per_frame), self.expected_output_tokens)


@dataclass(frozen=True)
class Judgement:
    """The outcome of one question.

    Attributes:
        parsed: The scores, or the reason there are none.
        reply: The judge's words; empty when there was no answer.
        model: Model version that answered.
        cached: Whether no call was needed.
        tokens_in: Billed for this question now; 0 when cached.
        tokens_out: Billed for this question now; 0 when cached.
        cost_usd: Price paid now.
        latency_s: Of the answer, when it was made.
    """

    parsed: Parsed
    reply: str = ""
    model: str = ""
    cached: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    cost_usd: float = 0.0
    latency_s: float = 0.0


class AnswerCache:
    """Answers on disk, one small JSON file each, written through a temporary name; safe for many processes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The stored answer."""
        path = self._path(key)
        if not path.is_file():
            return None
        return Reply(**json.loads(path.read_text(encoding="utf-8"))["reply"])

    def put(self, key: str, reply: Reply, judge: dict) -> None:
        """Store an answer with the identity of the judge that gave it."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        partial.write_text(json.dumps({"reply": asdict(reply), "judge": judge}, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


class Pace:
    """Spaces calls of all threads to at most ``per_minute``; 0 is no limit."""

    def __init__(self, per_minute: float):
        self._interval_s = 60 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until the next call may start."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval_s
        time.sleep(max(0.0, start - now))


class Budget:
    """A cap on what a run may pay; 0 is no cap. Reserves the expected price before a call."""

    def __init__(self, cap_usd: float):
        self.cap_usd = cap_usd
        self.spent_usd = 0.0
        self._reserved_usd = 0.0
        self._lock = threading.Lock()

    def reserve(self, usd: float) -> bool:
        """Whether a call of this expected price may be made."""
        with self._lock:
            if self.cap_usd > 0 and self.spent_usd + self._reserved_usd + usd > self.cap_usd:
                return False
            self._reserved_usd += usd
            return True

    def settle(self, reserved_usd: float, paid_usd: float) -> None:
        """Replace a reservation by the price paid."""
        with self._lock:
            self._reserved_usd -= reserved_usd
            self.spent_usd += paid_usd


@dataclass
class JudgeSession:
    """A judge with its cache, pace, budget and retries; its methods may be called from many threads.

    Attributes:
        client: The judge.
        cache: Where answers are kept.
        parser: Name of the answer form in ``suites.parsers.PARSERS``.
        prices: For the budget.
        budget: Shared cap.
        pace: Shared pace.
        max_attempts: Calls before a retryable failure counts.
        backoff_s: First wait; doubles, with jitter, to at most a minute.
    """

    client: JudgeClient
    cache: AnswerCache
    parser: str = "strict"
    prices: Prices = field(default_factory=Prices)
    budget: Budget = field(default_factory=lambda: Budget(0.0))
    pace: Pace = field(default_factory=lambda: Pace(0.0))
    max_attempts: int = 5
    backoff_s: float = 2.0
    sleep: Callable[[float], None] = time.sleep

    def judge(self, request: JudgeRequest) -> Judgement:
        """Ask, from the cache if it was asked before; an unreadable answer is asked for once more, then counted."""
        judgement = self._ask(request)
        if judgement.reply and judgement.parsed.sample is None:
            again = self._ask(JudgeRequest(**{**request.__dict__, "ask": 1}))
            if again.reply:
                paid = (judgement.tokens_in, judgement.tokens_out, judgement.cost_usd)
                return Judgement(
                    again.parsed,
                    again.reply,
                    again.model,
                    judgement.cached and again.cached,
                    again.tokens_in + paid[0],
                    again.tokens_out + paid[1],
                    again.cost_usd + paid[2],
                    again.latency_s,
                )
        return judgement

    def _ask(self, request: JudgeRequest) -> Judgement:
        identity = self.client.identity()
        key = request.key(identity)
        parse = PARSERS[self.parser]
        reply = self.cache.get(key)
        if reply is not None:
            parsed = parse(reply.text, request.axes)
            return Judgement(parsed, reply.text, reply.model, cached=True, latency_s=reply.latency_s)
        expected = self.prices.estimate_usd(request)
        if not self.budget.reserve(expected):
            return Judgement(Parsed(None, {}, failure="budget"))
        cost = 0.0
        try:
            reply = self._call(request)
            cost = self.prices.cost_usd(reply.tokens_in or request.estimated_tokens(), reply.tokens_out)
        except JudgeError as failure:
            return Judgement(Parsed(None, {}, failure=failure.reason))
        finally:
            self.budget.settle(expected, cost)
        self.cache.put(key, reply, identity)
        parsed = parse(reply.text, request.axes)
        return Judgement(
            parsed, reply.text, reply.model, False, reply.tokens_in, reply.tokens_out, cost, reply.latency_s
        )  # fmt: skip

    def _call(self, request: JudgeRequest) -> Reply:
        for attempt in range(self.max_attempts):
            self.pace.wait()
            try:
                return self.client.complete(request)
            except JudgeError as failure:
                if not failure.retryable or attempt == self.max_attempts - 1:
                    raise
                wait = min(60.0, self.backoff_s * 2**attempt) * random.uniform(0.5, 1.5)
                self.sleep(failure.retry_after_s if failure.retry_after_s is not None else wait)
        raise AssertionError("unreachable")


def check_budget(cap_usd: float, expected_usd: float, calls: int) -> None:
    """Refuse before the first call when the expected price is over the cap.

    Raises:
        UserError: naming the expected price and what to change.
    """
    if 0 < cap_usd < expected_usd:
        raise UserError(
            f"judge.budget_usd={cap_usd:g}: {calls} calls are expected to cost {expected_usd:.2f} USD; "
            f"raise the budget, or lower limit, judge.repeats or judge.num_frames"
        )
