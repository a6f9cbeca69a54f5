"""Commits: a result's file name says what it vouches for, so one listing tells what of a whole plan is done.

``{unit}.{recipe}.{size}.{kind}``: the unit of work, the digest of all that its result depends on, and the size of the
tar that it vouches for (0 where the result is the file itself). A unit has one commit; of two, which only a kill
between writing and deleting leaves, each is whole, and the one whose recipe is asked for counts.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loomvideo.platform.shards.storage import Storage

_NAME = re.compile(r"(?P<unit>[^.]+)\.(?P<recipe>[0-9a-z]*)\.(?P<num_bytes>\d+)\.(?P<kind>\w+)")


@dataclass(frozen=True)
class Commit:
    """The name of a committed result.

    Attributes:
        unit: The unit of work.
        recipe: Digest of what the result depends on.
        num_bytes: Size of the tar it vouches for.
        kind: File suffix.
    """

    unit: str
    recipe: str
    num_bytes: int = 0
    kind: str = "parquet"

    @property
    def file(self) -> str:
        """The file name."""
        return f"{self.unit}.{self.recipe}.{self.num_bytes}.{self.kind}"


def commits(storage: Storage, folder: str) -> dict[str, list[Commit]]:
    """Committed results in a folder, by unit; one listing."""
    found: dict[str, list[Commit]] = {}
    for name in storage.names(folder):
        match = _NAME.fullmatch(name)
        if match:
            commit = Commit(match["unit"], match["recipe"], int(match["num_bytes"]), match["kind"])
            found.setdefault(commit.unit, []).append(commit)
    return found


def read_all(storage: Storage, folder: str, files: Iterable[str]) -> Iterator[bytes]:
    """The contents of many small files of a folder, in order, some dozens at a time."""
    return storage.read_many([f"{folder}/{file}" for file in files])
