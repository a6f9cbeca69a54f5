"""A judge's answers as scores: parsed by the protocol's form, unreadable ones asked for once more."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from loomvideo.pipelines.evaluation.suites.parsers import Parsed, Parser, checked, strict_json
from loomvideo.pipelines.vlm.requests import VLMRequest
from loomvideo.pipelines.vlm.session import Answer, Session


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
        cost_usd: Price paid now, failed calls included.
        latency_s: The latency of the answer, when it was made.
    """

    parsed: Parsed
    reply: str = ""
    model: str = ""
    cached: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    cost_usd: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True)
class JudgeSession:
    """A model that judges; its methods may be called from many threads.

    Attributes:
        session: The model with its cache, budget and pace.
        parser: Reads an answer.
        asks: Questions before an unreadable answer counts.
    """

    session: Session
    parser: Parser = strict_json
    asks: int = 2

    def judge(self, request: VLMRequest) -> Judgement:
        """Ask, from the cache if it was asked before; an unreadable answer is asked for again, then counted."""
        judgement = self._ask(request)
        for ask in range(1, self.asks):
            if not judgement.reply or not judgement.parsed.failure:
                break
            again = self._ask(dataclasses.replace(request, ask=ask))
            judgement = dataclasses.replace(
                again if again.reply else judgement,
                cached=judgement.cached and again.cached,
                tokens_in=judgement.tokens_in + again.tokens_in,
                tokens_out=judgement.tokens_out + again.tokens_out,
                cost_usd=judgement.cost_usd + again.cost_usd,
            )
        return judgement

    def _ask(self, request: VLMRequest) -> Judgement:
        answer: Answer = self.session.ask(request)
        billed = (answer.cached, answer.tokens_in, answer.tokens_out, answer.cost_usd)
        if answer.reply is None:
            return Judgement(Parsed(None, {}, failure=answer.failure), "", "", *billed)
        parsed = self.parser(answer.reply.text, request.axes)
        return Judgement(parsed, answer.reply.text, answer.reply.model, *billed, answer.reply.latency_s)


def joined(calls: Sequence[Judgement]) -> Judgement:
    """One judgement of a checklist from the calls about its parts."""
    models = dict.fromkeys(call.model for call in calls if call.model)
    return Judgement(
        checked([call.parsed for call in calls]),
        "\n".join(call.reply for call in calls if call.reply),
        ", ".join(models),
        all(call.cached for call in calls),
        sum(call.tokens_in for call in calls),
        sum(call.tokens_out for call in calls),
        sum(call.cost_usd for call in calls),
        sum(call.latency_s for call in calls),
    )
