"""Qwen3-VL in this process, as captioner and judge: the real classes at tiny size with random weights."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from loomvideo.model.conditioning.inputs import interleaved_inputs, read_processor_config
from loomvideo.model.conditioning.random_weights import model_config
from loomvideo.model.conditioning.tokenizer import BUILTIN_FILE, MLLMTokenizer
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.captions import Captioner, CaptionOptions
from loomvideo.pipelines.captions.requests import caption_request
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.pipelines.vlm.local import QwenVLClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMRequest, decode_frames
from loomvideo.platform.errors import UserError

SAMPLE = Sample("a", "t2v", "d", "a.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3-vl")
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(model_config(model_size("tiny").mllm, MLLMTokenizer())).save_pretrained(folder)
    shutil.copy(BUILTIN_FILE, folder / "tokenizer.json")
    image = {"size": {"shortest_edge": 1024, "longest_edge": 65_536}, "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return str(folder)


def frames(_: Sample) -> tuple[np.ndarray, None]:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack([np.stack([np.roll(np.tile(ramp, (48, 1)), 9 * t, 1)] * 3, -1) for t in range(6)]), None


def test_answers_are_the_models_greedy_words(folder):
    client = QwenVLClient(folder, max_tokens=3, device="cpu")
    request = caption_request(SAMPLE, "caption", *frames(SAMPLE), FrameSampling(2, 64), structured=False)
    reply = client.complete(request)
    model, tokenizer, _ = client.loaded
    shown = [torch.from_numpy(f.copy()) for f in decode_frames(request.media[0])]
    question = request.parts[0]
    inputs = interleaved_inputs([question, "\nShown:", *shown], tokenizer, read_processor_config(folder))
    ids = inputs.input_ids[None]
    assert reply.tokens_in == ids.shape[1]
    # Word by word without a cache: what a wrong position or picture would change.
    for _ in range(3):
        types = (ids == model.config.image_token_id).long()
        with torch.inference_mode():
            logits = model(
                input_ids=ids, mm_token_type_ids=types, pixel_values=inputs.pixel_values.to(model.dtype),
                image_grid_thw=inputs.image_grid_thw,
            ).logits  # fmt: skip
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    words = ids[0, reply.tokens_in :].tolist()
    end = tokenizer.token_id("<|im_end|>")
    words = words[: words.index(end)] if end in words else words
    assert reply.text == tokenizer.decode(words)
    assert (ids == model.config.image_token_id).sum() == inputs.image_grid_thw.prod(1).sum() // 4


def test_a_model_that_talks_nonsense_leaves_the_sample_as_it_is(folder, tmp_path):
    options = CaptionOptions(backend="transformers", mode="caption", model=folder, cache=str(tmp_path), max_tokens=4,
                             num_frames=2, max_side=48, max_attempts=1)  # fmt: skip
    ((sample, result),) = Captioner(options).run([SAMPLE], frames)
    assert (sample, result.status) == (SAMPLE, "invalid_answer")


def test_a_judge_is_told_the_form_of_its_answer(folder):
    client = QwenVLClient(folder, max_tokens=2, setting="judge.model", device="cpu")
    media = caption_request(SAMPLE, "caption", *frames(SAMPLE), FrameSampling(1, 64)).media
    tokens = {
        structured: client.complete(VLMRequest(("Rate it.", *media), ("quality", "realism"), structured)).tokens_in
        for structured in (True, False)
    }
    _, tokenizer, _ = client.loaded
    form = "\nAnswer with nothing but a JSON object with the keys reasoning, quality, realism."
    assert tokens[True] - tokens[False] == len(tokenizer.encode(form))


def test_a_folder_that_is_none_is_a_mistake(tmp_path):
    client = QwenVLClient(str(tmp_path))
    request = caption_request(SAMPLE, "caption", *frames(SAMPLE), FrameSampling(2, 64))
    with pytest.raises(UserError, match="give the folder of a Qwen3-VL model"):
        client.complete(request)


def test_threads_share_one_model_and_a_batch_answers_as_each_would_alone(folder):
    alone, together = (QwenVLClient(folder, max_tokens=5, device="cpu", batch=size) for size in (1, 3))
    pictures = caption_request(SAMPLE, "caption", *frames(SAMPLE), FrameSampling(2, 64)).media
    requests = [
        VLMRequest(("Rate it.", *pictures), ("quality",), structured=False),
        VLMRequest(("What colour is the coat that she wears, and is it buttoned?",), structured=False),
        VLMRequest(("Short: ", *caption_request(SAMPLE, "caption", *frames(SAMPLE), FrameSampling(1, 48)).media),
                   structured=False),
    ]  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(together.complete, requests))
    singles = [alone.complete(request) for request in requests]
    assert [r.text for r in replies] == [r.text for r in singles]
    assert [(r.tokens_in, r.tokens_out) for r in replies] == [(r.tokens_in, r.tokens_out) for r in singles]


def test_repeats_of_a_sampling_judge_vary_and_come_back_the_same(folder):
    client = QwenVLClient(folder, max_tokens=8, device="cpu", temperature=1.0)
    repeats = [VLMRequest(("Rate it.",), structured=False, repeat=n) for n in range(3)]
    texts = [client.complete(request).text for request in repeats]
    assert len(set(texts)) > 1
    assert [client.complete(request).text for request in repeats] == texts
