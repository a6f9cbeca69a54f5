"""The judge of preference rounds: one for all actors that generate, so that pace, budget and answers are one."""

import contextlib
import zlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from loomvideo.jobs.evaluation.config import JudgeConfig
from loomvideo.jobs.evaluation.judge import (
    SPENDING_FILE,
    allow_spending,
    judge_client,
    judge_prices,
    judge_session,
    preflight,
)
from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.model.tasks import wording
from loomvideo.pipelines.evaluation.judges.rewards import JUDGE, JudgedRewards, groups_of
from loomvideo.pipelines.evaluation.judges.rubrics import CHECKLISTS_FILE, OwnChecklists, own_checklists
from loomvideo.pipelines.evaluation.judges.session import Judgement
from loomvideo.pipelines.evaluation.suites.parsers import PARSERS
from loomvideo.pipelines.evaluation.suites.registry import CHECKLIST
from loomvideo.pipelines.vlm.clients import VLMClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest
from loomvideo.platform.errors import UserError

ANSWERS_FOLDER = "judge-answers"
LOCAL = "transformers"


class JudgeActor:
    """A judge with its cache, budget and pace, asked by all actors of a round.

    Args:
        config: Who judges.
        client: The model.
        folder: The run's: its answers and what was paid are kept there.
    """

    def __init__(self, config: JudgeConfig, client: VLMClient, folder: Path):
        spending = None if config.kind == LOCAL else folder / SPENDING_FILE
        session = judge_session(config, client, folder / ANSWERS_FOLDER, spending)
        self.session = replace(session, parser=PARSERS[CHECKLIST.parser])

    def ready(self) -> None:
        """Answers when the actor has its place."""

    def judge(self, request: VLMRequest) -> Judgement:
        """The judgement of a request; failures are part of it."""
        return self.session.judge(request)


class RemoteJudge:
    """Asks the judges of a round; what is shown decides which one.

    Args:
        handles: Their actors.
    """

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def __call__(self, request: VLMRequest) -> Judgement:
        """The judgement of a request.

        Raises:
            UserError: when the judge was lost more often than Ray was asked to start it again.
        """
        shown = "".join(medium.digest for medium in request.media)
        handle = self.handles[zlib.crc32(shown.encode()) % len(self.handles)]
        try:
            return ray.get(handle.judge.remote(request))
        except RayActorError as error:
            raise UserError(
                f"judge: its process ended and is not started again: {str(error).splitlines()[0]}"
            ) from error


@contextlib.contextmanager
def round_judge(config: PreferJobConfig, folder: Path) -> Iterator[JudgedRewards | None]:
    """The judge of a round, which ends with it as the actors that generate do; None where no reward is a judge's.

    A lost one is started again, up to ``training.workers.max_failures`` times, and what it was asked is asked again.
    """
    j, workers = config.judge, config.training.workers
    if j.kind == "none":
        yield None
        return
    client, count = judge_client(j), 1
    options: dict[str, Any]
    if j.kind == LOCAL:
        count, options = j.actors, {"num_cpus": j.cpus, "num_gpus": j.gpus}
    else:
        # Where the trial call was made: its address and key may mean nothing elsewhere.
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        options = {"num_cpus": 0, "label_selector": here}
    remote = ray.remote(
        max_restarts=workers.max_failures, max_task_retries=-1, max_concurrency=j.threads, **options
    )(JudgeActor)  # fmt: skip
    handles = [remote.remote(j, client, folder) for _ in range(count)]
    sampling = FrameSampling(j.num_frames, j.max_side, as_video=j.as_video)
    asking = JudgedRewards(
        RemoteJudge(handles), sampling, _checklists(j), j.repeats, j.threads, config.prefer.rewards.patience_s
    )
    try:
        # Before the actors that generate, which could take its place and then wait for it.
        ray.get([handle.ready.remote() for handle in handles])
        yield asking
    finally:
        for handle in handles:
            ray.kill(handle)


def check_judge(config: PreferJobConfig, folder: Path, tasks: Collection[str], rounds: int) -> None:
    """Check questions, key, prices and budget, ask before spending, and try one call.

    Args:
        config: The run's.
        folder: The run's.
        tasks: Those that the run trains.
        rounds: How many are still to be made.

    Raises:
        UserError: for anything that would stop the judge later.
    """
    j, nft = config.judge, config.prefer.nft
    if j.kind == "none" or not rounds:
        return
    checklists, longest = _checklists(j), 0
    for task in sorted(name for name in tasks if wording(name).needs_source):
        if task not in checklists.checklists:
            raise UserError(f"judge.checklists={j.checklists}: has none for {task}, which the run trains")
        names = checklists.checklists[task]
        longest = max(longest, sum(len(checklists.questions[name]) for name in names))
        missing = config.rewarder().judged - {JUDGE, *groups_of(names)}
        if missing:
            raise UserError(f"judge.checklists={j.checklists}: that of {task} has no question for {min(missing)}")
    calls = rounds * nft.prompts * nft.repeats * j.repeats
    frames = calls * (2 * j.num_frames + 1)
    allow_spending(j, judge_prices(j), calls, calls * longest, frames, "prefer.nft.prompts")
    preflight(j, folder / ANSWERS_FOLDER, folder / SPENDING_FILE, CHECKLIST.parser)


def _checklists(j: JudgeConfig) -> OwnChecklists:
    return own_checklists(Path(j.checklists) if j.checklists else CHECKLISTS_FILE)
