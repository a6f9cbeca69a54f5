"""What of a dataset the next prepare would make again, and why."""

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from loomvideo.pipelines.media.files import base_folder, media_stamp, resolve
from loomvideo.pipelines.prepare.builder import PLAN_FILE
from loomvideo.pipelines.prepare.caption_stage import CAPTION_FOLDER, caption_chunks, with_captions
from loomvideo.pipelines.prepare.chunks import chunk_rows, plan_chunks, stale_chunks
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.curate import CURATION_FOLDER, chunk_recipe_parts
from loomvideo.pipelines.prepare.inputs import Inputs, read_inputs, without_removed
from loomvideo.pipelines.prepare.job import Stamps, decided, make_plan, manifest_config, recipe_parts, stored_manifest
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import tombstones
from loomvideo.platform.shards.writer import read_record

# Which members depend on which part of the configuration, the first prefix that matches.
_MEMBERS_OF_KEY = (
    ("clips.", "target source refs mllm"),
    ("seed", "target source mllm"),
    ("decoder", "target source refs mllm"),
    ("features.", "mllm"),
    ("captions.", "mllm"),
    ("stages.", "scores"),
    ("model", "target source refs mllm"),
)


@dataclass(frozen=True)
class Stale:
    """One reason for work.

    Attributes:
        what: ``config``, ``encoders``, ``code``, ``assess``, ``caption``, ``shard`` or ``sample``.
        name: Key of the configuration, shard or sample.
        members: Members that are made again; ``moved`` when bytes are only copied.
        why: One line.
    """

    what: str
    name: str
    members: str
    why: str


def stale_parts(config: PrepareConfig) -> list[Stale]:
    """Compare the dataset in ``config.output`` with what ``config`` asks for; nothing is changed or decoded."""
    config.check()
    storage = Storage(config.output)
    inputs = without_removed(read_inputs(config), tombstones(storage))
    before = stored_manifest(storage)
    if before is None and not storage.exists(PLAN_FILE):
        return [Stale("dataset", config.output, "everything", "there is none yet")]
    found = []
    recipe = recipe_parts(inputs, config)
    if before is not None:
        found += _config_changes(before.config, manifest_config(config))
        for part, members in (("encoders", "target source refs mllm"), ("code", "target source refs mllm")):
            if before.recipe.get(part) != recipe[part]:
                found.append(Stale(part, part, members, f"{before.recipe.get(part)} -> {recipe[part]}"))
    else:
        found.append(Stale("dataset", config.output, "", "interrupted: no manifest; committed shards are kept"))
    stages, inputs = _stage_changes(storage, inputs, config)
    found += stages
    changes = _sample_changes(storage, inputs.samples, base_folder(config.input))
    if stages:
        # Who is in, and with which text, is known when the stages are done: only what changed on disk is, already.
        changes = [change for change in changes if change.why not in ("new", "no longer in the input", "text changed")]
    found += changes
    for shard in make_plan(inputs, config) if not stages else ():
        if read_record(storage, shard.name) is None:
            found.append(Stale("shard", shard.name, "everything", "not committed, or its tar is missing or damaged"))
    return found


def _stage_changes(storage: Storage, inputs: Inputs, config: PrepareConfig) -> tuple[list[Stale], Inputs]:
    """Chunks that are assessed or captioned again, and the inputs after the stages that are up to date."""
    stamps = Stamps(base_folder(config.input))
    if config.curate:
        chunks = plan_chunks(inputs.samples)
        rows = chunk_rows(chunks, {s.key: s for s in inputs.samples}, *chunk_recipe_parts(config))
        stale = stale_chunks(storage, CURATION_FOLDER, rows, stamps.same)
        if stale:
            return [Stale("assess", r["chunk"], "scores", "samples, limits or files changed") for r in stale], inputs
        inputs = decided(storage, inputs, config, chunks)
    if config.makes_texts:
        asked = caption_chunks(inputs, config)
        stale = stale_chunks(storage, CAPTION_FOLDER, asked.rows, stamps.same)
        if stale:
            return [Stale("caption", r["chunk"], "mllm", "samples, model or files changed") for r in stale], inputs
        inputs = with_captions(storage, inputs, asked.chunks, config.captions)
    return [], inputs


def _config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Stale]:
    changes = []
    for key, value in before.items():
        if key in now and now[key] != value:
            members = next((m for prefix, m in _MEMBERS_OF_KEY if key.startswith(prefix)), "moved")
            changes.append(Stale("config", key, members, f"{value!r} -> {now[key]!r}"))
    return changes


def _sample_changes(storage: Storage, samples: list[Sample], base: str) -> list[Stale]:
    if not storage.exists(PLAN_FILE):
        return []
    table = pq.read_table(io.BytesIO(storage.read_bytes(PLAN_FILE)), columns=["key", "shard", "sample"]).to_pylist()
    planned = {row["key"]: row for row in table}
    stamps: dict[str, dict[str, Any]] = {}
    for shard in sorted({row["shard"] for row in table}):
        record = read_record(storage, shard)
        stamps |= {outcome["key"]: outcome["media"] for outcome in (record.outcomes if record else ())}
    now = {sample.key: sample for sample in samples}
    found = [Stale("sample", key, "everything", "new") for key in sorted(set(now) - set(planned))]
    found += [Stale("sample", key, "removed", "no longer in the input") for key in sorted(set(planned) - set(now))]
    for key in sorted(set(now) & set(planned)):
        found += _changed(now[key], json.loads(planned[key]["sample"]), stamps.get(key), base)
    return found


def _changed(sample: Sample, before: dict[str, Any], stamps: dict[str, Any] | None, base: str) -> list[Stale]:
    members: dict[str, list[str]] = {}

    def touch(names: str, why: str) -> None:
        for name in names.split():
            members.setdefault(name, []).append(why)

    if sample.text != (before.get("instruction") or before.get("caption") or ""):
        touch("mllm", "text changed")
    if sample.task != before["task"]:
        touch("target source refs mllm", "task changed")
    roles = [("target", sample.target, "target source mllm")]
    roles += [("source", sample.source, "target source mllm")] if sample.source else []
    roles += [("references", path, "refs mllm") for path in sample.references]
    for role, path, names in roles:
        known = before.get(role)
        if path != known and path not in (known or []):
            touch(names, f"{role} is another file")
        elif stamps is not None and path in stamps and media_stamp(resolve(path, base)) != stamps[path]:
            touch(names, f"{path} changed on disk")
    if not members and json.loads(sample.to_json()) != before:
        touch("metadata", "other fields changed")
    if not members:
        return []
    reasons = sorted({why for reasons in members.values() for why in reasons})
    return [Stale("sample", sample.key, " ".join(members), "; ".join(reasons))]
