"""Equality with the published processor, MLLM and data rules. All sizes are read from the files."""

import json
from functools import cache

import pytest
import torch
from fixtures.reference import (
    FOLDER,
    TOLERANCE,
    reference_config,
    reference_vectors,
    requires_reference_vectors,
)
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLModel

from loomvideo.model import buckets, clips, tasks
from loomvideo.model.codec import LatentGrid
from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.conditioning.inputs import MLLMInputs, build_inputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer

pytestmark = requires_reference_vectors


@cache
def data_cases() -> dict:
    return json.loads((FOLDER / "data.json").read_text())


@cache
def processor_cases() -> dict:
    return json.loads((FOLDER / "processor.json").read_text())


@cache
def reference_mllm() -> FrozenMLLM:
    sizes = reference_config()["mllm"]
    model = Qwen3VLModel(Qwen3VLConfig.from_dict(sizes))
    model.load_state_dict(load_file(FOLDER / "mllm.safetensors"))
    num_layers = len(reference_vectors()["0.mllm_hidden_states"])
    tokenizer = MLLMTokenizer.from_pretrained(FOLDER)
    return FrozenMLLM(model, num_layers, tokenizer, ProcessorConfig(), fingerprint="reference")


def mllm_inputs(index: int) -> MLLMInputs:
    prefix = f"{index}.mllm."
    tensors = {
        name.removeprefix(prefix): value for name, value in reference_vectors().items() if name.startswith(prefix)
    }
    return MLLMInputs.from_tensors(tensors | {"input_ids": tensors["input_ids"][0]})


def test_buckets():
    for case in data_cases()["bucket"]:
        chosen = buckets.choose_bucket(case["width"], case["height"], case["classes"], case["kind"])
        assert chosen == (case["bucket_width"], case["bucket_height"]), case


def test_clip_indices():
    for case in data_cases()["clip"]:
        indices = clips.clip_indices(
            case["fps"], case["total_frames"], case["num_frames"], case["start_ratio"], LatentGrid(4, 16)
        )
        assert indices == case["indices"], case


def test_mllm_frames():
    for case in data_cases()["mllm_frames"]:
        assert clips.mllm_frame_indices(case["total_frames"]) == case["indices"], case


def test_processor_cases():
    expected = load_file(FOLDER / "processor.safetensors")
    limits = {
        f"{medium}_{ours}": processor_cases()[f"{medium}_processor"][theirs]
        for medium in ("image", "video")
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    }
    video = processor_cases()["video_processor"]
    config = ProcessorConfig(**limits, **{name: video[name] for name in ("fps", "min_frames", "max_frames")})
    tokenizer = MLLMTokenizer.from_pretrained(FOLDER)
    for index, case in enumerate(processor_cases()["cases"]):
        content = case["content"]
        words = "".join(part["text"] for part in content if part["type"] == "text")
        task = next((name for name, kind in tasks.WORDINGS.items() if words.startswith(kind.opening)), None)
        frames = [expected[part["frames"]] for part in content if part["type"] == "video"]
        images = [expected[part["frames"]][0] for part in content if part["type"] == "image"]
        variant = "full" if task else "null"
        text = words.removeprefix(tasks.WORDINGS[task].opening) if task else ""
        source = frames[0] if frames else None
        inputs = build_inputs(task or "t2v", text, source, images, variant, tokenizer, config)
        assert tokenizer.encode(case["text"]) == inputs.input_ids.tolist(), case["name"]
        ours = inputs.tensors() | {"input_ids": inputs.input_ids[None]}
        names = {name.split(".", 1)[1] for name in expected if name.startswith(f"{index}.")}
        assert set(ours) == {name for name in names if not name.startswith("in.")} - {"attention_mask"}, case["name"]
        for name, value in ours.items():
            assert value.dtype == expected[f"{index}.{name}"].dtype
            tolerance = 1e-4 if value.is_floating_point() else 0
            torch.testing.assert_close(value, expected[f"{index}.{name}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("together", [True, False])
def test_hidden_states(together):
    inputs = [mllm_inputs(index) for index in range(len(reference_config()["samples"]))]
    mllm = reference_mllm()
    states = mllm.encode(inputs) if together else [mllm.encode([one])[0] for one in inputs]
    for index, ours in enumerate(states):
        torch.testing.assert_close(ours, reference_vectors()[f"{index}.mllm_hidden_states"], **TOLERANCE)
