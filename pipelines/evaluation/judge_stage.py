"""The last stage of an evaluation: ask a judge about every sample, by our rubrics or as a benchmark's own code does."""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from loomvideo.pipelines.evaluation.controls import CONTROLS
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.rubrics import OfficialRubrics, OwnChecklists, OwnRubrics, own_checklists
from loomvideo.pipelines.evaluation.judges.session import JudgeSession, joined
from loomvideo.pipelines.evaluation.judges.transports import Transport, transports
from loomvideo.pipelines.evaluation.media import save_png
from loomvideo.pipelines.evaluation.rows import IDENTITY, JudgementFields, Row
from loomvideo.pipelines.evaluation.stages import FILM, read_inputs, read_result
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites import covebench
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.evaluation.suites.parsers import PARSERS, Parsed, Parser
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST, SCORES
from loomvideo.pipelines.evaluation.suites.registry import suite as find_suite
from loomvideo.pipelines.vlm.batch_session import BatchedSession
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, labelled
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Asked:
    """One call about a sample.

    Attributes:
        text: The rubric or the questions, filled in.
        parser: Reads the answer.
        axes: Fields asked for by schema; empty where the text alone says the form.
        transport: How a benchmark's own code asks; None shows labelled frames.
        system: What stands for ``{system}`` in the transport.
        choices: What a field may be.
    """

    text: str
    parser: Parser
    axes: tuple[str, ...] = ()
    transport: Transport | None = None
    system: str = ""
    choices: tuple[int, ...] | tuple[str, ...] = (1, 2, 3, 4, 5)


@dataclass
class JudgeStage:
    """Ask a judge about every sample, ``repeats`` times, from many threads.

    Attributes:
        store: Where the media are.
        session: The judge; its cache makes repeated runs free.
        sampling: Frames shown by our own rubrics.
        rubrics: Our rubrics.
        official: Official rubrics a suite, in the ``official`` and ``loomvideo`` modes.
        mode: ``strict``, ``checklist``, ``official`` or ``loomvideo``.
        repeats: Independent judgements a sample.
        threads: Concurrent calls.
        judge_identity: Whether the source copied is judged too, as a control.
        checklists: Our checklists.
        temperature: What replaces the temperature of a benchmark's own code; None keeps that.
    """

    store: Store
    session: JudgeSession
    sampling: FrameSampling
    rubrics: OwnRubrics
    official: dict[str, OfficialRubrics] = field(default_factory=dict)
    mode: str = "strict"
    repeats: int = 1
    threads: int = 8
    judge_identity: bool = False
    checklists: OwnChecklists = field(default_factory=own_checklists)
    temperature: float | None = None

    def questions(self, item: EvalItem) -> list[Asked]:
        """The calls about an item.

        Raises:
            UserError: if the official rubrics of its suite are not configured or lack one.
        """
        protocol = find_suite(item.suite).protocol_or_strict(self.mode)
        names_of = protocol.rubric_names
        if names_of is None:
            own = (self.checklists if protocol is CHECKLIST else self.rubrics).question(item)
            return [Asked(own.text, PARSERS[protocol.parser], own.axes, choices=protocol.choices)]
        if item.suite not in self.official:
            raise UserError(
                f"judge.mode={self.mode}: set judge.official_rubrics.{item.suite} to the rubric file of your copy"
            )
        official = self.official[item.suite]
        if protocol.parser == "covebench":
            return self._cove_questions(item, official)
        axes = () if protocol.axes is None else protocol.axes(item)
        question = official.question(names_of(item), item.text, axes)
        parser = functools.partial(_by_axes, PARSERS[protocol.parser], axes)
        return [Asked(question.text, parser, transport=transports()[f"{item.suite}/{self.mode}"])]

    def _cove_questions(self, item: EvalItem, official: OfficialRubrics) -> list[Asked]:
        asked = []
        for form in covebench.FORMS:
            chosen = [q for q in covebench.questions_of(item) if q.form == form]
            if chosen:
                name = "covebench/official-both" if form in covebench.BOTH_VIDEOS else "covebench/official"
                parser = functools.partial(_cove_answers, chosen)
                system = official.question((form,), "", ()).text
                text = covebench.question_text(item, chosen)
                asked.append(Asked(text, parser, transport=transports()[name], system=system))
        return asked

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Add ``judgements`` to a list of rows."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._judge, rows))

    def _judge(self, row: Row) -> Row:
        suite = find_suite(row["suite"])
        skip = row["series"] in CONTROLS or (row["series"] == IDENTITY and not self.judge_identity)
        if skip or not suite.judged:
            return {**row, "judgements": []}
        scale = suite.protocol_or_strict(self.mode).scale
        if row["failure"]:
            # Planned to be judged: it counts in means over every planned sample.
            return {**row, "judgements": [], "judged": scale}
        inputs = read_inputs(self.store, row)
        video = read_result(self.store, row, inputs)
        asked = self.questions(inputs.item)
        judgements = []
        with TemporaryDirectory() as folder:
            result = self._result_file(row, Path(folder), video) if asked[0].transport else Path()
            for repeat in range(self.repeats):
                calls = []
                for question in asked:
                    if question.transport is not None:
                        t = question.transport
                        request = t.request(
                            question.text, inputs.item, Path(row["root"]), result, question.system, repeat
                        )
                    else:
                        media = media_for_item(self.sampling, video, inputs.source, inputs.references)
                        request = VLMRequest(
                            labelled(question.text, media), question.axes, repeat=repeat, choices=question.choices
                        )
                    calls.append(self._session(question).judge(request))
                judgements.append(calls[0] if scale == SCORES else joined(calls))
        return {
            **row,
            "judgements": [cast(JudgementFields, dataclasses.asdict(j)) for j in judgements],
            "judged": scale,
        }

    def _session(self, question: Asked) -> JudgeSession:
        """The judge as the call's transport wants it: temperature, length, attempts and waits."""
        asking = dataclasses.replace(self.session, parser=question.parser)
        t = question.transport
        if t is None:
            return asking
        session = asking.session
        wanted = {
            "temperature": t.temperature if self.temperature is None else self.temperature,
            "max_tokens": t.max_tokens,
            "film_part": t.film_part,
        }
        client: Any = session.client
        if dataclasses.is_dataclass(client):
            known = {f.name for f in dataclasses.fields(client)}
            client = dataclasses.replace(client, **{k: v for k, v in wanted.items() if k in known})
        prices = dataclasses.replace(session.prices, max_output_tokens=t.max_tokens or session.prices.max_output_tokens)
        changed = {"client": client, "prices": prices, "max_attempts": t.attempts, "backoff_s": t.wait_s}
        return dataclasses.replace(asking, session=dataclasses.replace(session, **changed), asks=t.asks)

    def _result_file(self, row: Row, folder: Path, video: np.ndarray) -> Path:
        """The finished film, as made for people; of a picture its lossless PNG."""
        if len(video) == 1:
            save_png(video[0], folder / "result.png")
            return folder / "result.png"
        if row["series"] == IDENTITY:
            return self.store.entry("inputs", row["inputs"]) / "source.mp4"
        return self.store.entry("media", row["media"]) / FILM


def judge_in_batches(stage: JudgeStage, rows: list[Row]) -> list[Row]:
    """Add ``judgements`` to rows through the batch interface of the judge's provider.

    The stage runs in rounds: what it asks is gathered and sent, and the next round finds the answers. An unreadable one
    is asked for once more, as part of the next batch.

    Args:
        stage: The stage; its session is a :class:`~loomvideo.pipelines.vlm.batch_session.BatchedSession`.
        rows: Finished rows.

    Raises:
        ValueError: for another session.
        UserError: if the provider refuses, cannot be reached, or a batch was cancelled.
    """
    session = stage.session.session
    if not isinstance(session, BatchedSession):
        raise ValueError("this judge does not answer in batches")
    book = session.book
    book.resume()
    judged = stage(rows)
    while book.send():
        judged = stage(rows)
    return judged


def _by_axes(parser: Parser, axes: tuple[str, ...], reply: str, _: Sequence[str]) -> Parsed:
    return parser(reply, axes)


def _cove_answers(questions: Sequence[covebench.CheckQuestion], reply: str, _: Sequence[str]) -> Parsed:
    return covebench.parse_answers(reply, questions)
