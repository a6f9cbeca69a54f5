"""Training in rounds: actors generate with the weights of now and score, then the loop trains on what they made.

The folder ``rounds/round-0003`` of a run holds everything of a round and is written when it is whole; a run that was
interrupted goes on in the middle of the round that it was in, or of its training. Actors get the weights of a round
through Ray's object store, from one process that reads them once, and end before training, which takes their devices.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import torch

from loomvideo.jobs.training.config import PreferJobConfig
from loomvideo.jobs.training.job import TrainingRun, run_training
from loomvideo.jobs.training.rollout_actors import ActorGroup, RolloutActor
from loomvideo.jobs.training.round_judge import check_judge, round_judge
from loomvideo.jobs.training.setup import tasks_of
from loomvideo.jobs.weights.export import RunCheckpoints, export_weights, open_checkpoint
from loomvideo.model.few_steps import stated_few_steps
from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.model.stored_weights import open_checkpoint as open_weights
from loomvideo.pipelines.evaluation.judges.rewards import JudgedRewards
from loomvideo.pipelines.training.rollouts import check_scales, choose_prompts
from loomvideo.pipelines.training.round_folder import (
    ROUND_FILE,
    begin_round,
    finish_round,
    is_finished,
    open_round_or_shards,
    round_name,
)
from loomvideo.platform.console import console
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.driver import train

ROUNDS_FOLDER, POLICY_FOLDER = "rounds", "policy"
DECIDES_NOTHING = {
    *(f"prefer.nft.{name}" for name in ("rounds", "steps_per_round", "beta", "drift_weight", "actors", "gpus", "cpus")),
    *(f"prefer.rewards.{name}" for name in ("server", "patience_s")),
    *(f"judge.{name}" for name in (
        "base_url", "api_key_env", "threads", "actors", "engine", "gpus", "cpus", "calls_per_minute", "timeout_s",
        "max_attempts", "budget_usd", "input_usd", "output_usd", "tokens_per_frame",
    )),
}  # fmt: skip
"""Keys that a round may go on with otherwise: of training, of where and how fast it is made, of prices."""


def run_preference(config: PreferJobConfig) -> None:
    """Run or continue one preference tuning: on the shards, or in rounds where ``prefer.method=nft``.

    Raises:
        UserError: for a mistake in configuration or data.
        KeyboardInterrupt: when interrupted, after a checkpoint.
    """
    run_training("prefer", config, "finetune-edit", train_in_rounds if config.prefer.method == "nft" else None)


def train_in_rounds(run: TrainingRun) -> dict[str, Any]:
    """Generate, score, train; as often as configured.

    Returns:
        What the last round's training gave, and the mean reward of every round's policy.
    """
    config = cast(PreferJobConfig, run.config)
    nft, result = config.prefer.nft, {}
    if run.start:
        check_scales(nft, stated_few_steps(run.start))
    made = [is_finished(run.folder.path / ROUNDS_FOLDER / round_name(number)) for number in range(nft.rounds)]
    check_judge(config, run.folder.path, tasks_of(config, run.datasets), made.count(False))
    # A damaged checkpoint neither ends a round nor gives the next one its weights.
    newest = RunCheckpoints.of(run.folder).folder.newest()
    trained = newest.step if newest else 0
    for number in range(nft.rounds):
        of_round = RoundTraining.of(config, run.folder.path, number, run.start or "")
        if not is_finished(of_round.folder):
            _export_policy(run, number, of_round.policy)
            _make_round(run, number, of_round.policy, of_round.folder)
        if trained >= of_round.last_step and number + 1 < nft.rounds:
            continue
        of_round.check_policy()
        result = train(
            of_round.config,
            run.build_recipe(policy=str(of_round.policy), num_rounds=len(of_round.urls)),
            of_round.urls,
            run.folder,
            run.tracker,
            open_dataset=partial(open_round_or_shards, reading=config.data.reading),
            last_step=of_round.last_step,
            checkpoint_tasks=run.tasks,
        )
        if result["stopped"]:
            break
    return result | {"reward_by_round": [_reward(Path(url)) for url in of_round.urls]}


@dataclasses.dataclass(frozen=True)
class RoundTraining:
    """What the training of a round is given.

    Attributes:
        folder: The round.
        policy: The weights folder of what made it.
        urls: The round, after those before.
        config: How it trains.
        last_step: The round's last.
    """

    folder: Path
    policy: Path
    urls: list[str]
    config: TrainingConfig
    last_step: int

    @classmethod
    def of(cls, config: PreferJobConfig, run: Path, number: int, start: str) -> "RoundTraining":
        """That of a run's round ``number``; ``start`` is the weights folder that the run began with."""
        folders = [run / ROUNDS_FOLDER / round_name(earlier) for earlier in range(number + 1)]
        # Earlier rounds were made by other policies: they stay in the data of the run and are not drawn any more.
        weights = {folder.name: float(folder == folders[-1]) for folder in folders}
        mixture = dataclasses.replace(config.training.mixture, datasets=weights, tasks={})
        return cls(
            folders[-1],
            folders[-1] / POLICY_FOLDER if number else Path(start),
            [str(folder) for folder in folders],
            dataclasses.replace(config.training, mixture=mixture, split="train"),
            (number + 1) * config.prefer.nft.steps_per_round,
        )

    def check_policy(self) -> None:
        """Refuse to train on results of other weights than the policy that they are held against.

        Raises:
            UserError: naming both.
        """
        made_by = json.loads((self.folder / ROUND_FILE).read_text())["policy_fingerprint"]
        if not self.policy.exists() or weights_fingerprint(self.policy) != made_by:
            raise UserError(
                f"{self.policy}: gone, or not the weights any more that made {self.folder}; put them back, or remove "
                "the round's folder, and it is made again"
            )


def _start_actor(run: TrainingRun, judge: JudgedRewards | None) -> Any:
    config = cast(PreferJobConfig, run.config)
    nft = config.prefer.nft
    remote = ray.remote(num_cpus=nft.cpus, num_gpus=nft.gpus, max_restarts=0)(RolloutActor)
    return remote.remote(config, run.model, config.data.shards, run.build_recipe(), judge)


def _weights(policy: Path, dtype: torch.dtype) -> Any:
    """A policy in the object store."""
    stored = open_weights(policy)
    return ray.put({name: tensor.to(dtype) for name, tensor in stored.tensors(list(stored.shapes))})


def _export_policy(run: TrainingRun, number: int, folder: Path) -> None:
    """Write the weights that make a round, the average at the end of the one before, unless they are there."""
    if number and not (folder / "config.json").is_file():
        config = cast(PreferJobConfig, run.config)
        checkpoint = open_checkpoint(run.folder, number * config.prefer.nft.steps_per_round)
        export_weights(run.build_recipe()(), config, run.folder, checkpoint, folder, replace=True)


def _make_round(run: TrainingRun, number: int, policy: Path, folder: Path) -> None:
    config = cast(PreferJobConfig, run.config)
    nft, training = config.prefer.nft, config.training
    prompts = choose_prompts(
        run.datasets, training.split, training.mixture, nft.prompts, training.seed, number, nft.edits
    )
    begin_round(folder, _deciding(run, policy))
    weights = _weights(policy, torch.bfloat16 if nft.gpus else torch.float32)
    failures, say = training.workers.max_failures, partial(console().print, soft_wrap=True)
    with round_judge(config, run.folder.path) as judge:
        actors = ActorGroup(partial(_start_actor, run, judge), nft.actors, failures, say)
        facts = actors.make(weights, prompts, number, folder)
    lineage = {
        "policy": str(policy),
        "policy_fingerprint": weights_fingerprint(policy),
        "config": dataclasses.asdict(config.prefer),
        "judge": dataclasses.asdict(config.judge),
    }
    watched = config.prefer.rewards.watched
    summary = finish_round(folder, number, facts, run.datasets, config.data.shards, lineage, watched)
    step = number * nft.steps_per_round
    figures = {"reward": summary["reward"], "used": summary["used"], "floored": summary["floored"]}
    figures |= {f"rewards/{name}": value for name, value in summary["rewards"].items()}
    figures |= {f"watched/{name}": value for name, value in summary["watched"].items()}
    figures["failed"] = sum(summary["failures"].values())
    run.tracker.log_metrics({f"round/{k}": float(v) for k, v in figures.items() if v is not None}, step)


def _deciding(run: TrainingRun, policy: Path) -> dict[str, Any]:
    """What decides the results of a round and their scores, by key."""
    config = cast(PreferJobConfig, run.config)
    sections: dict[str, Any] = {"prefer.nft": config.prefer.nft, "prefer.rewards": config.prefer.rewards}
    if config.judge.kind != "none":
        sections["judge"] = config.judge
    given = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in dataclasses.asdict(values).items()
        if f"{section}.{name}" not in DECIDES_NOTHING
    }
    # Shards may have moved.
    digests = [dataset.digest for dataset in run.datasets]
    training = config.training
    seeds = {"training.seed": training.seed, "training.split": training.split}
    mixture = {"training.mixture": {"tasks": training.mixture.tasks, "datasets": training.mixture.datasets}}
    return given | seeds | mixture | {"data.shards": digests, "policy_fingerprint": weights_fingerprint(policy)}


def _reward(folder: Path) -> float | None:
    return json.loads((folder / ROUND_FILE).read_text())["reward"]
