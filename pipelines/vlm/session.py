"""Asking well: answers cached on disk, retries with back-off, a pace, a budget, and failures by reason."""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loomvideo.pipelines.vlm.clients import Reply, VLMClient, VLMError
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.platform.errors import UserError, full_disk_named

MAX_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Prices:
    """US dollars a million tokens, and what a call is taken to cost before its bill is known.

    Attributes:
        input_usd: A million input tokens.
        output_usd: A million output tokens.
        tokens_per_frame: Input tokens of a picture.
        output_tokens: The answer tokens of a call, for estimates.
        max_output_tokens: Tokens that an answer can have at most, for what the budget sets aside.
    """

    input_usd: float = 0.0
    output_usd: float = 0.0
    tokens_per_frame: int = 258
    output_tokens: int = 400
    max_output_tokens: int = 0

    def cost_usd(self, tokens_in: int, tokens_out: int) -> float:
        """Price of a call."""
        return (tokens_in * self.input_usd + tokens_out * self.output_usd) / 1e6

    def most_usd(self, request: VLMRequest) -> float:
        """Highest price of a request: every output token that it may take."""
        most = max(self.output_tokens, self.max_output_tokens)
        return self.cost_usd(request.estimated_tokens(self.tokens_per_frame), most)


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

    def put(self, key: str, reply: Reply, model: dict) -> None:
        """Store an answer with the identity of the model that gave it."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        with full_disk_named(path, partial):
            partial.write_text(
                json.dumps({"reply": asdict(reply), "judge": model}, ensure_ascii=False), encoding="utf-8"
            )
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
    """A cap on what a run may pay, also when it is killed and continued; 0 is no cap.

    Before a call its highest price is set aside, so that calls at once cannot pass the cap together; afterwards the
    bill takes its place. With a ledger, both are written down at once: a run that continues knows what it has paid, and
    a call that was under way when it was killed counts with what was set aside.

    Args:
        cap_usd: The cap.
        ledger: A JSON-lines file of what was set aside and paid; None keeps no record.
    """

    def __init__(self, cap_usd: float, ledger: Path | None = None):
        self.cap_usd = cap_usd
        self.spent_usd = 0.0
        self._reserved_usd = 0.0
        self._calls = 0
        self._open: dict[str, tuple[int, float]] = {}
        self._ledger = ledger
        self._lock = threading.Lock()
        if ledger is not None and ledger.is_file():
            self.spent_usd, self._calls, self._open = _read_ledger(ledger)

    def allows(self, usd: float) -> bool:
        """Whether the cap leaves room for so much more."""
        return self.cap_usd <= 0 or self.spent_usd + self._reserved_usd + usd <= self.cap_usd * (1 + 1e-9)

    def reserve(self, usd: float, mark: str = "") -> int | None:
        """Set a call's highest price aside; returns the call's number, or None when the cap does not allow it.

        Args:
            usd: The price.
            mark: The name under which a later process finds the call again, with :meth:`reopen`.
        """
        with self._lock:
            if not self.allows(usd):
                return None
            self._reserved_usd += usd
            self._calls += 1
            self._write({"call": self._calls, "reserved_usd": usd} | ({"mark": mark} if mark else {}))
            return self._calls

    def reopen(self, mark: str) -> tuple[int, float] | None:
        """Number and price of a call that was under way when an earlier process ended; its bill may still come."""
        with self._lock:
            found = self._open.pop(mark, None)
            if found is not None:
                self.spent_usd -= found[1]
                self._reserved_usd += found[1]
            return found

    def settle(self, call: int, reserved_usd: float, paid_usd: float) -> None:
        """Replace what was set aside by the bill."""
        with self._lock:
            self._reserved_usd -= reserved_usd
            self.spent_usd += paid_usd
            self._write({"call": call, "paid_usd": paid_usd})

    def _write(self, entry: dict[str, float | str]) -> None:
        if self._ledger is None:
            return
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        with full_disk_named(self._ledger), self._ledger.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


def _read_ledger(path: Path) -> tuple[float, int, dict[str, tuple[int, float]]]:
    """What was paid, the last call's number, and calls with a mark whose bill has not come."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        # A kill cut the last line short; its call had not begun, or is counted with what was set aside.
        path.write_text(whole, encoding="utf-8")
    costs: dict[int, float] = {}
    marked: dict[int, str] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: no JSON; the record of what was paid is damaged") from error
        costs[entry["call"]] = entry.get("paid_usd", entry.get("reserved_usd", 0.0))
        if "paid_usd" in entry:
            marked.pop(entry["call"], None)
        elif "mark" in entry:
            marked[entry["call"]] = entry["mark"]
    still_open = {mark: (number, costs[number]) for number, mark in marked.items()}
    return sum(costs.values()), max(costs, default=0), still_open


def wait_after(failure: VLMError, attempt: int, backoff_s: float) -> float:
    """Seconds until the next attempt: what the provider asks for, else doubling with jitter, to at most a minute."""
    if failure.retry_after_s is not None:
        return failure.retry_after_s
    return min(MAX_BACKOFF_S, backoff_s * 2**attempt) * random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        reply: The answer; None when there is none.
        failure: Why there is none: a reason of :class:`VLMError`, or ``budget``.
        detail: One line about a failure.
        cached: Whether no call was needed.
        tokens_in: Billed now, failed calls included.
        tokens_out: Billed now, failed calls included.
        cost_usd: Paid now, failed calls included.
    """

    reply: Reply | None
    failure: str = ""
    detail: str = ""
    cached: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    cost_usd: float = 0.0


@dataclass
class Session:
    """A model with its cache, pace, budget and retries; may be asked from many threads.

    Attributes:
        client: The model.
        cache: Where answers are kept.
        prices: What calls cost, for the budget.
        budget: Shared cap.
        pace: Shared pace.
        max_attempts: Calls before a retryable failure counts.
        backoff_s: First wait; doubles, with jitter, to at most a minute.
        sleep: What waits; tests replace it.
    """

    client: VLMClient
    cache: AnswerCache
    prices: Prices = field(default_factory=Prices)
    budget: Budget = field(default_factory=lambda: Budget(0.0))
    pace: Pace = field(default_factory=lambda: Pace(0.0))
    max_attempts: int = 5
    backoff_s: float = 2.0
    sleep: Callable[[float], None] = time.sleep

    def cached(self, request: VLMRequest) -> Reply | None:
        """The stored answer to a question, without asking."""
        return self.cache.get(request.key(self.client.identity()))

    def ask(self, request: VLMRequest, check: Callable[[Reply], None] | None = None) -> Answer:
        """Ask, unless it was asked before.

        Args:
            request: The question.
            check: Raises :class:`VLMError` for an answer that does not hold; such an answer is paid for and not
                kept, and when the error is retryable the question is asked again at once.
        """
        identity = self.client.identity()
        key = request.key(identity)
        reply = self.cache.get(key)
        if reply is not None:
            return Answer(reply, cached=True)
        tokens_in = tokens_out = 0
        cost = 0.0
        failure = VLMError("error", retryable=False)
        for attempt in range(self.max_attempts):
            most = self.prices.most_usd(request)
            call = self.budget.reserve(most)
            if call is None:
                return Answer(
                    None, "budget", f"{self.budget.spent_usd:.2f} USD paid", False, tokens_in, tokens_out, cost
                )
            self.pace.wait()
            billed = (0, 0)
            reply = None
            try:
                reply = self.client.complete(request)
                billed = (reply.tokens_in or request.estimated_tokens(self.prices.tokens_per_frame), reply.tokens_out)
            except VLMError as error:
                failure = error
                billed = (error.tokens_in, error.tokens_out)
                if error.reason == "timeout":
                    # The server may have worked for nothing; a budget that ignored that would be no cap.
                    billed = (request.estimated_tokens(self.prices.tokens_per_frame), self.prices.output_tokens)
            finally:
                if reply is not None and check is None:
                    # Before the bill: a kill in between may count a call twice, but never pays for it twice.
                    self.cache.put(key, reply, identity)
                self.budget.settle(call, most, self.prices.cost_usd(*billed))
            tokens_in, tokens_out = tokens_in + billed[0], tokens_out + billed[1]
            cost += self.prices.cost_usd(*billed)
            if reply is not None:
                try:
                    if check is not None:
                        check(reply)
                        self.cache.put(key, reply, identity)
                    return Answer(reply, "", "", False, tokens_in, tokens_out, cost)
                except VLMError as error:
                    failure = error
            if not failure.retryable or attempt == self.max_attempts - 1:
                break
            if reply is None:
                self.sleep(wait_after(failure, attempt, self.backoff_s))
        return Answer(None, failure.reason, str(failure), False, tokens_in, tokens_out, cost)
