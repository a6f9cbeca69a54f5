"""Asking through a provider's batch interface: questions gather in files, whose answers end in the usual cache.

Whoever asks does so in rounds. In a round a question without an answer is written down and reported as
:data:`PENDING`; :meth:`BatchBook.send` then has all of them answered, and the next round finds the answers. What is
under way is kept in a folder: a process that goes on after a kill waits for the batches of the one before it, and
submits none of them again.
"""

import json
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from loomvideo.pipelines.vlm.batches import CANCELLED, REFUSED, RUNNING, BatchProvider
from loomvideo.pipelines.vlm.clients import Reply, VLMError
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.pipelines.vlm.session import Answer, AnswerCache, Budget, Prices, Session, wait_after
from loomvideo.platform.errors import UserError, full_disk_named

PENDING = "pending"
# Providers take 50,000 requests and 200 MB a file.
MAX_REQUESTS, MAX_BYTES = 50_000, 150_000_000
_T = TypeVar("_T")


@dataclass
class _Planned:
    """A question in a file."""

    name: str
    key: str
    most_usd: float
    tokens: int
    identity: dict[str, Any]


@dataclass
class _Part:
    """A file of questions and its batch."""

    mark: str
    requests: list[_Planned] = field(default_factory=list)
    file: str = ""
    batch: str = ""
    call: int | None = None
    reserved_usd: float = 0.0
    told: str = ""


class BatchBook:
    """Questions gathered, sent and answered; shared by all threads that ask.

    Args:
        provider: The batch interface.
        folder: Where files and what is under way are kept.
        cache: Where answers go.
        prices: What an answer of a batch costs.
        budget: The cap that holds for batches too.
        max_attempts: Batches that a question may be part of before its failure counts, and attempts of one call.
        poll_s: Seconds between two looks at a batch.
        sleep: What waits.
        tell: Where a line about progress goes.
    """

    def __init__(
        self,
        provider: BatchProvider,
        folder: Path,
        cache: AnswerCache,
        prices: Prices,
        budget: Budget,
        max_attempts: int,
        poll_s: float,
        sleep: Callable[[float], None],
        tell: Callable[[str], None],
    ):
        self._provider, self._folder, self._cache = provider, folder, cache
        self._prices, self._budget = prices, budget
        self._max_attempts, self._poll_s, self._sleep, self._tell = max_attempts, poll_s, sleep, tell
        self._lock = threading.Lock()
        self._failed: dict[str, VLMError] = {}
        self._billed: dict[str, tuple[int, int, float]] = {}
        self._attempts: dict[str, int] = {}
        self._known: set[str] = set()
        self._parts: list[_Part] = []
        self._open: TextIO | None = None

    def ask(self, session: Session, request: VLMRequest) -> Answer:
        """The answer, if there is one; else the question is written down and the failure is :data:`PENDING`."""
        identity = session.client.identity()
        key = request.key(identity)
        reply = self._cache.get(key)
        billed = self._billed.get(key)
        if reply is not None:
            return Answer(reply, "", "", billed is None, *(billed or (0, 0, 0.0)))
        if (failure := self._failed.get(key)) is not None:
            return Answer(None, failure.reason, str(failure), False, *(billed or (0, 0, 0.0)))
        name = key[:40]
        line = json.dumps(self._provider.line(name, session.client, request)) + "\n"
        prices = session.prices
        tokens = request.estimated_tokens(prices.tokens_per_frame)
        planned = _Planned(name, key, prices.most_usd(request), tokens, identity)
        with self._lock:
            if key not in self._known:
                self._known.add(key)
                self._write(planned, line)
        return Answer(None, PENDING)

    def _write(self, planned: _Planned, line: str) -> None:
        part = self._parts[-1] if self._open is not None else None
        if self._open is None or len(part.requests) >= MAX_REQUESTS or self._open.tell() + len(line) > MAX_BYTES:
            if self._open is not None:
                self._open.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            part = _Part(f"loomvideo-{uuid.uuid4().hex[:16]}")
            self._parts.append(part)
            self._open = self._lines(part).open("w", encoding="utf-8")
        with full_disk_named(self._lines(part)):
            self._open.write(line)
        part.requests.append(planned)

    def resume(self) -> None:
        """Wait for batches that an earlier process left under way, and take their answers.

        Raises:
            UserError: as :meth:`send`.
        """
        parts = []
        for path in sorted(self._folder.glob("*.json")):
            state = json.loads(path.read_text(encoding="utf-8"))
            if not state.pop("done"):
                part = _Part(**state | {"requests": [_Planned(**entry) for entry in state["requests"]]})
                part.call, part.reserved_usd = self._budget.reopen(part.mark) or (None, 0.0)
                parts.append(part)
        if parts:
            self._tell(f"going on with {len(parts)} batches of before")
        marks = {part.mark for part in (*parts, *self._parts)}
        for path in self._folder.glob("*.jsonl"):
            if path.stem not in marks:
                # Its questions were still being gathered, so none was sent.
                path.unlink()
        self._finish(parts)

    def send(self) -> bool:
        """Have every question that is written down answered; False when there is none.

        Raises:
            UserError: if the provider refuses a batch, cannot be reached, or a person cancelled a batch.
        """
        if self._open is not None:
            self._open.close()
        parts, self._parts, self._open = self._parts, [], None
        self._finish(parts)
        self._known.clear()
        return bool(parts)

    def _finish(self, parts: list[_Part]) -> None:
        waiting = [part for part in parts if self._submit(part)]
        cancelled = []
        while waiting:
            for part in list(waiting):
                state = self._patiently(part, lambda part=part: self._provider.state(part.batch))
                if state.told != part.told:
                    part.told = state.told
                    self._tell(f"batch {part.batch}: {state.told}")
                if state.state == RUNNING:
                    continue
                waiting.remove(part)
                if state.state == REFUSED:
                    self._settle(part, 0.0)
                    raise UserError(f"judge.batch: the provider refuses batch {part.batch}: {state.why or state.told}")
                self._read(part, state.files)
                if state.state == CANCELLED:
                    cancelled.append(part.batch)
            if waiting:
                self._sleep(self._poll_s)
        if cancelled:
            raise UserError(
                f"judge.batch: batch {', '.join(cancelled)} was cancelled at the provider; the answers that came are "
                f"kept, and the same run asks for the others when it is started again"
            )

    def _submit(self, part: _Part) -> bool:
        """Submit a part unless it is; False when the budget allows none of it."""
        if part.batch:
            return True
        if part.call is None:
            self._keep_what_is_allowed(part)
            if not part.requests:
                self._lines(part).unlink()
                return False
            self._save(part)
            part.reserved_usd = sum(planned.most_usd for planned in part.requests)
            part.call = self._budget.reserve(part.reserved_usd, part.mark)
        if not part.file:
            part.file = self._patiently(part, lambda: self._provider.upload(self._lines(part), part.mark))
            self._save(part)
        # A call of which no answer came may have started the batch all the same.
        part.batch = self._patiently(
            part, lambda: self._provider.find(part.mark) or self._provider.submit(part.file, part.mark)
        )
        self._save(part)
        self._tell(f"batch {part.batch}: {len(part.requests)} questions")
        return True

    def _keep_what_is_allowed(self, part: _Part) -> None:
        total, kept = 0.0, []
        for planned in part.requests:
            if self._budget.allows(total + planned.most_usd):
                total += planned.most_usd
                kept.append(planned)
            else:
                paid = f"{self._budget.spent_usd:.2f} USD paid"
                self._failed[planned.key] = VLMError("budget", False, paid)
        if len(kept) < len(part.requests):
            names = {planned.name for planned in kept}
            path = self._lines(part)
            shorter = path.with_suffix(".tmp")
            with path.open(encoding="utf-8") as lines, shorter.open("w", encoding="utf-8") as out:
                for planned, line in zip(part.requests, lines, strict=True):
                    if planned.name in names:
                        out.write(line)
            shorter.replace(path)
            part.requests = kept

    def _read(self, part: _Part, files: tuple[str, ...]) -> None:
        """Take the answers of a batch that has ended; what it does not answer may be asked again."""
        missing = {planned.name: planned for planned in part.requests}
        paid = 0.0
        for file in files:
            for answer in self._patiently(part, lambda file=file: list(self._provider.answers(file))):
                planned = missing.pop(answer.name, None)
                if planned is not None:
                    paid += self._take(planned, answer.reply, answer.error)
        for planned in missing.values():
            self._take(planned, None, VLMError("not answered", True, part.told))
        self._settle(part, paid)

    def _take(self, planned: _Planned, reply: Reply | None, error: VLMError | None) -> float:
        """Keep an answer or a failure; returns what it cost."""
        tokens = (0, 0)
        if reply is not None:
            tokens = (reply.tokens_in or planned.tokens, reply.tokens_out)
            self._cache.put(planned.key, reply, planned.identity)
        elif error is not None:
            tokens = (error.tokens_in, error.tokens_out)
        cost = self._prices.cost_usd(*tokens)
        before = self._billed.get(planned.key, (0, 0, 0.0))
        self._billed[planned.key] = (before[0] + tokens[0], before[1] + tokens[1], before[2] + cost)
        attempts = self._attempts[planned.key] = self._attempts.get(planned.key, 0) + 1
        if error is not None and (not error.retryable or attempts >= self._max_attempts):
            self._failed[planned.key] = error
        return cost

    def _settle(self, part: _Part, paid_usd: float) -> None:
        if part.call is not None:
            self._budget.settle(part.call, part.reserved_usd, paid_usd)
        self._save(part, done=True)
        self._lines(part).unlink(missing_ok=True)

    def _patiently(self, part: _Part, what: Callable[[], _T]) -> _T:
        attempt = 0
        while True:
            try:
                return what()
            except VLMError as error:
                attempt += 1
                if not error.retryable or attempt >= self._max_attempts:
                    which = f"batch {part.batch}" if part.batch else "what was to be submitted"
                    raise UserError(
                        f"judge.batch: {error}; the same run goes on with {which} when it is started again, "
                        f"and nothing is paid twice"
                    ) from error
                self._sleep(wait_after(error, attempt - 1, 2.0))

    def _lines(self, part: _Part) -> Path:
        return self._folder / f"{part.mark}.jsonl"

    def _save(self, part: _Part, done: bool = False) -> None:
        state = {
            "mark": part.mark,
            "requests": [vars(planned) for planned in part.requests],
            "file": part.file,
            "batch": part.batch,
            "done": done,
        }
        path = self._folder / f"{part.mark}.json"
        partial = path.with_suffix(".tmp")
        with full_disk_named(path, partial):
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(path)


@dataclass
class BatchedSession(Session):
    """A session whose questions go through a book of batches.

    Attributes:
        book: The book.
    """

    book: BatchBook = field(kw_only=True)

    def ask(self, request: VLMRequest, check: Callable[[Reply], None] | None = None) -> Answer:
        """See :meth:`Session.ask`; a question that has no answer yet fails as :data:`PENDING`."""
        if check is not None:
            raise ValueError("answers of batches are checked by who reads them")
        return self.book.ask(self, request)
