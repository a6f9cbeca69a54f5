"""One encoded sample and how it lies in a tar."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loomvideo.platform.shards import tensors as safetensors
from loomvideo.platform.shards.tar import TarWriter

if TYPE_CHECKING:
    from torch import Tensor

KEY_PATTERN = re.compile(r"[0-9a-zA-Z_-]{1,80}")
MEMBERS = ("target", "source", "refs", "mllm")
METADATA = "json"
TEXTS_SCORE = "texts"
"""Score that says how many wordings of its text a sample has; absent for one."""


@dataclass
class ShardSample:
    """Metadata and tensors of one sample.

    Attributes:
        key: Unique in the dataset, ``[0-9a-zA-Z_-]``, at most 80 characters.
        metadata: JSON values. The index takes from it `task, dataset, bucket [width, height], num_frames, fps,
            num_windows, dit_tokens, mllm_tokens, group, licence, fingerprints {member: hash}, scores {name: number}`.
            ``deterministic: true`` says that posterior deviations are zero and not stored.
        tensors: ``{member: {name: tensor}}``. Members ``target`` and ``source`` hold ``mean.{w}`` and ``std.{w}``
            [C, f, h, w] for window w; ``refs`` holds ``mean.{j}``, ``std.{j}`` [C, 1, h, w]; ``mllm`` holds
            ``full.{i}``, ``visual.{i}`` [layers, tokens, dim] (stored features; ``visual`` is absent when the sample
            shows the MLLM no media, the dataset's null applies then) or the MLLM's inputs (streamed). Window w uses
            entry i = ``metadata["mllm_index"][w]``. Of a sample with several wordings (``metadata["texts"]``, the
            first one its text), wording j of it is entry i + j ``metadata["text_stride"]``.
    """

    key: str
    metadata: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def validate(self) -> None:
        """Check key and member names.

        Raises:
            ValueError: naming the sample and the field.
        """
        if not KEY_PATTERN.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r} must match {KEY_PATTERN.pattern}")
        unknown = sorted(set(self.tensors) - set(MEMBERS))
        if unknown:
            raise ValueError(f"{self.key}: unknown member {unknown[0]!r}, members are {', '.join(MEMBERS)}")
        if self.metadata.get("key", self.key) != self.key:
            raise ValueError(f"{self.key}: metadata carries another key, {self.metadata['key']!r}")


@dataclass(frozen=True)
class MemberPlace:
    """Where a member's content lies in its tar."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class SamplePlace:
    """Where a sample lies in its tar: from its first header to the end of its last padding."""

    offset: int
    num_bytes: int
    members: tuple[MemberPlace, ...]


def member_file_name(key: str, member: str) -> str:
    """The tar name of a member: the first dot ends the key, as webdataset has it."""
    return f"{key}.{METADATA}" if member == METADATA else f"{key}.{member}.safetensors"


def append_sample(tar: TarWriter, sample: ShardSample) -> SamplePlace:
    """Write a sample's members, adjacent and sorted by name.

    Raises:
        ValueError: if the sample is not well formed.
    """
    sample.validate()
    start, members = tar.num_bytes, []
    text = json.dumps({**sample.metadata, "key": sample.key}, sort_keys=True, ensure_ascii=False).encode()
    for member in sorted([METADATA, *(name for name, tensors in sample.tensors.items() if tensors)]):
        chunks, size = ([text], len(text)) if member == METADATA else safetensors.serialized(sample.tensors[member])
        offset = tar.add(member_file_name(sample.key, member), chunks, size)
        members.append(MemberPlace(member, offset, size))
    return SamplePlace(start, tar.num_bytes - start, tuple(members))
