"""The accounts of a prepare job: every input sample's fate, the ledger of losses, and when losses are too many."""

from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs
from loomvideo.pipelines.prepare.outcomes import Outcome
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.manifest import QUARANTINE_FILE
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import StoredRecord, write_table

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "dataset", "outcome", "stage", "reason")]
    + [("retriable", pa.bool_())]
    + [(name, pa.string()) for name in ("message", "where", "sample")]
)


class Accounts:
    """Adds up what came of the inputs.

    Attributes:
        counts: ``{dataset: {inputs, written, filtered, duplicates, quarantined}}``.
        losses: The losses of all stages.
    """

    def __init__(self, inputs: Inputs):
        self.counts: dict[str, dict[str, int]] = {}
        self.losses: list[Outcome] = []
        for entry in pc.value_counts(inputs.table.column("dataset")):
            self._count(entry["values"].as_py())["inputs"] = entry["counts"].as_py()
        for loss in inputs.losses:
            self._count(loss.dataset)["inputs"] += 1
            self._lose(loss)

    @property
    def num_inputs(self) -> int:
        """Input samples of all datasets."""
        return sum(count["inputs"] for count in self.counts.values())

    def add(self, record: StoredRecord) -> None:
        """Count what a shard holds and what of its plan it does not."""
        for dataset, count in record.counts().items():
            self._count(dataset)["written"] += count
        for loss in record.facts["losses"]:
            self._lose(Outcome(**loss))

    def _lose(self, loss: Outcome) -> None:
        count = self._count(loss.dataset)
        count[loss.outcome] = count.get(loss.outcome, 0) + 1
        self.losses.append(loss)

    def _count(self, dataset: str) -> dict[str, int]:
        empty = {"inputs": 0, "written": 0, "filtered": 0, "duplicates": 0, "quarantined": 0}
        return self.counts.setdefault(dataset, empty)


def write_quarantine(
    storage: Storage, losses: Sequence[Outcome], planned: Callable[[set[str]], dict[str, str]]
) -> None:
    """Write the ledger: a row a sample that was not written, with the sample where it is known.

    Args:
        storage: The dataset folder.
        losses: The losses.
        planned: The samples, as JSON, that a plan has of some keys.
    """
    bare = {loss.key for loss in losses if loss.sample is None}
    known = planned(bare) if bare else {}
    columns = {
        name: [getattr(loss, name) for loss in losses] for name in QUARANTINE_SCHEMA.names if name != "sample"
    } | {"sample": [loss.sample or known.get(loss.key) for loss in losses]}
    write_table(storage, QUARANTINE_FILE, pa.table(columns, schema=QUARANTINE_SCHEMA))


def check_losses(accounts: Accounts, config: PrepareConfig) -> None:
    """Fail when one reason quarantines more than ``limits.max_loss`` of the inputs.

    Raises:
        UserError: naming the reason, its count and the first case.
    """
    by_reason = Counter(loss.reason for loss in accounts.losses if loss.outcome == "quarantined")
    for reason, count in by_reason.most_common():
        if count > config.limits.max_loss * accounts.num_inputs:
            example = next(loss.message for loss in accounts.losses if loss.reason == reason)
            raise UserError(
                f"{count} of {accounts.num_inputs} samples were lost to {reason} "
                f"(limits.max_loss={config.limits.max_loss:g}); "
                f"first: {example.strip().splitlines()[-1][:200]}; all are in {config.output}/{QUARANTINE_FILE}"
            )
