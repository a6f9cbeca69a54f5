"""Values of distillations and preference tunings that types cannot check."""

import pytest

from loomvideo.jobs.command import job_config
from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig
from loomvideo.platform.errors import UserError

SHARDS = "data.shards=[shards]"
ROUNDS = [SHARDS, "prefer.method=nft", "training.steps=120"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.critic.schedule=cosin", r"^distill.critic.schedule=cosin: use one of constant, cosine$"),
        ("distill.critic.name=adamw8", r"^distill.critic.name=adamw8: use one of adamw, adamw8bit$"),
        ("training.optimizer.schedule=cosin", r"^training.optimizer.schedule=cosin: use one of constant, cosine$"),
        ("training.optimizer.name=adamw8", r"^training.optimizer.name=adamw8: use one of adamw, adamw8bit$"),
        ("distill.critic.trainable=['*']", r"^distill.critic.trainable: with lora.rank set.*leave it empty"),
    ],
)
def test_the_critics_optimiser_is_checked_as_the_students_is(override, message):
    arguments = [SHARDS, "lora.rank=4"]
    job_config(DistillJobConfig, "distill", arguments).check()
    with pytest.raises(UserError, match=message):
        job_config(DistillJobConfig, "distill", [*arguments, override]).check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prefer.rewards.watched=[sharpness, outside_psnr_db]"],
            r"^prefer.rewards.watched: outside_psnr_db is what prefer.rewards.weights.outside is made of.*"
            r"leave it out: prefer.rewards.watched=\[sharpness\]$",
        ),
        (["prefer.rewards.weights.sharpness=1"], r"weights.sharpness is made of.*watched=\[edge_f1\]$"),
        (["prefer.rewards.weights.edge_f1=-0.5"], r"edge_f1 is what prefer.rewards.weights.edge_f1 is made of"),
        (["prefer.rewards.floors={sharpness: 1.0}"], r"sharpness is what prefer.rewards.floors.sharpness is made of"),
        (
            ["prefer.rewards.weights.clip_text=1", "prefer.rewards.watched=[clip_text]"],
            r"clip_text is what prefer.rewards.weights.clip_text is made of.*prefer.rewards.watched=\[\]$",
        ),
    ],
)
def test_what_is_rewarded_cannot_be_watched(overrides, message):
    with pytest.raises(UserError, match=message):
        job_config(PreferJobConfig, "prefer", [*ROUNDS, *overrides]).check()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prefer.rewards.weights.outside=0", "prefer.rewards.watched=[outside_psnr_db]"],
        ["prefer.rewards.weights={locality: 1.0, fidelity: 1.0, clip_text: 1.0}"],
    ],
)
def test_what_is_not_rewarded_may_be_watched(overrides):
    config = job_config(PreferJobConfig, "prefer", [*ROUNDS, *overrides])
    config.check()
    assert config.rewarder().measured >= set(config.prefer.rewards.watched)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.mixture.tasks.video_edit=2", r"^training.mixture.tasks.video_edit=2.0: rounds ask all edits alike"),
        ("training.mixture.datasets.own=0.5", r"^training.mixture.datasets.own=0.5: rounds ask all edits alike"),
        ("prefer.nft.cpus=0", r"^prefer.nft.cpus=0: must be at least 1$"),
        ("prefer.nft.gpus=-1", r"^prefer.nft.gpus=-1.0: must be at least 0$"),
    ],
)
def test_what_rounds_cannot_do_is_refused(override, message):
    job_config(PreferJobConfig, "prefer", [*ROUNDS, "training.mixture.tasks.video_edit=0"]).check()
    with pytest.raises(UserError, match=message):
        job_config(PreferJobConfig, "prefer", [*ROUNDS, override]).check()
