"""The input of a prepare job: its samples, and the lines that are none."""

import dataclasses
import json
from typing import Any

from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.fields import without_spaces
from loomvideo.pipelines.sources.samples import Sample, media_paths
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.plan import digest_lines
from loomvideo.platform.shards.takedown import identities


@dataclasses.dataclass
class Inputs:
    """The samples to prepare and the lines that are none.

    Attributes:
        samples: In input order, keys unique.
        rejected: Outcomes ``{key, dataset, outcome, stage, reason, message}`` of what is left out.
        judged: What curation found of the samples, by key.
    """

    samples: list[Sample]
    rejected: list[dict[str, Any]]
    judged: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names the input, whatever order its lines have."""
        lines = [sample.to_json() for sample in self.samples] + [json.dumps(r, sort_keys=True) for r in self.rejected]
        return digest_lines(sorted(lines))

    def judged_json(self, key: str) -> str:
        """What curation found of a sample."""
        return json.dumps(self.judged.get(key, {}), sort_keys=True)


def read_inputs(config: PrepareConfig) -> Inputs:
    """Read the input; what is no sample, and repeated keys, are set aside with their reason.

    Samples that lack nothing but their text are taken when the caption stage can give them one.

    Raises:
        UserError: if there is no such input or it holds no sample.
    """
    base = base_folder(config.input) + "/"
    samples: dict[str, Sample] = {}
    rejected = []
    for found in open_source(config.input, config.format, **config.source_options):
        unfinished = isinstance(found, Rejected) and config.makes_texts and found.unfinished is not None
        item = found.unfinished if unfinished else found
        if isinstance(item, Rejected):
            where = item.where.removeprefix(base)
            message = f"{where}: {item.detail}"
            rejected.append(_rejected(where, item.dataset or "unknown", "quarantined", item.reason, message))
            continue
        # Paths as they stand in the input: equal input makes equal shards wherever it lies.
        sample = dataclasses.replace(
            item,
            target=item.target.removeprefix(base),
            source=item.source and item.source.removeprefix(base),
            references=[path.removeprefix(base) for path in item.references],
        )
        if sample.key in samples:
            same = _squeezed(samples[sample.key]) == _squeezed(sample)
            outcome = ("duplicates", "repeated_line") if same else ("quarantined", "repeated_key")
            rejected.append(_rejected(sample.key, sample.dataset, *outcome, f"key {sample.key} again"))
            continue
        samples[sample.key] = sample
    if not samples:
        first = f"; first: {rejected[0]['message']}" if rejected else ""
        raise UserError(f"input={config.input}: no valid sample in it{first}")
    return Inputs(list(samples.values()), rejected)


def _squeezed(sample: Sample) -> dict[str, Any]:
    """The fields of a sample, texts without the spaces that a copy may have more."""
    return {name: without_spaces(value) for name, value in vars(sample).items()}


def without_removed(inputs: Inputs, ids: set[str]) -> Inputs:
    """The inputs without samples that were asked to be removed."""
    if not ids:
        return inputs
    kept, rejected = [], list(inputs.rejected)
    for sample in inputs.samples:
        if ids & identities(sample.key, sample.group, media_paths(sample), sample.extra):
            rejected.append(_rejected(sample.key, sample.dataset, "removed", "tombstone", "removed by request"))
        else:
            kept.append(sample)
    return Inputs(kept, rejected)


def _rejected(key: str, dataset: str, outcome: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "key": key,
        "dataset": dataset,
        "outcome": outcome,
        "stage": "read",
        "reason": reason,
        "message": message,
    }
