"""Wan's video autoencoder: the weights of diffusers' ``AutoencoderKLWan``, run within a memory bound.

Time is cut into chunks that pass the causal convolutions' caches on, which changes nothing; space is cut into
overlapping tiles whose results are blended, which changes little, and only when a whole frame would not fit. What fits
is computed beforehand by a dry run on the meta device.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from loomvideo.model.codec.live_bytes import PeakLiveBytes
from loomvideo.model.codec.protocol import AS_WRITTEN, CodecExecution, LatentMoments, check_video_shape
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.platform.errors import UserError

Part = Literal["encoder", "decoder"]
DEFAULT_MEMORY_LIMIT_BYTES = 12 * 2**30
# Latent frames a chunk, tried in this order; longer chunks launch fewer kernels.
CHUNKS = (4, 2, 1)
# Latent cells that neighbouring tiles share, over which they are blended.
OVERLAP = 4
MIN_TILE = 2 * OVERLAP
# A shape takes four: of the first frame, the chunk after it, those after that, and the last. Beyond it is an error.
_MOST_PROGRAMS = 1024

WAN_22_SIZES: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}  # fmt: skip
"""The published VAE's configuration but for the statistics of its latents: for measuring without its weights."""


class TilePlan(NamedTuple):
    """How a video is cut: latent frames a chunk, and latent cells a tile."""

    chunk: int
    tile_height: int
    tile_width: int


class WanVAE:
    """Wan2.2's (or 2.1's) VAE with normalised latents.

    Args:
        model: The autoencoder, on its device and in its dtype; its configuration holds the latents' means and stds.
        fingerprint: The fingerprint of its weights.
        memory_limit_bytes: Bound on live activations and caches, without the workspaces of convolution kernels, the
            weights, the input and the output.
        execution: How it encodes; the decoder runs as it is.
    """

    def __init__(
        self,
        model: AutoencoderKLWan,
        fingerprint: str,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        execution: CodecExecution = AS_WRITTEN,
    ):
        config = model.config
        if len(config.latents_mean) != config.z_dim or len(config.latents_std) != config.z_dim:
            raise UserError(
                f"VAE config.json: latents_mean and latents_std must have z_dim={config.z_dim} values each, "
                f"not {len(config.latents_mean)} and {len(config.latents_std)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.memory_limit_bytes = memory_limit_bytes
        self.latent_channels = config.z_dim
        self.spatial_stride = config.scale_factor_spatial
        self.temporal_stride = config.scale_factor_temporal
        self._mean = torch.tensor(config.latents_mean, device=model.device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std, device=model.device).view(1, -1, 1, 1, 1)
        self._bytes_per_cell = cache(self._dry_run)
        if execution.channels_last:
            _lay_channels_last(model.encoder)
            _lay_channels_last(model.quant_conv)
        self._encoder = _compiled(model.encoder) if execution.compiled else model.encoder

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        execution: CodecExecution = AS_WRITTEN,
    ) -> "WanVAE":
        """Load a ``vae/`` folder of diffusers, or the model folder around it.

        Raises:
            UserError: if the folder holds no such VAE, or weights are missing, unexpected or misshapen.
        """
        folder = Path(folder)
        if folder.name != "vae" and (folder / "vae" / "config.json").is_file():
            folder = folder / "vae"
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise UserError(f"{config_file}: not found; give the vae folder of Wan2.2-TI2V-5B-Diffusers")
        name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
        if name != "AutoencoderKLWan":
            raise UserError(f"{config_file}: _class_name {name!r}; give a folder with an AutoencoderKLWan")
        try:
            model, report = AutoencoderKLWan.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
        for problem in ("missing", "unexpected"):
            if report[f"{problem}_keys"]:
                keys = sorted(report[f"{problem}_keys"])
                raise UserError(f"{folder}: {len(keys)} {problem} weights, first {keys[0]}")
        return cls(model.to(device), folder_fingerprint(folder), memory_limit_bytes, execution)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> LatentMoments:
        """Video ``[batch, 3, 4k+1, height, width]`` in [-1, 1] to fp32 moments ``[batch, channels, k+1, h, w]``.

        As many of the batch as the memory limit allows are encoded together.
        """
        check_video_shape(video, self.temporal_stride, self.spatial_stride)
        frames = 1 + (video.shape[2] - 1) // self.temporal_stride
        height, width = (side // self.spatial_stride for side in video.shape[3:])
        plan = self.plan("encoder", frames, height, width)
        moments = torch.empty(len(video), 2 * self.latent_channels, frames, height, width, device=self.model.device)
        together = self._together(plan, height, width)
        for some, out in zip(video.split(together), moments.split(together), strict=True):
            _fill(out, 1, plan, lambda rows, columns, some=some: self._encode_tile(some, rows, columns, plan.chunk))
        mean, log_variance = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))  # the clamp of diffusers' posterior
        return LatentMoments((mean - self._mean) / self._std, std / self._std)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents ``[batch, channels, k+1, h, w]`` to a video in [-1, 1], in the latents' dtype."""
        return torch.cat([torch.cat(list(self.decode_stream(one)), dim=2) for one in latents.split(1)])

    @torch.no_grad()
    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode one sample ``[1, channels, k+1, h, w]`` piece by piece in time.

        Yields frames ``[1, 3, frames, height, width]`` in order: chunk by chunk while whole frames fit the memory
        limit, else the whole video at once.
        """
        if latents.ndim != 5 or latents.shape[:2] != (1, self.latent_channels):
            raise UserError(f"latents of shape {list(latents.shape)}: expected [1, {self.latent_channels}, k+1, h, w]")
        frames, height, width = latents.shape[2:]
        plan = self.plan("decoder", frames, height, width)
        raw = (latents.to(self.model.device, torch.float32) * self._std + self._mean).to(self.model.dtype)
        if (plan.tile_height, plan.tile_width) == (height, width):
            for piece in decode_chunks(self.model, raw, plan.chunk):
                yield piece.to(latents.dtype)
            return
        stride, num_frames = self.spatial_stride, 1 + (frames - 1) * self.temporal_stride
        video = raw.new_empty(1, 3, num_frames, height * stride, width * stride)
        _fill(video, stride, plan, lambda rows, columns: decode_chunks(self.model, raw[..., rows, columns], plan.chunk))
        yield video.to(latents.dtype)

    def plan(self, part: Part, frames: int, height: int, width: int) -> TilePlan:
        """The largest cut of ``frames x height x width`` latent cells that stays within the memory limit.

        Raises:
            UserError: if not even the smallest tile fits.
        """
        for chunk in CHUNKS:
            if chunk < frames and self._bytes_per_cell(part, chunk) * height * width <= self.memory_limit_bytes:
                return TilePlan(chunk, height, width)
        per_cell = self._bytes_per_cell(part, 1)
        while per_cell * height * width > self.memory_limit_bytes:
            if max(height, width) <= MIN_TILE:
                needed = int(per_cell * height * width)
                raise UserError(f"VAE memory_limit_bytes={self.memory_limit_bytes}: its smallest tile needs {needed}")
            if height >= width:
                height = max(height * 3 // 4, min(height, MIN_TILE))
            else:
                width = max(width * 3 // 4, min(width, MIN_TILE))
        return TilePlan(1, height, width)

    def _together(self, plan: TilePlan, height: int, width: int) -> int:
        """Videos that are encoded together: one where a single one is cut into tiles."""
        if (plan.tile_height, plan.tile_width) != (height, width):
            return 1
        return max(int(self.memory_limit_bytes // (self._bytes_per_cell("encoder", plan.chunk) * height * width)), 1)

    def _encode_tile(self, video: torch.Tensor, rows: slice, columns: slice, chunk: int) -> Iterator[torch.Tensor]:
        rows, columns = (slice(s.start * self.spatial_stride, s.stop * self.spatial_stride) for s in (rows, columns))
        return encode_chunks(self.model, video[..., rows, columns], chunk, self._encoder)

    def _dry_run(self, part: Part, chunk: int) -> float:
        """Peak bytes for each latent cell of a frame: two chunks after the first frame, on meta tensors."""
        cells = 8
        with torch.device("meta"):
            twin = torch.nn.Module.to(AutoencoderKLWan.from_config(self.model.config), self.model.dtype).eval()
            if part == "encoder":
                side, frames = cells * self.spatial_stride, 1 + 2 * chunk * self.temporal_stride
                pieces = encode_chunks(twin, torch.empty(1, 3, frames, side, side, dtype=self.model.dtype), chunk)
            else:
                raw = torch.empty(1, self.latent_channels, 1 + 2 * chunk, cells, cells, dtype=self.model.dtype)
                pieces = decode_chunks(twin, raw, chunk)
            with torch.no_grad(), PeakLiveBytes() as live:
                for _ in pieces:
                    pass
        return live.peak / cells**2


def encode_chunks(
    model: AutoencoderKLWan, video: torch.Tensor, chunk: int, encoder: Callable[..., torch.Tensor] | None = None
) -> Iterator[torch.Tensor]:
    """Posterior means and log variances ``[1, 2 channels, frames, h, w]``, ``chunk`` latent frames at once.

    What passes between layers lies as their weights do. ``encoder`` is the model's own, or the same compiled.
    """
    encoder = model.encoder if encoder is None else encoder
    caches = _caches(model.encoder)
    is_channels_last = not model.encoder.conv_in.weight.is_contiguous()
    for piece in _first_then(video, chunk * model.config.scale_factor_temporal):
        piece = piece.to(model.device, model.dtype)
        if model.config.patch_size is not None:
            piece = patchify(piece, model.config.patch_size)
        if is_channels_last:
            piece = piece.contiguous(memory_format=torch.channels_last_3d)
        yield model.quant_conv(encoder(piece, feat_cache=caches, feat_idx=[0]))


def decode_chunks(model: AutoencoderKLWan, raw: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Frames of latents (not normalised) ``[1, channels, k+1, h, w]``, ``chunk`` latent frames at once."""
    caches = _caches(model.decoder)
    for index, piece in enumerate(_first_then(raw, chunk)):
        piece = model.decoder(model.post_quant_conv(piece), feat_cache=caches, feat_idx=[0], first_chunk=index == 0)
        if model.config.patch_size is not None:
            piece = unpatchify(piece, model.config.patch_size)
        yield piece.clamp(-1, 1)


def _first_then(video: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The first frame alone, then ``length`` frames at a time."""
    rest = video[:, :, 1:]
    return [video[:, :, :1], *(rest.split(length, dim=2) if rest.shape[2] else ())]


def _lay_channels_last(part: torch.nn.Module) -> None:
    for parameter in part.parameters():
        if parameter.ndim in (4, 5):  # of convolutions over pictures, and over time as well
            layout = torch.channels_last_3d if parameter.ndim == 5 else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _compiled(encoder: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The encoder as programs, one a shape; where one cannot be made, that is an error and not another program.

    Shapes stay static and nothing is chosen by timing: with either, bits would depend on what a worker met before, and
    on how busy its GPU was.
    """
    return torch.compile(
        encoder, fullgraph=True, dynamic=False, options={"deterministic": True}, recompile_limit=_MOST_PROGRAMS
    )


def _caches(part: torch.nn.Module) -> list[None]:
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())


def _fill(
    out: torch.Tensor, scale: int, plan: TilePlan, run_tile: Callable[[slice, slice], Iterator[torch.Tensor]]
) -> None:
    """Write the results of all tiles to ``out``, ``scale`` times larger than the latents, blended where they overlap.

    ``run_tile`` yields the frames of one tile (rows and columns of latent cells) in order.
    """
    rows, columns = _tiles(out.shape[-2] // scale, plan.tile_height), _tiles(out.shape[-1] // scale, plan.tile_width)
    row_ramps, column_ramps = _ramps(rows, scale), _ramps(columns, scale)
    out.zero_()
    for (row, row_ramp), (column, column_ramp) in itertools.product(
        zip(rows, row_ramps, strict=True), zip(columns, column_ramps, strict=True)
    ):
        weight = (row_ramp[:, None] * column_ramp).to(out.device, out.dtype)
        area = out[..., row.start * scale : row.stop * scale, column.start * scale : column.stop * scale]
        start = 0
        for piece in run_tile(row, column):
            stop = start + piece.shape[2]
            area[:, :, start:stop] += piece.to(out.dtype) * weight
            start = stop


def _tiles(size: int, tile: int) -> list[slice]:
    """Slices of ``tile`` cells that cover ``size`` and overlap by :data:`OVERLAP` or more."""
    starts = [*range(0, max(size - tile, 0), max(tile - OVERLAP, 1)), max(size - tile, 0)]
    return [slice(start, min(start + tile, size)) for start in starts]


def _ramps(tiles: list[slice], scale: int) -> list[torch.Tensor]:
    """Weights ``[scale * cells]`` of each tile that sum to one where tiles overlap."""
    total = torch.zeros(tiles[-1].stop * scale)
    ramps = []
    for index, tile in enumerate(tiles):
        length = (tile.stop - tile.start) * scale
        ramp = torch.ones(length)
        # Rise from the left neighbour, fall to the right one, each over the cells shared with it.
        if index > 0:
            shared = (tiles[index - 1].stop - tile.start) * scale
            ramp[:shared] = (torch.arange(shared) + 0.5) / shared
        if index + 1 < len(tiles):
            shared = (tile.stop - tiles[index + 1].start) * scale
            ramp[length - shared :] *= ((torch.arange(shared) + 0.5) / shared).flip(0)
        total[tile.start * scale : tile.stop * scale] += ramp
        ramps.append(ramp)
    return [ramp / total[tile.start * scale : tile.stop * scale] for ramp, tile in zip(ramps, tiles, strict=True)]
