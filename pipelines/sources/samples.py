"""The project's sample format: one JSON object a line, one line a sample."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sources.fields import KEY_PATTERN, FieldError, clean_fields
from loomvideo.platform.errors import UserError, full_disk_named


@dataclass(frozen=True)
class Sample:
    """One training or evaluation sample before any decoding.

    Media paths are relative to the folder of the file that lists the sample, absolute, or fsspec URLs.
    """

    key: str
    task: str
    dataset: str
    target: str
    source: str | None = None
    references: list[str] = field(default_factory=list)
    instruction: str | None = None
    caption: str | None = None
    licence: str = "unknown"
    group: str = ""
    split: Literal["train", "heldout"] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    """Other wordings of the text, of any length; training draws one of all at every visit."""

    @property
    def text(self) -> str:
        """The prompt: the instruction of an edit, else the caption."""
        return self.instruction or self.caption or ""

    def validate(self, where: str) -> None:
        """Check the fields against each other.

        Raises:
            UserError: naming ``where``, the key and the fix.
        """
        if not KEY_PATTERN.fullmatch(self.key):
            raise UserError(f"{where}: key {self.key!r} must match {KEY_PATTERN.pattern}")
        if self.task not in TASKS:
            raise UserError(f"{where}: task {self.task!r} is none of {', '.join(TASKS)}")
        if TASKS[self.task].needs_source and not self.source:
            raise UserError(f"{where}: task {self.task} needs `source`")
        if TASKS[self.task].needs_references and not self.references:
            raise UserError(f"{where}: task {self.task} needs `references`")
        if self.text == "":
            raise UserError(f"{where}: set `instruction` or `caption`")
        if self.texts and (len({self.text, *self.texts}) != 1 + len(self.texts) or not all(self.texts)):
            raise UserError(f"{where}: `texts` lists other wordings of the text: none empty, none twice")

    def assigned_split(self, heldout_fraction: float) -> str:
        """The split: the given one, else decided by a hash of ``group`` so that no group is in two splits."""
        if self.split is not None:
            return self.split
        digest = hashlib.sha256((self.group or self.key).encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction else "train"

    def to_json(self) -> str:
        """One JSONL line without fields at their defaults."""
        return _encode({k: v for k, v in vars(self).items() if v})


# json.dumps makes an encoder at every call that is not for its defaults.
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
_FIELDS = frozenset(f.name for f in dataclasses.fields(Sample))


def parse_sample(line: str, where: str) -> Sample:
    """Parse and check one JSONL line.

    Raises:
        UserError: naming ``where`` (file and line number), the field and the fix.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object")
    try:
        sample = Sample(**sample_fields(values))
    except FieldError as error:
        raise UserError(f"{where}: {error}") from error
    sample.validate(where)
    return sample


def sample_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample from those of a row, each of its type; how they fit together is not looked at.

    Raises:
        FieldError: naming the field and the fix, with a reason code.
    """
    if not values.keys() <= _FIELDS:
        unknown = sorted(set(values) - _FIELDS)
        problem = f"unknown field; put it under `extra` (fields: {', '.join(sorted(_FIELDS))})"
        raise FieldError(repr(unknown[0]), problem, "invalid_sample")
    cleaned = clean_fields(values)
    missing = [name for name in ("key", "task", "dataset", "target") if not cleaned.get(name)]
    if missing:
        raise FieldError(repr(missing[0]), "missing field", "invalid_sample")
    return cleaned


def stored_sample(text: str) -> Sample:
    """A sample from :meth:`Sample.to_json`, which may still lack its text."""
    return Sample(**json.loads(text))


def media_paths(sample: Sample) -> list[str]:
    """Media paths of a sample as it names them."""
    return [path for path in (sample.target, sample.source, *sample.references) if path]


def read_jsonl(path: Path) -> Iterator[Sample]:
    """Samples of a JSONL file, in order, blank lines skipped."""
    if not path.is_file():
        raise UserError(f"{path}: no such sample file")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_sample(line, f"{path}:{number}")


def write_jsonl(samples: Iterable[Sample], path: Path) -> None:
    """Write samples to a JSONL file, through a temporary name."""
    partial = path.with_name(path.name + ".tmp")
    with full_disk_named(path, partial):
        with partial.open("w", encoding="utf-8") as out:
            out.writelines(sample.to_json() + "\n" for sample in samples)
        partial.replace(path)
