"""A Qwen3-VL of random weights for model sizes that run without downloads."""

from typing import TYPE_CHECKING

import torch

from loomvideo.model.conditioning.config import MLLMConfig
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig, Qwen3VLModel

# Part of the fingerprint: raise it when the weights below change.
RECIPE_VERSION = "3"
# What a decoder layer's attention and MLP add, over its input: little, as a mixture of random words, pictures and
# timestamps says nothing that a small DiT can use and hides the words that it needs.
_ADDED = 0.1
# What the first layer's attention adds over a token: the words before it, by which a garment knows its colour.
_ADDED_WORDS = 0.7
_POSITION_PAIRS = 4
"""Of a head's rotary pairs, the fastest: they tell neighbours apart."""


def random_model(config: MLLMConfig, tokenizer: MLLMTokenizer) -> "Qwen3VLModel":
    """A Qwen3-VL whose states are those of each token, with a little of what came before it.

    Embeddings have unit variance. The first decoder layer adds the two words before a token, so that to a small DiT
    ``a red shirt and a blue skirt`` is not ``a blue shirt and a red skirt``. The others add a hundredth; their queries
    are scaled up so that attention selects instead of averaging. The vision tower's blocks add more: its tokens are to
    tell pictures apart.
    """
    from transformers import Qwen3VLModel

    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"MLLM vocab_size={config.vocab_size}: the built-in vocabulary has {tokenizer.vocab_size} tokens"
        )
    with torch.random.fork_rng(devices=[]):  # its own initialisation is overwritten below
        model = Qwen3VLModel(model_config(config, tokenizer))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 3.5 if "q_norm" in name else 1.0)
                continue
            std = 1.0 if "embed_tokens" in name else 0.3 if "pos_embed" in name else parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= _ADDED
            if "merger" not in name and name.endswith("attn.proj.weight"):
                std *= 0.8
            if "merger" not in name and name.endswith("mlp.linear_fc2.weight"):
                std *= 0.35
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        _look_back(model)
    return model


def _look_back(model: "Qwen3VLModel") -> None:
    """Let the heads of the first decoder layer look one word back (those of its first keys) or two (the others).

    Queries and keys are the same for all words, read from a dimension in which all embeddings are 1, and the query is
    the key turned back by its distance: what rotary positions add makes the product largest there.
    """
    decoder = model.language_model
    attention, config = decoder.layers[0].self_attn, decoder.config
    decoder.embed_tokens.weight[:, 0] = 1.0
    half, groups = attention.head_dim // 2, config.num_attention_heads // config.num_key_value_heads
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(_POSITION_PAIRS) / half)
    keys = torch.zeros(config.num_key_value_heads, attention.head_dim)
    queries = torch.zeros(config.num_attention_heads, attention.head_dim)
    keys[:, :_POSITION_PAIRS] = 1.0
    for head in range(config.num_attention_heads):
        back = 1 if head // groups < (config.num_key_value_heads + 1) // 2 else 2
        queries[head, :_POSITION_PAIRS] = (back * frequencies).cos()
        queries[head, half : half + _POSITION_PAIRS] = -(back * frequencies).sin()
    for projection, rows in ((attention.q_proj, queries), (attention.k_proj, keys)):
        projection.weight.zero_()
        projection.weight[:, 0] = rows.flatten()
    attention.o_proj.weight *= _ADDED_WORDS / _ADDED


def model_config(config: MLLMConfig, tokenizer: MLLMTokenizer) -> "Qwen3VLConfig":
    """The library's configuration of these sizes, with the special tokens of a tokenizer."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config={
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "mrope_section": list(config.mrope_section),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": config.vision.depth,
            "hidden_size": config.vision.hidden_size,
            "intermediate_size": config.vision.intermediate_size,
            "num_heads": config.vision.num_heads,
            "num_position_embeddings": config.vision.num_position_embeddings,
            "deepstack_visual_indexes": list(config.vision.deepstack_visual_indexes),
            "patch_size": config.processor.patch_size,
            "temporal_patch_size": config.processor.temporal_patch_size,
            "spatial_merge_size": config.processor.merge_size,
            "out_hidden_size": config.hidden_size,
        },
        image_token_id=tokenizer.token_id("<|image_pad|>"),
        video_token_id=tokenizer.token_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_id("<|vision_end|>"),
    )
