"""From prompt text to the velocity of every guidance branch, against messages written out and read by other code."""

import json
import re

import pytest
import torch
from fixtures.reference import (
    FOLDER,
    TOLERANCE,
    reference_config,
    reference_dit,
    reference_vectors,
    requires_reference_vectors,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

from loomvideo.model.codec import LatentMoments
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.conditioning.inputs import MLLMInputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sampler import Denoiser, SchedulerConfig
from loomvideo.model.sizes import PUBLISHED_NEGATIVE_PROMPT, model_size
from loomvideo.platform.errors import UserError

NEGATIVE = "a red dress in the image"


class FrameMeans:
    """A stand-in codec of the vectors' 48 channels: block means, one latent frame a frame."""

    latent_channels, spatial_stride, temporal_stride, fingerprint = 48, 16, 1, "means"

    def encode(self, video):
        means = torch.nn.functional.avg_pool3d(video, (1, 16, 16)).repeat(1, 16, 1, 1, 1)
        return LatentMoments(means, torch.zeros_like(means))


@requires_reference_vectors
@torch.no_grad()
def test_text_to_velocity_of_all_branches():
    cases = json.loads((FOLDER / "processor.json").read_text())
    expected = load_file(FOLDER / "processor.safetensors")
    index, case = next((i, c) for i, c in enumerate(cases["cases"]) if c["name"] == "edit_6_frames")
    limits = {f"{m}_{k}_pixels": cases[f"{m}_processor"][f"{side}_edge"] for m in ("image", "video")
              for k, side in (("min", "shortest"), ("max", "longest"))}  # fmt: skip
    video = cases["video_processor"]
    config = ProcessorConfig(**limits, **{name: video[name] for name in ("fps", "min_frames", "max_frames")})
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    # The vectors' tokenizer and MLLM were made apart: the MLLM is told where the tokenizer has its vision tokens.
    ids = {name: tokenizer.token_to_id(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"))}  # fmt: skip
    network = Qwen3VLModel(Qwen3VLConfig.from_dict(reference_config()["mllm"] | ids))
    network.load_state_dict(load_file(FOLDER / "mllm.safetensors"))
    dit = reference_dit()
    mllm = FrozenMLLM(network, dit.config.num_layers, MLLMTokenizer.from_pretrained(FOLDER), config, "reference")
    pipeline = LoomVideoPipeline(dit, FrameMeans(), mllm)
    frames = expected[f"{index}.in.0"].numpy()
    conditions = pipeline.encode("video_edit", case["content"][-1]["text"], frames, negative_prompt=NEGATIVE)

    # The same three messages by hand, read by the library's own tokenizer.
    spans = "".join(re.findall(r"<\|vision_start\|>.*?<\|vision_end\|>", case["text"]))
    texts = {
        FULL: case["text"],
        VISUAL: f"<|im_start|>user\n{spans}<|im_end|>\n<|im_start|>assistant\n",
        UNCONDITIONAL: f"<|im_start|>user\ngenerate an image: {NEGATIVE}<|im_end|>\n<|im_start|>assistant\n",
    }
    media = {name: expected[f"{index}.{name}"] for name in ("pixel_values_videos", "video_grid_thw")}
    source = pipeline.codec.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).mean[0]
    noise = torch.randn(conditions.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = SchedulerConfig().build(4).timesteps.float()
    velocities = Denoiser(dit, noise, conditions.branches, timesteps).velocities(noise, 1)
    assert set(conditions.branches) == set(texts)
    for branch, text in texts.items():
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        (states,) = mllm.encode([MLLMInputs(ids, **({} if branch == UNCONDITIONAL else media))])
        torch.testing.assert_close(conditions.branches[branch].mllm_states, states, **TOLERANCE)
        t = timesteps[1].item()
        sample = DiTSample(noise, t, states, None if branch == UNCONDITIONAL else source, t / 1000)
        batch = pack([sample], dit.config.patch_size)
        torch.testing.assert_close(velocities[branch], batch.unpack(dit(batch))[0], **TOLERANCE)
    empty = pipeline.encode("video_edit", "x", frames).branches[UNCONDITIONAL].mllm_states
    assert empty.shape[1] < conditions.branches[UNCONDITIONAL].mllm_states.shape[1]


@requires_reference_vectors
def test_published_message_without_text():
    assert "cfg.uncond" in reference_vectors()
    assert prompts.chat(prompts.negative(None)) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


def test_the_published_sampler_words_a_negative_prompt():
    assert prompts.negative("") == "generate an image: "
    assert prompts.negative("blurry") == "generate an image: blurry"
    assert model_size("5b").negative_prompt == PUBLISHED_NEGATIVE_PROMPT
    assert PUBLISHED_NEGATIVE_PROMPT.startswith("Oversaturated colors, overexposure, static")
    assert PUBLISHED_NEGATIVE_PROMPT.count(", ") == 26
    assert model_size("tiny").negative_prompt is None
    with pytest.raises(UserError, match="special token"):
        prompts.negative("<|im_end|>")
