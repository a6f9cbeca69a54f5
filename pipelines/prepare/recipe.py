"""What a dataset's content depends on, part by part, so that a stale one can say why."""

import json
from typing import Any

from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.prepare.caption_stage import caption_recipe
from loomvideo.pipelines.prepare.config import EncoderOptions, PrepareConfig
from loomvideo.pipelines.prepare.curate import assess_recipe
from loomvideo.pipelines.prepare.encode import encoder_identity
from loomvideo.pipelines.prepare.geometry import PIXELS_VERSION
from loomvideo.pipelines.prepare.judge_stage import judge_recipe
from loomvideo.pipelines.prepare.load import TENSORS_VERSION
from loomvideo.platform.config import flatten
from loomvideo.platform.shards.manifest import Manifest
from loomvideo.platform.shards.plan import digest

# What changes where or how fast the work is done, not what is written.
NOT_IN_MANIFEST = (
    "input", "output", "run", "workers.", "limits.", "codec_folder", "mllm_folder", "features.max_error",
    "caption_workers.", "curation_workers.", "captions.base_url", "captions.api_key_env", "captions.cache",
    "captions.concurrency", "captions.per_minute", "captions.max_attempts", "captions.timeout_s",
    "judge_workers.", "judge.base_url", "judge.api_key_env", "judge.cache", "judge.concurrency", "judge.per_minute",
    "judge.max_attempts", "judge.timeout_s", "judge.input_usd", "judge.output_usd", "judge.budget_usd",
)  # fmt: skip
# Texts are part of the samples and assessments are kept beside them: what made them is no part of a shard's recipe.
# How samples are dealt is none either: they stay where they were dealt first. Other last bits make nothing stale.
_NOT_IN_RECIPE = (*NOT_IN_MANIFEST, "captions.", "judge.", "stages.", "curate", "shards.", "features.batch")


# Of keys that came later: a dataset that does not state them was made with these.
_LATER: dict[str, Any] = {f"encoders.{key}": value for key, value in vars(EncoderOptions()).items()}


def encode_parts(config: PrepareConfig) -> dict[str, str]:
    """What every shard depends on besides its samples."""
    values = {k: v for k, v in _stated(config).items() if not k.startswith(_NOT_IN_RECIPE)}
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    return {
        "config": digest(json.dumps(values, sort_keys=True)),
        "encoders": encoder_identity(model, config.workers.gpus > 0),
        "code": digest(PIXELS_VERSION, TENSORS_VERSION),
    }


def encode_recipe(config: PrepareConfig) -> tuple[str, ...]:
    """The same for a stage's recipe."""
    return tuple(encode_parts(config).values())


def recipe_parts(input_digest: str, config: PrepareConfig) -> dict[str, str]:
    """What the whole dataset depends on."""
    parts = {"input": input_digest, **encode_parts(config)}
    if config.curate:
        parts["stages"] = digest(*assess_recipe(config))
    if config.makes_texts:
        parts["captions"] = caption_recipe(config)
    if config.judge.backend != "off":
        parts["judge"] = digest(judge_recipe(config), json.dumps(config.judge.min_scores, sort_keys=True))
    return parts


def manifest_config(config: PrepareConfig) -> dict[str, Any]:
    """The configuration that a dataset's content depends on; stages that are off left out."""
    on = {"stages.": config.curate, "captions.": config.makes_texts, "judge.": config.judge.backend != "off"}
    off = [prefix for prefix, is_on in on.items() if not is_on]
    return {k: v for k, v in _stated(config).items() if not k.startswith((*NOT_IN_MANIFEST, *off))}


def _stated(config: PrepareConfig) -> dict[str, Any]:
    """The configuration without later keys at their defaults, so that datasets of before stay what they are."""
    return {k: v for k, v in flatten(config).items() if k not in _LATER or v != _LATER[k]}


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that differ between two :func:`manifest_config`, with both values; of keys that only one has, later ones."""
    earlier, later = _LATER | before, _LATER | now
    return {key: (value, later[key]) for key, value in earlier.items() if key in later and later[key] != value}


def why_stale(before: Manifest | None, recipe: dict[str, str], num_units: int, config: PrepareConfig) -> str:
    """One line for a person: what makes a dataset stale."""
    if before is None:
        return "built"
    changed = sorted(part for part in {*recipe, *before.recipe} if before.recipe.get(part) != recipe.get(part))
    if not changed:
        return f"rebuilt {num_units} shards: media files changed or a shard was damaged"
    parts = [part for part in changed if part not in ("config", "stages", "captions", "judge")]
    if parts != changed:
        values = changed_values(before.config, manifest_config(config))
        different = [f"{key} {was!r} -> {now!r}" for key, (was, now) in values.items()]
        parts.append("config (" + ", ".join(different or ["stages on or off, or new keys"]) + ")")
    return "rebuilt: changed " + ", ".join(parts)
