"""The judge of an evaluation: what it may cost, a call before anything is spent, and the stage inside its actor."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import typer

from loomvideo.jobs.evaluation.config import EvaluateConfig, JudgeConfig, SuiteJudgeConfig
from loomvideo.jobs.evaluation.setup import store_folder
from loomvideo.pipelines.evaluation.gate import sample_size_line
from loomvideo.pipelines.evaluation.judge_stage import Asked, JudgeStage
from loomvideo.pipelines.evaluation.judges.fake import PixelJudge
from loomvideo.pipelines.evaluation.judges.rubrics import (
    CHECKLISTS_FILE,
    OWN_FILE,
    official_rubrics,
    own_checklists,
    own_rubrics,
)
from loomvideo.pipelines.evaluation.judges.session import JudgeSession
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest
from loomvideo.pipelines.evaluation.suites.registry import Suite
from loomvideo.pipelines.vlm.batch_session import BatchBook, BatchedSession
from loomvideo.pipelines.vlm.batches import batch_provider
from loomvideo.pipelines.vlm.clients import GeminiClient, OpenAIClient, VLMClient, api_key
from loomvideo.pipelines.vlm.local import QwenVLClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, encode_media, labelled
from loomvideo.pipelines.vlm.session import AnswerCache, Budget, Pace, Prices, Session
from loomvideo.pipelines.vlm.vllm_engine import VLLMClient, is_installed
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute

SPENDING_FILE, BATCHES_FOLDER = "judge-spending.jsonl", "judge-batches"
BuildJudge = Callable[[Path | None], JudgeStage]


def judge_builder(config: EvaluateConfig, suites: list[Suite], manifests: list[SuiteManifest]) -> BuildJudge | None:
    """What makes the judge stage inside its actor, given the run's record of spending; None without a judge.

    Checks rubrics, key, prices and budget, and asks before spending.

    Raises:
        UserError: for anything that would stop the judge later.
    """
    j = config.judge
    if j.kind == "none" or not any(suite.judged for suite in suites):
        return None
    # The stage is built in an actor, which may stand in another folder.
    config = dataclasses.replace(config, store=str(store_folder(config)))
    rubrics = own_rubrics(Path(j.rubrics) if j.rubrics else OWN_FILE)
    checklists = own_checklists(Path(j.checklists) if j.checklists else CHECKLISTS_FILE)
    official = {name: official_rubrics(Path(path)) for name, path in j.official_rubrics.items()}
    client = judge_client(j)
    sampling = FrameSampling(j.num_frames, j.max_side, as_video=j.as_video)
    items = [item for suite, m in zip(suites, manifests, strict=True) if suite.judged for item in m.items]
    for suite, manifest in zip(suites, manifests, strict=True):
        if suite.judged:
            units = {item.unit for item in manifest.items}
            print(sample_size_line(manifest.suite, len(units)), file=sys.stderr)

    def build(spending: Path | None = None) -> JudgeStage:
        return JudgeStage(
            Store(store_folder(config)), _session(config, client, spending), sampling, rubrics,
            official, j.mode, j.repeats, j.threads, j.judge_identity, checklists, j.temperature,
        )  # fmt: skip

    stage = build()
    planned = [(item, stage.questions(item)) for item in items]
    for name, line in sorted({(item.suite, line) for item, asked in planned for line in deviations(config, asked)}):
        print(f"{name}: not as {j.mode}: {line}", file=sys.stderr)
    check_spending(config, planned)
    return build


def deviations(config: EvaluateConfig, asked: Sequence[Asked]) -> list[str]:
    """What the configuration does otherwise than a benchmark's own code, one line each."""
    j, found = config.judge, []
    for transport in dict.fromkeys(question.transport for question in asked):
        if transport is not None:
            found += transport.deviations(j.kind, j.model, j.temperature, j.repeats)
    if j.mode == "loomvideo" and config.generation.prompts != "published" and config.generator == "model":
        found.append(f"generation.prompts={config.generation.prompts}, its evaluation words references as published")
    return list(dict.fromkeys(found))


def check_spending(config: EvaluateConfig, planned: list[tuple[EvalItem, list[Asked]]]) -> None:
    """Refuse a budget that could not bind or is too small, and ask a person before anything is spent.

    Raises:
        UserError: naming the key and the fix.
    """
    j = config.judge
    calls = sum(len(asked) for _, asked in planned) * j.repeats
    # Whole films are taken to be looked at once a second; a source may be longer than what is made of it.
    seconds = max(1, round(config.inputs.num_frames / config.inputs.fps))
    frames = 0
    for item, asked in planned:
        for question in asked:
            film = j.num_frames if question.transport is None else seconds
            frames += film * (1 + bool(item.source)) + len(item.references)
    words = sum(len(question.text) for _, asked in planned for question in asked)
    allow_spending(j, judge_prices(j, _share(j)), calls, words * j.repeats, frames * j.repeats, "limit")


def allow_spending(j: JudgeConfig, prices: Prices, calls: int, characters: int, frames: int, less: str) -> None:
    """Refuse a budget that could not bind or is too small, and ask a person before anything is spent.

    Args:
        j: The judge.
        prices: What it costs.
        calls: How many are expected.
        characters: The length of all questions together.
        frames: The pictures of all calls together.
        less: The key that asks fewer questions, for the message.

    Raises:
        UserError: naming the key and the fix.
    """
    if j.budget_usd > 0 and j.kind in ("openai", "gemini") and not (j.input_usd or j.output_usd):
        raise UserError(
            f"judge.budget_usd={j.budget_usd:g}: without prices it never binds; set judge.input_usd and "
            f"judge.output_usd to the price of a million tokens, or judge.budget_usd=0 for a server that costs nothing"
        )
    expected = prices.cost_usd(characters // 4 + j.tokens_per_frame * frames, prices.output_tokens * calls)
    if 0 < j.budget_usd < expected:
        raise UserError(
            f"judge.budget_usd={j.budget_usd:g}: {calls} calls are expected to cost {expected:.2f} USD; "
            f"raise the budget, or lower {less}, judge.repeats or judge.num_frames"
        )
    if not expected:
        return
    print(f"judge: at most {calls} calls, about {expected:.2f} USD", file=sys.stderr)
    if j.budget_usd == 0:
        if not sys.stdin.isatty():
            raise UserError(f"judge.budget_usd: about {expected:.2f} USD would be spent; allow it with a budget")
        typer.confirm("Spend it?", abort=True, err=True)


def answers_folder(config: EvaluateConfig) -> Path:
    """Where a judge's answers are kept by content."""
    return store_folder(config) / "answers"


def preflight(j: JudgeConfig, answers: Path, spending: Path, mode: str) -> None:
    """Ask the judge about a grey picture, so that a wrong key, model or form shows before hours of generation.

    The answer is kept like any other: a run that continues does not pay for it again.

    Args:
        j: The judge.
        answers: Where answers are kept.
        spending: The run's record of what it has paid.
        mode: The form of answers that is tried: ``strict`` and ``checklist`` ask by schema, others by words.

    Raises:
        UserError: with what the server said.
    """
    if j.kind not in ("openai", "gemini"):
        return
    # A plain call at the full price, where others go by batch too.
    session = judge_session(j, judge_client(j), answers, spending).session
    grey = np.full((2 if j.as_video else 1, 64, 64, 3), 127, np.uint8)
    media = encode_media("Picture", grey, FrameSampling(len(grey), 64, as_video=j.as_video))
    form, choices = ("is it grey, yes or no?", ("yes", "no")) if mode == "checklist" else (
        "how grey is it, from 1 to 5?", (1, 2, 3, 4, 5)
    )  # fmt: skip
    text = f"Look at this picture: {form} Say in a few words what you see (reasoning), then the answer, as JSON."
    by_schema = mode in ("strict", "checklist")
    answer = session.ask(VLMRequest(labelled(text, [media]), ("grey",), structured=by_schema, choices=choices))
    if answer.reply is None:
        raise UserError(f"judge.kind={j.kind} judge.model={j.model}: the trial call failed: {answer.detail}")


def judge_prices(j: JudgeConfig, share: float = 1.0) -> Prices:
    """The configured prices; ``share`` of those of tokens."""
    most = max(j.max_tokens, GeminiClient("").max_tokens) if j.kind == "gemini" else j.max_tokens
    return Prices(j.input_usd * share, j.output_usd * share, j.tokens_per_frame, max_output_tokens=most)


def judge_session(
    j: JudgeConfig, client: VLMClient, answers: Path, spending: Path | None = None, share: float = 1.0
) -> JudgeSession:
    """A judge with the configured cache, prices, budget and pace.

    Args:
        j: The judge.
        client: The model.
        answers: Where answers are kept by content.
        spending: The run's record of what it has paid; None keeps none.
        share: The share of the configured prices that is paid.
    """
    budget, pace = Budget(j.budget_usd, spending), Pace(j.calls_per_minute)
    return JudgeSession(Session(client, AnswerCache(answers), judge_prices(j, share), budget, pace, j.max_attempts))


def _session(config: EvaluateConfig, client: VLMClient, spending: Path | None) -> JudgeSession:
    """The judge of suites; with ``judge.batch`` what is under way lies beside the record of spending."""
    j = config.judge
    plain = judge_session(j, client, answers_folder(config), spending, _share(j))
    if not j.batch or spending is None:
        return plain
    s = plain.session
    book = BatchBook(
        batch_provider(client), spending.with_name(BATCHES_FOLDER), s.cache, s.prices, s.budget, j.max_attempts,
        j.batch_poll_s, time.sleep, lambda line: print(f"judge: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    return JudgeSession(BatchedSession(client, s.cache, s.prices, s.budget, s.pace, j.max_attempts, book=book))


def _share(j: SuiteJudgeConfig) -> float:
    return j.batch_price if j.batch else 1.0


def judge_client(j: JudgeConfig) -> VLMClient:
    """The configured judge.

    Raises:
        UserError: if its key is not in the environment.
    """
    temperature = j.sampling_temperature()
    if j.kind == "fake":
        return PixelJudge()
    if j.kind == "transformers":
        # Decided here, not in the actors: the engine is part of what answers are kept under.
        if j.engine == "vllm" or (j.engine == "auto" and j.gpus >= 1 and is_installed()):
            return VLLMClient(absolute(j.model), j.max_tokens, "judge.model", temperature, j.threads, gpus=j.gpus)
        # Ray shows all GPUs of a node to who asked for none.
        device = "" if j.gpus else "cpu"
        return QwenVLClient(
            absolute(j.model), j.max_tokens, "judge.model", temperature=temperature, batch=j.threads, device=device
        )
    if j.kind == "openai":
        client = OpenAIClient(
            j.base_url, j.model, j.api_key_env or "OPENAI_API_KEY", temperature, j.max_tokens, j.timeout_s, j.structured
        )
    else:
        base = j.base_url or GeminiClient("").base_url
        most = judge_prices(j).max_output_tokens
        client = GeminiClient(j.model, base, j.api_key_env or "GEMINI_API_KEY", temperature, most, j.timeout_s)
    api_key(client.api_key_env, client.base_url)
    return client
