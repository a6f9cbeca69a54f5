"""The frozen MLLM: alignment, batching, shared pictures, the tiny model's features, and folders."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from fixtures.published import write_qwen3_vl
from safetensors.torch import load_file, save_file

from loomvideo.model.conditioning.inputs import build_inputs, text_inputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

TINY = model_size("tiny")


@pytest.fixture(scope="module")
def mllm():
    return FrozenMLLM.of_size(TINY)


@pytest.fixture
def edit_prompts(mllm):
    """The full and visual prompt of an edit with two references, and a text prompt."""
    generator = torch.Generator().manual_seed(0)
    frames, *references = (
        torch.randint(0, 256, (n, 64, 96, 3), dtype=torch.uint8, generator=generator) for n in (9, 1, 1)
    )
    references = [reference[0] for reference in references]
    parts = frames, references
    full, visual = (
        build_inputs("ref_edit", "replace the coat", *parts, variant, mllm.tokenizer, mllm.processor)
        for variant in ("full", "visual")
    )
    return [full, visual, text_inputs("Generate a video: a blue coat", mllm.tokenizer)]


def test_states_are_the_librarys_hidden_states(mllm, edit_prompts):
    library = copy.deepcopy(mllm.model)
    library.language_model.norm = torch.nn.Identity()
    full = edit_prompts[0]
    types = torch.zeros_like(full.input_ids, dtype=torch.int32)
    types[full.input_ids == mllm.model.config.image_token_id] = 1
    types[full.input_ids == mllm.model.config.video_token_id] = 2
    media = {name: value for name, value in full.tensors().items() if name != "input_ids"}
    output = library(input_ids=full.input_ids[None], mm_token_type_ids=types[None], output_hidden_states=True, **media)
    # The library lists the embeddings first and, as its norm is removed here, the last layer unchanged.
    expected = torch.stack(output.hidden_states[-mllm.num_states :])[:, 0]
    (ours,) = mllm.encode([full])
    is_text = types == 0
    torch.testing.assert_close(ours[:, is_text], expected[:, is_text], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[-1], output.last_hidden_state[0], rtol=1e-4, atol=1e-4)


def test_batched_equals_alone(mllm, edit_prompts):
    together = mllm.encode(edit_prompts)
    for prompt, states in zip(edit_prompts, together, strict=True):
        assert states.shape == (TINY.dit.num_layers, prompt.num_tokens, TINY.mllm.hidden_size)
        torch.testing.assert_close(states, mllm.encode([prompt])[0], rtol=1e-4, atol=1e-4)
    for states, apart in zip(together, mllm.encode(edit_prompts, max_batch_tokens=1), strict=True):
        torch.testing.assert_close(states, apart, rtol=1e-4, atol=1e-4)


def test_shared_pictures_pass_the_tower_once(mllm, edit_prompts, monkeypatch):
    seen = []
    forward = mllm.model.visual.forward
    monkeypatch.setattr(
        mllm.model.visual, "forward", lambda patches, **kwargs: seen.append(len(patches)) or forward(patches, **kwargs)
    )
    mllm.encode(edit_prompts)
    full = edit_prompts[0]
    assert seen == [len(full.pixel_values) + len(full.pixel_values_videos)]


def test_later_words_do_not_change_earlier_states(mllm):
    short, long = (text_inputs(text, mllm.tokenizer) for text in ("a red dress", "a red dress and a hat"))
    a, b = mllm.encode([short, long])
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-4, atol=1e-4)


def test_tiny_features_tell_words_and_their_context_apart(mllm):
    texts = ["replace the jacket with a red dress", "replace the jacket with a blue dress"]
    red, blue = mllm.encode([text_inputs(text, mllm.tokenizer) for text in texts])
    cosine = torch.nn.functional.cosine_similarity(red, blue, dim=-1)
    colour = 9  # <|im_start|> user \n replace the jacket with a red
    assert (cosine[:, : colour - 1] > 0.999).all()
    assert (cosine[:, colour - 1] < 0.6).all()
    assert (cosine[:, colour] < 0.9).all()
    assert (red.square().mean(-1).sqrt() < 4).all()


def test_tiny_features_of_a_word_hold_the_two_before_it(mllm):
    """And no others: where "red" stands three words before a token, or after it, the token hardly changes."""
    texts = ["a red shirt with a hat", "a blue shirt with a hat"]
    red, blue = mllm.encode([text_inputs(text, mllm.tokenizer) for text in texts])
    change = (red - blue).square().mean(-1).sqrt()[0]
    at = 4  # <|im_start|> user \n a red
    assert change[:at].max() < 1e-4
    assert (change[at + 1 : at + 3] > 0.4).all()
    assert change[at + 3 :].max() < 0.2


def test_tiny_features_tell_pictures_apart(mllm):
    pictures = [torch.full((64, 64, 3), value, dtype=torch.uint8) for value in (30, 220)]
    inputs = [build_inputs("mi2v", "", None, [one], "full", mllm.tokenizer, mllm.processor) for one in pictures]
    shown = inputs[0].input_ids == mllm.model.config.image_token_id
    dark, light = mllm.encode(inputs)
    assert torch.nn.functional.cosine_similarity(dark[:, shown], light[:, shown], dim=-1).max() < 0.9


def test_same_weights_whatever_the_global_seed(mllm):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = FrozenMLLM.of_size(TINY)
    assert torch.get_rng_state().equal(before)
    assert again.fingerprint == mllm.fingerprint
    for ours, theirs in zip(again.model.parameters(), mllm.model.parameters(), strict=True):
        assert ours.equal(theirs)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_fingerprint_depends_on_seed_and_alignment(mllm):
    other_seed = FrozenMLLM.from_config(dataclasses.replace(TINY.mllm, seed=1), TINY.dit.num_layers)
    other_layers = FrozenMLLM.from_config(TINY.mllm, TINY.dit.num_layers - 1)
    assert len({mllm.fingerprint, other_seed.fingerprint, other_layers.fingerprint}) == 3


def test_bf16_is_close(mllm, edit_prompts):
    half = FrozenMLLM.of_size(TINY, dtype=torch.bfloat16)
    for exact, rounded in zip(mllm.encode(edit_prompts), half.encode(edit_prompts), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).mean() > 0.98


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-VL saved as the published folders are."""
    return write_qwen3_vl(tmp_path_factory.mktemp("qwen3-vl"), TINY.mllm)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_folder_loads_and_encodes(folder):
    config = dataclasses.replace(TINY.mllm, kind="qwen3_vl", folder=str(folder))
    mllm = FrozenMLLM.from_config(config, 4)
    assert mllm.processor.image_min_pixels == 4096
    saved = load_file(folder / "model.safetensors")
    assert any(key.startswith("lm_head.") for key in saved)
    assert "model.language_model.layers.0.mlp.up_proj.weight" in saved
    ours = mllm.model.state_dict()
    assert ours["visual.merger.norm.weight"].equal(saved["model.visual.merger.norm.weight"])
    (states,) = mllm.encode([text_inputs("a red dress", mllm.tokenizer)])
    assert states.shape[0] == 4
    assert states.isfinite().all()


def test_folder_fingerprint_sees_one_changed_weight(folder, copied):
    before = FrozenMLLM.from_pretrained(folder, 4).fingerprint
    assert before == FrozenMLLM.from_pretrained(copied, 4, dtype=torch.float32).fingerprint
    weights = load_file(copied / "model.safetensors")
    weights["model.language_model.embed_tokens.weight"][5, 5] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert before != FrozenMLLM.from_pretrained(copied, 4).fingerprint


def test_folder_refusals(copied, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        FrozenMLLM.from_pretrained(tmp_path / "nothing", 4)
    with pytest.raises(UserError, match="cannot feed 7"):
        FrozenMLLM.from_pretrained(copied, 7)
    weights = load_file(copied / "model.safetensors")
    missing = weights.pop("model.language_model.layers.2.mlp.up_proj.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing weights.*layers\.2\.mlp\.up_proj"):
        FrozenMLLM.from_pretrained(copied, 4)
    weights |= {"model.language_model.layers.2.mlp.up_proj.weight": missing, "model.extra.weight": missing.clone()}
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected weights.*extra"):
        FrozenMLLM.from_pretrained(copied, 4)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="qwen2_vl"):
        FrozenMLLM.from_pretrained(copied, 4)


def test_misshapen_weight_is_refused_by_name(copied):
    weights = load_file(copied / "model.safetensors")
    weights["model.visual.pos_embed.weight"] = weights["model.visual.pos_embed.weight"][:16].clone()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mismatched weights.*pos_embed"):
        FrozenMLLM.from_pretrained(copied, 4)


def test_5b_without_a_folder_is_refused():
    with pytest.raises(UserError, match="folder"):
        FrozenMLLM.of_size(model_size("5b"))


def test_wrong_number_of_vision_tokens_is_refused(mllm, edit_prompts):
    full = edit_prompts[0]
    last = (full.input_ids == mllm.model.config.video_token_id).nonzero()[-1]
    full.input_ids[last] = 5
    with pytest.raises(UserError, match="video tokens"):
        mllm.encode([full])
