"""Published scores, as labelled reference rows beside measured ones."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Published:
    """A score as published, with where it stands and when it is not comparable."""

    suite: str
    metric: str
    model: str
    value: float
    source: str
    caveat: str

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


@lru_cache
def published_scores(suite: str) -> tuple[Published, ...]:
    """The published rows of a suite."""
    rows = [Published(**row) for row in yaml.safe_load(FILE.read_text(encoding="utf-8"))]
    return tuple(row for row in rows if row.suite == suite)
