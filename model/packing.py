"""Packing samples of any size into one sequence of patches.

Tokens of a sample lie together: its video tokens, then its references'. Everything the layers need to know about the
layout (positions, modulation rows, segment boundaries) is computed here, once a pack and on the host.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loomvideo.model.attention import AttentionPlan

REFERENCE_STEP = 10
"""Reference ``j`` (from 0) sits at temporal position ``-REFERENCE_STEP * (j + 1)``."""


@dataclass
class DiTSample:
    """One sample as the transformer sees it."""

    latents: Tensor
    """Noised latents z_t [channels, frames, height, width]."""
    timestep: float
    """0 (clean) to 1000 (noise)."""
    mllm_states: Tensor
    """Hidden states of the DiT-aligned MLLM layers [layers, tokens, mllm dim]."""
    source: Tensor | None = None
    """Latents to edit, of the shape of ``latents``; None counts as zeros."""
    source_scale: float = 0.0
    """Scale-and-Add's t, 0 to 1; used without a source too, because the source embedding has a bias."""
    references: Sequence[Tensor] = field(default_factory=tuple)
    """Clean reference latents [channels, 1, height, width], each of its own size."""


@dataclass
class PackedBatch:
    """Samples packed into one sequence; made by :func:`pack`."""

    patches: Tensor
    """[tokens, patch dim], noised video and clean reference patches."""
    source_patches: Tensor
    """[tokens, patch dim], zero where there is no source."""
    source_scale: Tensor
    """fp32 [samples]."""
    timesteps: Tensor
    """fp32 [samples]."""
    positions: Tensor
    """int32 [tokens, 3], (t, h, w) in patches."""
    row_ids: Tensor
    """int32 [tokens]: the sample's index, or the number of samples for reference tokens."""
    video_index: Tensor | None
    """int64 [video tokens]: where they lie in the sequence; None without references."""
    video_row_ids: Tensor
    """int32 [video tokens]."""
    mllm_states: Tensor
    """[layers, MLLM tokens, mllm dim]."""
    self_plan: AttentionPlan
    cross_plan: AttentionPlan
    grids: list[tuple[int, int, int]]
    """Patches of each sample's video along (t, h, w)."""
    patch_size: tuple[int, int, int]

    @property
    def num_samples(self) -> int:
        """Samples in the pack."""
        return len(self.grids)

    @property
    def num_tokens(self) -> int:
        """Video and reference tokens."""
        return len(self.row_ids)

    @property
    def num_video_tokens(self) -> int:
        """Tokens that get a velocity."""
        return len(self.video_row_ids)

    @property
    def num_loss_elements(self) -> int:
        """Elements of the latents, over which the loss is averaged."""
        return self.num_video_tokens * self.patches.shape[1]

    @property
    def num_mllm_tokens(self) -> int:
        """Tokens of conditioning."""
        return self.mllm_states.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PackedBatch":
        """Move to a device and cast what the layers compute in; scales and timesteps stay fp32."""
        device = self.patches.device if device is None else device
        changes = {name: getattr(self, name).to(device, non_blocking=True) for name in _INDEX_FIELDS}
        changes |= {name: getattr(self, name).to(device, dtype, non_blocking=True) for name in _VALUE_FIELDS}
        if self.video_index is not None:
            changes["video_index"] = self.video_index.to(device, non_blocking=True)
        return dataclasses.replace(
            self, **changes, self_plan=self.self_plan.to(device), cross_plan=self.cross_plan.to(device)
        )

    def pin_memory(self) -> "PackedBatch":
        """Copy into page-locked memory."""
        changes = {name: getattr(self, name).pin_memory() for name in (*_INDEX_FIELDS, *_VALUE_FIELDS)}
        if self.video_index is not None:
            changes["video_index"] = self.video_index.pin_memory()
        return dataclasses.replace(
            self, **changes, self_plan=self.self_plan.pin_memory(), cross_plan=self.cross_plan.pin_memory()
        )

    def pack_targets(self, targets: Sequence[Tensor]) -> Tensor:
        """Lay out [channels, frames, height, width] tensors like the model's output [video tokens, patch dim]."""
        return torch.cat([velocity_patches(target, self.patch_size) for target in targets])

    def unpack(self, velocity: Tensor) -> list[Tensor]:
        """Split the model's output [video tokens, patch dim] into [channels, frames, height, width] tensors."""
        lengths = [t * h * w for t, h, w in self.grids]
        parts = zip(velocity.split(lengths), self.grids, strict=True)
        return [_from_velocity_patches(part, grid, self.patch_size) for part, grid in parts]

    def sum_per_sample(self, values: Tensor) -> Tensor:
        """Sum values [video tokens, ...] over each sample's tokens and trailing axes: fp32 [samples]."""
        per_token = values.float().flatten(1).sum(1)
        return per_token.new_zeros(self.num_samples).index_add(0, self.video_row_ids, per_token)


_INDEX_FIELDS = ("source_scale", "timesteps", "positions", "row_ids", "video_row_ids")
_VALUE_FIELDS = ("patches", "source_patches", "mllm_states")


def pack(samples: Sequence[DiTSample], patch_size: tuple[int, int, int] = (1, 2, 2)) -> PackedBatch:
    """Pack samples into one sequence, on the device of their latents.

    Raises:
        ValueError: if a sample's tensors do not fit each other.
    """
    for index, sample in enumerate(samples):
        _check(sample, index, patch_size)
    num_samples = len(samples)
    patches, source_patches, positions, row_ids, lengths, grids = [], [], [], [], [], []
    for index, sample in enumerate(samples):
        images = [sample.latents, *sample.references]
        patches += [to_patches(image, patch_size) for image in images]
        grids.append(_grid(sample.latents, patch_size))
        positions.append(_positions(grids[-1]))
        for number, reference in enumerate(sample.references, start=1):
            positions.append(_positions(_grid(reference, patch_size), first_frame=-REFERENCE_STEP * number))
        num_video, num_tokens = len(patches[-len(images)]), sum(len(part) for part in patches[-len(images) :])
        lengths.append(num_tokens)
        row_ids.append(torch.full((num_video,), index, dtype=torch.int32))
        row_ids.append(torch.full((num_tokens - num_video,), num_samples, dtype=torch.int32))
        num_zeros = num_tokens
        if sample.source is not None:
            source_patches.append(to_patches(sample.source.to(sample.latents.dtype), patch_size))
            num_zeros -= num_video
        source_patches.append(patches[-1].new_zeros(num_zeros, patches[-1].shape[1]))

    device = samples[0].latents.device
    rows = torch.cat(row_ids)
    has_references = any(sample.references for sample in samples)
    video_index = torch.nonzero(rows < num_samples).squeeze(1) if has_references else None
    mllm_lengths = [sample.mllm_states.shape[1] for sample in samples]
    return PackedBatch(
        patches=torch.cat(patches),
        source_patches=torch.cat(source_patches),
        source_scale=torch.tensor([sample.source_scale for sample in samples], dtype=torch.float32),
        timesteps=torch.tensor([sample.timestep for sample in samples], dtype=torch.float32),
        positions=torch.cat(positions),
        row_ids=rows,
        video_index=video_index,
        video_row_ids=rows if video_index is None else rows[video_index],
        mllm_states=torch.cat([sample.mllm_states for sample in samples], dim=1),
        self_plan=AttentionPlan.build(lengths),
        cross_plan=AttentionPlan.build(lengths, mllm_lengths),
        grids=grids,
        patch_size=tuple(patch_size),
    ).to(device)


def to_patches(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut [channels, frames, height, width] into patches [tokens, channels * patch], in an embedding's order."""
    (t, h, w), (pt, ph, pw) = _grid(latents, patch_size), patch_size
    return latents.reshape(-1, t, pt, h, ph, w, pw).permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1)


def velocity_patches(velocity: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut [channels, frames, height, width] into patches [tokens, patch * channels], the output head's order."""
    (t, h, w), (pt, ph, pw) = _grid(velocity, patch_size), patch_size
    return velocity.reshape(-1, t, pt, h, ph, w, pw).permute(1, 3, 5, 2, 4, 6, 0).reshape(t * h * w, -1)


def _from_velocity_patches(patches: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    (t, h, w), (pt, ph, pw) = grid, patch_size
    return patches.reshape(t, h, w, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, t * pt, h * ph, w * pw)


def _grid(latents: Tensor, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = (size // patch for size, patch in zip(latents.shape[1:], patch_size, strict=True))
    return frames, height, width


def _positions(grid: tuple[int, int, int], first_frame: int = 0) -> Tensor:
    axes = [torch.arange(size, dtype=torch.int32) for size in grid]
    return torch.cartesian_prod(axes[0] + first_frame, *axes[1:]).reshape(-1, 3)


def _check(sample: DiTSample, index: int, patch_size: tuple[int, int, int]) -> None:
    channels = sample.latents.shape[0]
    for name, latents in [("latents", sample.latents)] + [("reference", image) for image in sample.references]:
        if latents.ndim != 4 or latents.shape[0] != channels:
            raise ValueError(f"sample {index}: {name} {list(latents.shape)} is not [{channels}, frames, height, width]")
        if any(size % patch for size, patch in zip(latents.shape[1:], patch_size, strict=True)):
            raise ValueError(f"sample {index}: {name} {list(latents.shape)} does not divide into patches {patch_size}")
    if any(image.shape[1] != 1 for image in sample.references):
        raise ValueError(f"sample {index}: a reference is one latent frame")
    if sample.source is not None and sample.source.shape != sample.latents.shape:
        raise ValueError(
            f"sample {index}: source {list(sample.source.shape)} and latents {list(sample.latents.shape)} differ"
        )
    if sample.mllm_states.ndim != 3 or not sample.mllm_states.shape[1]:
        raise ValueError(
            f"sample {index}: mllm_states {list(sample.mllm_states.shape)} is not [layers, tokens >= 1, dim]"
        )
