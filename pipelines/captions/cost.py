"""What texts will cost, before the first question is asked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions.options import CaptionOptions
from loomvideo.pipelines.captions.requests import TASK_WORDS
from loomvideo.pipelines.captions.schema import answer_schema
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.pipelines.vlm.session import Prices
from loomvideo.platform.errors import UserError

# Characters of JSON: a sentence is what most answers are, each garment's attributes come on top.
_ANSWER_CHARACTERS = {"caption": 300, "fashion": 900, "instruction": 200, "verify": 250}
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class CaptionCost:
    """An estimate of all questions; cached answers cost less.

    Attributes:
        questions: Those asked, second questions included.
        tokens_in: Input tokens.
        tokens_out: Output tokens.
        usd: US dollars, at the prices of the options.
        hours: The least that ``per_minute`` allows; 0 without a limit.
    """

    questions: int
    tokens_in: int
    tokens_out: int
    usd: float
    hours: float

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.questions:,} questions", f"about {self.tokens_in / 1e6:,.2f} M tokens in",
                 f"{self.tokens_out / 1e6:,.2f} M out"]  # fmt: skip
        if self.usd:
            parts.append(f"{self.usd:,.2f} USD")
        if self.hours:
            parts.append(f"{self.hours:,.1f} h at captions.per_minute")
        return ", ".join(parts)


def caption_cost(samples: Iterable[Sample], options: CaptionOptions) -> CaptionCost:
    """Estimate what the texts of samples cost.

    Args:
        samples: Those whose text would be asked for; what is kept as it is costs nothing.
        options: How they are asked for.
    """
    prices = Prices(options.input_usd, options.output_usd)
    modes = (options.mode, "verify") if options.verify else (options.mode,)
    words = {mode: len(TASK_WORDS[mode]) + len(json.dumps(answer_schema(mode, "0" * 8))) for mode in modes}
    others = {mode: 0 if mode == "verify" else options.wordings * _ANSWER_CHARACTERS["caption"] for mode in modes}
    questions = tokens_in = tokens_out = 0
    for sample in samples:
        has_text = sample.instruction if options.mode == "instruction" else sample.caption
        if options.backend == "existing" or (has_text and not options.overwrite):
            continue
        frames = 1 if TASKS[sample.task].is_image else options.num_frames
        frames = frames * (2 if options.mode == "instruction" else 1) + len(sample.references)
        for mode in modes:
            questions += 1
            tokens_in += words[mode] // _CHARACTERS_A_TOKEN + frames * prices.tokens_per_frame
            tokens_out += (_ANSWER_CHARACTERS[mode] + others[mode]) // _CHARACTERS_A_TOKEN
    hours = questions / options.per_minute / 60 if options.per_minute else 0.0
    return CaptionCost(questions, tokens_in, tokens_out, prices.cost_usd(tokens_in, tokens_out), hours)


def check_budget(cost: CaptionCost, options: CaptionOptions, section: str = "captions") -> None:
    """Refuse what would pass ``budget_usd`` of a section of the configuration.

    Raises:
        UserError: with the estimate.
    """
    if options.budget_usd and cost.usd > options.budget_usd:
        raise UserError(
            f"{section}.budget_usd={options.budget_usd:g}: {cost} are estimated; raise it, or ask for fewer samples, "
            f"fewer frames ({section}.num_frames) or a cheaper model"
        )
