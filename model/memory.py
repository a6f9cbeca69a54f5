"""Memory of a pack, counted from what each operation saves for backward, by what is recomputed."""

from collections.abc import Sequence

from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import CHECKPOINTING
from loomvideo.model.flops import sequence_flops
from loomvideo.platform.errors import UserError

BYTES_BF16 = 2
# What a block saves of a token, in rows of the inner dim: its input; the outputs of attention and of products that do
# not widen; the rest. Its feed-forward saves two rows of its own width.
INPUT_ROWS, PRODUCT_ROWS, OTHER_ROWS, FEED_FORWARD_ROWS = 1, 9, 7, 2
# The same of an MLLM token: the embedded states; keys and values before and after their norms.
CONTEXT_ROWS, KEYS_VALUES_ROWS = 1, 3


def activation_bytes(config: DiTConfig, tokens: int, mllm_tokens: int, policy: str = "full") -> float:
    """Peak of what a forward and backward pass over a pack keeps, beside weights, their gradients and MLLM states."""
    dim, ffn = config.inner_dim, config.ffn_dim
    mode = _checked(policy)
    embedder = mllm_tokens * (config.mllm_dim + 2 * config.mllm_hidden_dim)
    rest = tokens * (OTHER_ROWS * dim + FEED_FORWARD_ROWS * ffn)
    products = tokens * PRODUCT_ROWS * dim + mllm_tokens * KEYS_VALUES_ROWS * dim
    inputs = tokens * INPUT_ROWS * dim + mllm_tokens * CONTEXT_ROWS * dim
    whole = inputs + products + rest + embedder
    kept = {"none": whole, "selective": inputs + products, "full": inputs}[mode]
    # The block, or the embedder, whose backward pass runs holds all it would without recomputation, and gradients.
    running = {"none": 0, "selective": max(rest, embedder), "full": max(rest + products, embedder)}[mode]
    running += tokens * (FEED_FORWARD_ROWS * ffn if mode == "full" else ffn + 3 * dim)
    return BYTES_BF16 * (config.num_layers * kept + running)


def recomputed_flops(config: DiTConfig, lengths: Sequence[int], mllm_lengths: Sequence[int], policy: str) -> float:
    """Operations that the backward pass repeats of the forward's."""
    mode = _checked(policy)
    if mode == "none":
        return 0.0
    if mode == "full":
        return sequence_flops(config, lengths, mllm_lengths).forward
    # The products that widen: of the feed-forward and of the embedder.
    widening = sum(lengths) * config.inner_dim * config.ffn_dim
    widening += sum(mllm_lengths) * config.mllm_dim * config.mllm_hidden_dim
    return 2.0 * config.num_layers * widening


def _checked(policy: str) -> str:
    # "all" is what runs of before wrote for "full".
    policy = "full" if policy == "all" else policy
    if policy not in CHECKPOINTING:
        raise UserError(f"recompute={policy}: use one of {', '.join(CHECKPOINTING)}")
    return policy


def states_bytes(config: DiTConfig, mllm_tokens: int) -> int:
    """MLLM states of a pack in bf16, on the host and on the device."""
    return config.num_layers * mllm_tokens * config.mllm_dim * BYTES_BF16
