"""Prompts that share a row, one behind another: the states of each are those it has alone, in every layer."""

import pytest
import torch

from loomvideo.model.conditioning.inputs import build_inputs, text_inputs
from loomvideo.model.conditioning.mllm import FrozenMLLM, batches_by_length, batches_in_order
from loomvideo.model.conditioning.packed_attention import attend_packed
from loomvideo.model.sizes import model_size

TINY = model_size("tiny")
LAYERS = TINY.mllm.num_hidden_layers


@pytest.fixture(scope="module")
def plain():
    return FrozenMLLM.from_config(TINY.mllm, LAYERS)


@pytest.fixture(scope="module")
def packed():
    mllm = FrozenMLLM.from_config(TINY.mllm, LAYERS)
    mllm.pack_prompts()
    return mllm


@pytest.fixture(scope="module")
def prompts(plain):
    """Texts, an edit of a video with references, its visual form, a picture's edit, and a text again."""
    generator = torch.Generator().manual_seed(0)

    def frames(number, height=64, width=96):
        return torch.randint(0, 256, (number, height, width, 3), dtype=torch.uint8, generator=generator)

    def built(task, text, source, references, variant="full"):
        return build_inputs(task, text, source, references, variant, plain.tokenizer, plain.processor)

    video, picture, reference = frames(9), frames(1, 48, 48), frames(1)[0]
    return [
        text_inputs("Generate a video: a blue coat", plain.tokenizer),
        built("ref_edit", "replace the coat", video, [reference]),
        built("ref_edit", "replace the coat", video, [reference], "visual"),
        text_inputs("", plain.tokenizer),
        built("image_edit", "a red dress, long sleeves", picture, []),
        text_inputs("a red dress and a hat, seen from behind in the evening sun", plain.tokenizer),
    ]


def test_every_layer_of_every_prompt_is_what_it_is_alone(plain, packed, prompts):
    together = packed.encode(prompts)
    for prompt, states in zip(prompts, together, strict=True):
        (alone,) = plain.encode([prompt])
        assert states.shape == (LAYERS, prompt.num_tokens, TINY.mllm.hidden_size)
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


def test_the_cut_and_the_order_of_rows_change_nothing(packed, prompts):
    together = packed.encode(prompts)
    for limit in (1, 60):
        for one, other in zip(packed.encode(prompts, max_batch_tokens=limit), together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(reversed(packed.encode(prompts[::-1])), together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_token_is_padding(packed, prompts, monkeypatch):
    rows = []
    layer = packed.model.language_model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda hidden, **rest: rows.append(hidden.shape[:2]) or forward(hidden, **rest)
    )
    packed.encode(prompts)
    assert rows == [(1, sum(prompt.num_tokens for prompt in prompts))]


def test_batches_in_order_hold_what_fits():
    assert batches_in_order([5, 3, 9, 1, 1, 20, 2], 10) == [[0, 1], [2, 3], [4], [5], [6]]
    assert batches_in_order([], 10) == []
    # By length: rows times the longest.
    assert batches_by_length([5, 3, 9, 1], 10) == [[3, 1], [0], [2]]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_a_block_diagonal_mask(causal):
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 7]
    tokens = sum(lengths)
    query = torch.randn(1, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = owner[:, None] == owner
    if causal:
        mask &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    offsets = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    found, _ = attend_packed(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=offsets, max_length_q=7, is_causal=causal
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="no mask"):
        attend_packed(torch.nn.Module(), query, key, value, mask, cu_seq_lens_q=offsets, max_length_q=7)


@pytest.mark.gpu
def test_on_a_gpu_packed_is_close_to_alone(prompts):
    plain, packed = (FrozenMLLM.from_config(TINY.mllm, LAYERS, "cuda", torch.bfloat16) for _ in range(2))
    packed.pack_prompts()
    for prompt, states in zip(prompts, packed.encode(prompts), strict=True):
        (alone,) = plain.encode([prompt])
        assert torch.nn.functional.cosine_similarity(states.float(), alone.float(), dim=-1).mean() > 0.99
