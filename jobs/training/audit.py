"""Repeating steps of a run as it trained them: on its shards, or on the round that a step belongs to."""

import tempfile
from functools import partial
from pathlib import Path

from loomvideo.jobs.training.config import PreferJobConfig, TrainingJobConfig
from loomvideo.jobs.training.rounds import RoundTraining
from loomvideo.jobs.training.setup import START_FILE, recipe_factory
from loomvideo.jobs.weights.references import RunReference
from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.training.feature_pool import feature_pool
from loomvideo.pipelines.training.round_folder import open_round_or_shards
from loomvideo.platform.ray_session import ray_session
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.audit import AuditRow, audit_resume, checkpoint_to_audit
from loomvideo.platform.training.driver import open_shards


def repeat_steps(reference: RunReference, config: TrainingJobConfig, steps: int) -> list[AuditRow]:
    """Repeat steps after a checkpoint of a run.

    Args:
        reference: The run and the checkpoint, or the newest that has enough steps after it.
        config: The run's configuration; another number of workers is allowed.
        steps: How many.

    Raises:
        UserError: if there is no such checkpoint, or the steps were not recorded or are not of one round.
    """
    run, training = reference.run.path, config.training
    start = (reference.run.read_json(START_FILE) or {}).get("weights") or ""
    step, urls, open_dataset = reference.step or 0, config.data.shards, open_shards
    policy, num_rounds = "", 0
    if isinstance(config, PreferJobConfig) and config.prefer.method == "nft":
        in_round = config.prefer.nft.steps_per_round
        step = checkpoint_to_audit(run, training, step, steps, in_round)
        of_round = RoundTraining.of(config, run, step // in_round, start)
        training, urls, open_dataset = of_round.config, of_round.urls, open_round_or_shards
        policy, num_rounds = str(of_round.policy), len(urls)
    datasets = [ShardDataset.open(url) for url in config.data.shards]
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    num_cpus = max(2, training.workers.num * training.workers.cpus)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ray_session(num_cpus=num_cpus + config.features.actors * config.features.cpus),
        feature_pool(config.features, model, datasets) as features,
    ):
        factory = recipe_factory(config, datasets, start or None, config.kernels, features, policy, num_rounds)
        opening = partial(open_dataset, reading=config.data.reading)
        return audit_resume(run, training, factory, urls, Path(scratch), step, steps, opening)
