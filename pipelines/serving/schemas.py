"""What the interface takes and answers, as its OpenAPI document says it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loomvideo.model.tasks import EDIT, TASKS
from loomvideo.pipelines.serving.requests import RequestLimits


class JobBody(BaseModel):
    """A request as the page sends it; ``source`` and ``references`` are ids of uploads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # The document says what is accepted; the refusals' own words come from checks that know the limits.
    task: str = Field(json_schema_extra={"enum": [EDIT, *TASKS]})
    prompt: str = Field(json_schema_extra={"minLength": 1})
    negative_prompt: str | None = None
    source: str | None = None
    references: list[str] = []
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = None
    guidance_scale: float | None = Field(None, ge=0, le=100)
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    whole: bool = False
    """Edit a video to its end, and not its first frames alone."""
    deadline_s: float | None = Field(None, gt=0, le=86_400)
    """Seconds from now after which the result is of no use."""


class UploadState(BaseModel):
    """A file that was accepted."""

    id: str
    kind: Literal["image", "video"]
    width: int
    height: int
    frames: int
    fps: float


class JobState(BaseModel):
    """A generation on its way; times are seconds since the epoch."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int
    step: int
    steps: int
    error: str
    task: str
    prompt: str
    seed: int
    created_s: float
    started_s: float | None
    finished_s: float | None
    source: UploadState | None
    references: list[UploadState]
    media_type: str | None


class Health(BaseModel):
    """Whether requests are served."""

    status: Literal["ok", "no generator", "stopping"]
    generators: int | None
    waiting: int
    running: int


class Refusal(BaseModel):
    """Why a request was refused, in one line."""

    error: str


def job_schema(limits: RequestLimits) -> dict[str, Any]:
    """The document of :class:`JobBody` with what this server accepts."""
    schema = JobBody.model_json_schema()
    numbers = {"steps": limits.max_steps, "num_frames": limits.max_frames, "width": limits.max_side,
               "height": limits.max_side}  # fmt: skip
    for name, most in numbers.items():
        schema["properties"][name]["anyOf"][0] |= {"minimum": 1, "maximum": most}
    schema["properties"]["prompt"]["maxLength"] = limits.max_prompt_characters
    schema["properties"]["references"]["maxItems"] = limits.max_references
    return schema


def files(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """An answer that is a file, for a path's ``responses``."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": "The file", "content": dict.fromkeys(media_types, binary)}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a path, for its ``responses``."""
    return {status: {"model": Refusal} for status in (401, 403, 415, 421, 422, *statuses)}


def raw_body(*media_types: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The body of a path that reads it itself, for its ``openapi_extra``."""
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name in media_types}}}
