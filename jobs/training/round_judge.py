"""The judge of preference rounds: one for all actors that generate, so that pace, budget and answers are one."""

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from loomvideo.jobs.evaluation.judge import SPENDING_FILE, allow_spending, judge_client, judge_session, preflight
from loomvideo.jobs.training.config import PreferJobConfig, RoundJudgeConfig
from loomvideo.pipelines.evaluation.judges.rewards import JudgedRewards
from loomvideo.pipelines.evaluation.judges.rubrics import CHECKLISTS_FILE, OwnChecklists, own_checklists
from loomvideo.pipelines.evaluation.judges.session import Judgement
from loomvideo.pipelines.evaluation.suites.parsers import PARSERS
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST
from loomvideo.pipelines.vlm.clients import VLMClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest

ANSWERS_FOLDER = "judge-answers"


class JudgeActor:
    """A judge with its cache, budget and pace, asked by all actors of a round.

    Args:
        config: Who judges.
        client: The model.
        folder: The run's: its answers and what was paid are kept there.
    """

    def __init__(self, config: RoundJudgeConfig, client: VLMClient, folder: Path):
        session = judge_session(config, client, folder / ANSWERS_FOLDER, folder / SPENDING_FILE)
        self.session = replace(session, parser=PARSERS[CHECKLIST.parser])

    def judge(self, request: VLMRequest) -> Judgement:
        """The judgement of a request; failures are part of it."""
        return self.session.judge(request)


class RemoteJudge:
    """Asks the judges of a round; the same question goes to the same one.

    Args:
        handles: Their actors.
    """

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def __call__(self, request: VLMRequest) -> Judgement:
        """The judgement of a request."""
        shown = "".join(medium.digest for medium in request.media)
        return ray.get(self.handles[zlib.crc32(shown.encode()) % len(self.handles)].judge.remote(request))


@contextlib.contextmanager
def round_judge(config: PreferJobConfig, folder: Path) -> Iterator[JudgedRewards | None]:
    """The judge of a round, which ends with it as the actors that generate do; None where no reward is a judge's."""
    j = config.judge
    if j.kind == "none":
        yield None
        return
    local = j.kind == "transformers"
    remote = ray.remote(
        num_cpus=j.cpus if local else 0,
        num_gpus=j.gpus if local else 0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=j.threads,
    )(JudgeActor)
    client = judge_client(j)
    handles = [remote.remote(j, client, folder) for _ in range(j.actors if local else 1)]
    sampling = FrameSampling(j.num_frames, j.max_side, as_video=j.as_video)
    try:
        yield JudgedRewards(RemoteJudge(handles), sampling, _checklists(j), j.repeats, j.threads)
    finally:
        for handle in handles:
            ray.kill(handle)


def check_judge(config: PreferJobConfig, folder: Path) -> None:
    """Check questions, key, prices and budget, ask before spending, and try one call.

    Raises:
        UserError: for anything that would stop the judge later.
    """
    j, nft = config.judge, config.prefer.nft
    if j.kind == "none":
        return
    checklists = _checklists(j)
    judge_client(j)
    calls = nft.rounds * nft.prompts * nft.repeats * j.repeats
    longest = max(sum(len(checklists.questions[name]) for name in names) for names in checklists.checklists.values())
    allow_spending(j, calls, calls * longest, calls * 2 * j.num_frames, "prefer.nft.prompts")
    preflight(j, folder / ANSWERS_FOLDER, folder / SPENDING_FILE)


def _checklists(j: RoundJudgeConfig) -> OwnChecklists:
    return own_checklists(Path(j.checklists) if j.checklists else CHECKLISTS_FILE)
