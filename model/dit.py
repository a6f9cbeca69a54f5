"""The LoomVideo diffusion transformer: Wan blocks over packed samples, conditioned layer by layer on an MLLM.

Notable features:
- samples of any size in one sequence; no padding, no per-token modulation (rows indexed by segment instead)
- Deepstack: block i attends to the hidden states of its own MLLM layer, through one shared embedder
- Scale-and-Add: the source's patches are added to the noised ones, scaled by t, in one matrix product
- reference images as extra tokens at negative temporal positions, with zero timestep modulation
- parameter names are the published checkpoint's
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from loomvideo.model import kernels
from loomvideo.model.attention import settled_attention
from loomvideo.model.blocks import Block, Context, Lent
from loomvideo.model.config import DiTConfig
from loomvideo.model.kernels.rope import keep_tables_out_of_programs
from loomvideo.model.packing import PackedBatch
from loomvideo.model.parts import brought
from loomvideo.model.shortcuts import BlockCache
from loomvideo.platform.errors import UserError

CHECKPOINTING = ("none", "selective", "full")
"""Activation checkpointing: ``selective`` keeps attention and matrix products, ``full`` only the blocks' inputs."""


STARTS_AT_ZERO = ("source_patch_embedding.", "mllm_embedder.linear_2.")
"""Parameters that are zero beside pretrained Wan weights."""


class TwoLinear(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features: int, hidden: int, out_features: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(in_features, hidden)
        self.linear_2 = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeEmbedder(nn.Module):
    """Timesteps to modulation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinear(config.freq_dim, config.inner_dim, config.inner_dim, F.silu)
        self.time_proj = nn.Linear(config.inner_dim, 6 * config.inner_dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """fp32 [samples] to the embedding [samples, dim] and the blocks' modulation [samples, 6, dim]."""
        embedding = self.time_embedder(timestep_frequencies(timesteps, self.freq_dim).to(dtype))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class MLLMEmbedder(TwoLinear):
    """Hidden states of any MLLM layer to the transformer's width."""

    def __init__(self, config: DiTConfig) -> None:
        gelu = nn.GELU(approximate="tanh")
        super().__init__(config.mllm_dim, config.mllm_hidden_dim, config.inner_dim, gelu)
        self.norm = Lent(config.mllm_dim)
        self.eps = config.eps

    def forward(self, states: Tensor) -> Tensor:
        """[tokens, mllm dim] to [tokens, dim]."""
        return super().forward(self.norm(lambda weight, x: kernels.rms_norm(x, weight, self.eps), states))


class LoomVideoDiT(nn.Module):
    """The velocity field of LoomVideo.

    Args:
        config: Sizes.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.inner_dim, config.patch_size
        self.patch_embedding = Lent(dim, config.in_channels, *patch, bias=True)
        if config.use_source_embedding:
            self.source_patch_embedding = Lent(dim, config.in_channels, *patch, bias=True)
        self.condition_embedder = TimeEmbedder(config)
        self.mllm_embedder = MLLMEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self.proj_out = nn.Linear(dim, config.out_patch_dim)
        self.activation_checkpointing = "none"
        self._run_module = _run_module
        if not self.scale_shift_table.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, names: Collection[str] | None = None, generator: torch.Generator | None = None) -> None:
        """Initialise as Wan does.

        Beside pretrained Wan weights the MLLM embedder's last layer and the source embedding start at zero, as
        published, so that neither changes Wan's function; from scratch they start like their neighbours.

        Args:
            names: Parameters that the loaded weights lack; None for all, from scratch.
            generator: The generator of the random values.
        """
        for name, parameter in self.named_parameters():
            if names is not None and name not in names:
                continue
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.inner_dim**-0.5, generator=generator)
            elif name.startswith("proj_out") or (names is not None and name.startswith(STARTS_AT_ZERO)):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            elif ".time_embedder." in name:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)

    def forward(
        self,
        batch: PackedBatch,
        contexts: Sequence[Context] | None = None,
        time: tuple[Tensor, Tensor] | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """Velocity of every video patch.

        Args:
            batch: Packed samples, on the model's device and in its dtype.
            contexts: :meth:`keys_values` of ``batch.mllm_states``, where they are kept over denoising steps.
            time: :meth:`embed_time` of ``batch.timesteps``, likewise.
            cache: May stand in for all blocks but the first (generation's approximate step caching).

        Returns:
            [video tokens, patch dim] in the order of ``batch.pack_targets``; see ``batch.unpack``.
        """
        x = self._embed_patches(batch)
        embedding, modulation = self.embed_time(batch.timesteps, x.dtype) if time is None else time
        attention = settled_attention(x, self.config.attention_head_dim)
        run = partial(self._run_blocks, batch=batch, contexts=contexts, modulation=modulation, attention=attention)
        x = run(x, range(len(self.blocks))) if cache is None else self._run_cached(x, run, cache)
        if batch.video_index is not None:
            x = x.index_select(0, batch.video_index)
        shift, scale = (self.scale_shift_table.to(modulation.dtype) + embedding[:, None].to(modulation.dtype)).unbind(1)
        return self.proj_out(kernels.layer_norm_modulate(x, shift, scale, batch.video_row_ids, self.config.eps))

    def set_activation_checkpointing(self, mode: str) -> None:
        """Choose what the backward pass recomputes instead of keeping: one of :data:`CHECKPOINTING`.

        Raises:
            UserError: if there is no such mode.
        """
        if mode not in CHECKPOINTING:
            raise UserError(f"activation_checkpointing={mode}: unknown; choose one of {', '.join(CHECKPOINTING)}")
        self.activation_checkpointing = mode

    def compile_blocks(self, **options: Any) -> None:
        """Compile what runs a block (with its activation checkpointing): one graph, shared by all blocks."""
        keep_tables_out_of_programs()
        self._run_module = torch.compile(_run_module, **options)

    def run_blocks_eagerly(self) -> None:
        """Undo :meth:`compile_blocks`."""
        self._run_module = _run_module

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embed timesteps fp32 [samples].

        Returns:
            The embedding [samples, dim] for the output norm, and the blocks' rows fp32 [6, samples + 1, dim], whose
            last one is the reference tokens'.
        """
        embedding, modulation = self.condition_embedder(timesteps, dtype)
        rows = modulation.to(torch.promote_types(dtype, torch.float32)).transpose(0, 1)
        return embedding, F.pad(rows, (0, 0, 0, 1))

    def keys_values(self, mllm_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of every block for [layers, tokens, mllm dim]."""
        pairs = []
        for block, states in zip(self.blocks, mllm_states, strict=True):
            with brought(block):
                pairs.append(block.attn2.keys_values(self.mllm_embedder(states)))
        return pairs

    def _run_blocks(
        self,
        x: Tensor,
        indices: range,
        batch: PackedBatch,
        contexts: Sequence[Context] | None,
        modulation: Tensor,
        attention: str,
    ) -> Tensor:
        for index in indices:
            states = batch.mllm_states[index] if contexts is None else None
            context = contexts[index] if states is None else self._run(self.mllm_embedder, states)
            x = self._run(
                self.blocks[index],
                x,
                context,
                modulation,
                batch.row_ids,
                batch.positions,
                batch.self_plan,
                batch.cross_plan,
                attention,
            )
        return x

    def _run_cached(self, x: Tensor, run: Callable[[Tensor, range], Tensor], cache: BlockCache) -> Tensor:
        first = run(x, range(1))
        rest = cache.reuse(first - x)
        if rest is None:
            rest = run(first, range(1, len(self.blocks))) - first
            cache.keep(rest)
        return first + rest

    def _run(self, module: nn.Module, *inputs: Any) -> Tensor:
        mode = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        return self._run_module(module, mode, *inputs)

    def _embed_patches(self, batch: PackedBatch) -> Tensor:
        if not self.config.use_source_embedding:
            return self.patch_embedding(lambda weight, bias, x: F.linear(x, weight.flatten(1), bias), batch.patches)

        def scale_and_add(weight: Tensor, bias: Tensor, x: Tensor, source: Tensor) -> Tensor:
            return self.source_patch_embedding(
                lambda source_weight, source_bias, x, source: kernels.scale_and_add(
                    x,
                    source,
                    batch.source_scale,
                    batch.row_ids,
                    weight.flatten(1),
                    bias,
                    source_weight.flatten(1),
                    source_bias,
                ),
                x,
                source,
            )

        return self.patch_embedding(scale_and_add, batch.patches, batch.source_patches)


def _run_module(module: nn.Module, checkpointing: str, *inputs: Any) -> Tensor:
    if checkpointing == "none":
        return module(*inputs)
    options = {}
    if checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention and matrix products, but not those that widen: the feed-forward's hidden layer is the largest."""
    if op in _MATRIX_PRODUCTS:
        *_, left, right = (arg for arg in args if isinstance(arg, Tensor))
        keep = right.shape[1] <= left.shape[1]
    else:
        keep = any(name in str(op) for name in _ATTENTION_OPS)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_ATTENTION_OPS = ("_scaled_dot_product", "_varlen_attn")


def timestep_frequencies(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines and sines of fp32 timesteps [samples] at ``dim / 2`` frequencies: fp32 [samples, dim]."""
    exponents = -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None].float() * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
