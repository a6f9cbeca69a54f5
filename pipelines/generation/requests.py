"""What is asked to be generated: one request, or a file of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.sources import fields
from loomvideo.pipelines.sources.base import Place, Rejected, Root
from loomvideo.pipelines.sources.fields import FieldError
from loomvideo.pipelines.sources.rows import Entry, rows
from loomvideo.platform.errors import UserError

IMAGE_SUFFIXES, VIDEO_SUFFIXES = (".png", ".webp"), (".mp4",)
MAX_REFERENCES = 6
MAX_PROMPT_CHARACTERS = 4000


@dataclass(frozen=True)
class Request:
    """What to generate."""

    task: str
    prompt: str
    out: str
    source: str = ""
    refs: list[str] = field(default_factory=list)
    negative_prompt: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Check everything that needs no file.

        Raises:
            UserError: naming the key and the fix.
        """
        task = requested_task(self.task)
        if not self.prompt.strip():
            raise UserError("prompt: must not be empty")
        for key, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt or "")):
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(f"{key}: {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted")
        if task.needs_source != bool(self.source):
            raise UserError(f"task={self.task}: {'set source=' if task.needs_source else 'takes no source'}")
        if task.needs_references != bool(self.refs):
            raise UserError(f"task={self.task}: {'set refs=[…]' if not self.refs else 'takes no refs'}")
        if len(self.refs) > MAX_REFERENCES:
            raise UserError(f"refs: {len(self.refs)} references, at most {MAX_REFERENCES} are accepted")
        if Path(self.out).suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise UserError(f"out={self.out}: name a {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)} file")


def _request(values: dict[str, Any]) -> Request:
    unknown = sorted(set(values) - set(Request.__dataclass_fields__))
    if unknown:
        raise FieldError(unknown[0], f"unknown field; fields are {', '.join(Request.__dataclass_fields__)}")
    seed = values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise FieldError("seed", f"expected a whole number, found {seed!r}")
    texts = {key: fields.text(values.get(key), key) or "" for key in ("task", "prompt", "negative_prompt")}
    places = {key: fields.path(values.get(key), key) or "" for key in ("out", "source")}
    return Request(**texts, **places, refs=fields.paths(values.get("refs"), "refs"), seed=seed)


def _located(request: Request, folder: Path) -> Request:
    return replace(
        request,
        out=str(folder / request.out),
        source=str(folder / request.source) if request.source else "",
        refs=[str(folder / ref) for ref in request.refs],
    )


def read_requests(path: Path, refused: list[str] | None = None) -> Iterator[Request]:
    """Requests of a JSONL file, one object a line; paths are relative to the file.

    Args:
        path: The file.
        refused: Takes what is wrong with a line, naming file, line and field, and the others are read; without it the
            first such line is an error.

    Raises:
        UserError: if there is no such file, or for the first line that is no request.
    """
    if not path.is_file():
        raise UserError(f"batch={path}: no such file")
    seen: set[str] = set()
    folder, name = path.absolute().parent, path.name
    for entry in rows(Place(Root(str(folder)), name), name, ""):
        where = entry.where if isinstance(entry, Rejected) else entry[0]
        try:
            yield _checked_request(entry, path.parent, seen)
        except UserError as error:
            message = f"{path}:{where.rpartition(':')[2]}: {error}"
            if refused is None:
                raise UserError(message) from error
            refused.append(message)


def _checked_request(entry: Entry, folder: Path, seen: set[str]) -> Request:
    if isinstance(entry, Rejected):
        raise UserError(entry.detail)
    request = _located(_request(entry[1]), folder)
    request.check()
    if request.out in seen:
        raise UserError(f"out={request.out} is named twice")
    seen.add(request.out)
    return request
