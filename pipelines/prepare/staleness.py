"""What of a dataset the next prepare would make again, and why."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs, read_inputs
from loomvideo.pipelines.prepare.job import stored_manifest
from loomvideo.pipelines.prepare.recipe import changed_values, encode_parts, manifest_config
from loomvideo.pipelines.prepare.stages import ENCODE, Stage, stages_of
from loomvideo.pipelines.prepare.units import committed_files, kept_plan
from loomvideo.pipelines.sources.samples import stored_sample
from loomvideo.platform.shards.commits import read_all
from loomvideo.platform.shards.storage import Storage

# Which members depend on which part of the configuration, the first prefix that matches.
_MEMBERS_OF_KEY = (
    ("clips.", "target source refs mllm"),
    ("seed", "target source mllm"),
    ("decoder", "target source refs mllm"),
    ("features.", "mllm"),
    ("encoders.packed", "mllm"),
    ("encoders.", "target source refs"),
    ("captions.", "mllm"),
    ("judge.", "scores"),
    ("stages.", "scores"),
    ("model", "target source refs mllm"),
)


# Of samples, before the stages that decide them are done.
KNOWN_LATER = ("new", "no longer in the input", "text changed")


@dataclass(frozen=True)
class Stale:
    """One reason for work.

    Attributes:
        what: ``config``, ``encoders``, ``code``, ``assess``, ``caption``, ``shard`` or ``sample``.
        name: Key of the configuration, shard or sample.
        members: Members that are made again.
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
    planned = kept_plan(storage, ENCODE.name, ["key", "unit", "sample", "media"])
    found = dataset_changes(storage, config, planned is not None)
    if found and found[0].members == "everything":
        return found
    inputs = read_inputs(config, storage)
    known_units = None if planned is None else set(pc.unique(planned["unit"]).to_pylist())
    for stage in stages_of(config):
        plan = stage.plan(storage, inputs, config)
        if stage is ENCODE:
            found += _sample_changes(planned, inputs)
            found += [
                missing_shard(plan.units[number].name)
                for number in plan.stale
                if not plan.committed.get(plan.units[number].name)
                and (known_units is None or plan.units[number].name in known_units)
            ]
        elif plan.stale:
            names = [plan.units[number].name for number in plan.stale]
            found += [stale_unit(stage, name) for name in names]
            # Who is in, and with which text, is known when the stage is done: only what changed on disk is, already.
            known = _sample_changes(planned, inputs)
            return found + [change for change in known if change.why not in KNOWN_LATER]
        else:
            inputs = stage.after(read_all(storage, stage.folder, committed_files(storage, plan)), inputs, config)
    return found


def dataset_changes(storage: Storage, config: PrepareConfig, has_plan: bool) -> list[Stale]:
    """What of the whole dataset is stale, whatever its samples are."""
    before = stored_manifest(storage)
    if before is None and not has_plan:
        return [Stale("dataset", config.output, "everything", "there is none yet")]
    if before is None:
        return [Stale("dataset", config.output, "", "interrupted: no manifest; committed shards are kept")]
    found = _config_changes(before.config, manifest_config(config))
    now = encode_parts(config)
    for part in ("encoders", "code"):
        if before.recipe.get(part) != now[part]:
            found.append(Stale(part, part, "target source refs mllm", f"{before.recipe.get(part)} -> {now[part]}"))
    return found


def stale_unit(stage: Stage, name: str) -> Stale:
    """A unit of a stage before encoding that is done again."""
    return Stale(stage.name, name, stage.redone, "samples, options or files changed")


def missing_shard(name: str) -> Stale:
    """A planned shard that is not there."""
    return Stale("shard", name, "everything", "not committed, or its tar is gone or damaged")


def _config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Stale]:
    changes = []
    for key, (value, other) in changed_values(before, now).items():
        # Samples that lie in shards stay there, however new ones would be dealt.
        if not key.startswith("shards."):
            members = next((m for prefix, m in _MEMBERS_OF_KEY if key.startswith(prefix)), "metadata")
            changes.append(Stale("config", key, members, f"{value!r} -> {other!r}"))
    return changes


def _sample_changes(planned: pa.Table | None, inputs: Inputs) -> list[Stale]:
    if planned is None:
        return []
    columns = ["key", "sample", "media"]
    now = inputs.table.select(columns)
    gone = planned.filter(pc.invert(pc.is_in(planned["key"], now["key"])))["key"].to_pylist()
    place = pc.index_in(now["key"], planned["key"])
    found = [
        Stale("sample", key, "everything", "new") for key in sorted(now.filter(pc.is_null(place))["key"].to_pylist())
    ]
    found += [Stale("sample", key, "removed", "no longer in the input") for key in sorted(gone)]
    both = now.filter(pc.is_valid(place))
    before = planned.take(pc.drop_null(place))
    other = pc.or_(pc.not_equal(both["sample"], before["sample"]), pc.not_equal(both["media"], before["media"]))
    pairs = zip(both.filter(other).to_pylist(), before.filter(other).to_pylist(), strict=True)
    for row, earlier in sorted(pairs, key=lambda pair: pair[0]["key"]):
        found += changed_sample(row, earlier)
    return found


def changed_sample(row: dict[str, Any], earlier: dict[str, Any]) -> list[Stale]:
    """What a sample's change means for its members.

    Args:
        row: The sample's row as the input has it now, with what is known of its files.
        earlier: The same as planned.
    """
    sample, before = stored_sample(row["sample"]), json.loads(earlier["sample"])
    now, stamps = (json.loads(text or "{}") for text in (row["media"], earlier["media"]))
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
        elif now.get(path) != stamps.get(path):
            touch(names, f"{path} changed on disk")
    if not members:
        touch("metadata", "other fields changed")
    reasons = sorted({why for reasons in members.values() for why in reasons})
    return [Stale("sample", sample.key, " ".join(members), "; ".join(reasons))]
