"""A judge on vLLM: called as its documentation says, here with a stand-in that takes exactly those arguments."""

import base64
import io
import json
import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.evaluation.judge import judge_client
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.vlm.local import QwenVLClient
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMMedia, VLMRequest, encode_media, labelled
from loomvideo.pipelines.vlm.vllm_engine import VLLMClient
from loomvideo.platform.config import load_config
from loomvideo.platform.errors import UserError


@pytest.fixture
def vllm(monkeypatch):
    """The part of vLLM 0.11 that is used, which keeps what it was called with."""
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    calls = SimpleNamespace(made=[], chats=[])

    @dataclass
    class StructuredOutputsParams:
        json: str | dict | None = None
        regex: str | None = None
        choice: list[str] | None = None

    @dataclass
    class SamplingParams:
        n: int = 1
        temperature: float = 1.0
        seed: int | None = None
        max_tokens: int | None = 16
        structured_outputs: StructuredOutputsParams | None = None

    class LLM:
        def __init__(self, model, *, tensor_parallel_size=1, max_model_len=None, limit_mm_per_prompt=None):
            calls.made.append((model, tensor_parallel_size, max_model_len, limit_mm_per_prompt))

        def chat(self, messages, sampling_params=None, use_tqdm=True):
            assert len(messages) == len(sampling_params)
            calls.chats.append((messages, sampling_params, use_tqdm))
            return [self._output(params) for params in sampling_params]

        def _output(self, params):
            schema = params.structured_outputs.json if params.structured_outputs else {"properties": {}}
            text = json.dumps({name: 4 if "enum" in kind else "ok" for name, kind in schema["properties"].items()})
            return SimpleNamespace(prompt_token_ids=[1] * 70, outputs=[SimpleNamespace(text=text, token_ids=[1] * 9)])

    module.LLM, module.SamplingParams = LLM, SamplingParams
    parameters.StructuredOutputsParams = StructuredOutputsParams
    module.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    return calls


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def request(number=0, **changes):
    video = np.full((4, 32, 48, 3), 40 * number, np.uint8)
    media = encode_media("Result", video, FrameSampling(2, 64))
    return VLMRequest(labelled(f"How good is {number}?", [media]), ("quality",), **changes)


def test_threads_are_answered_together_by_one_engine_under_the_schema(vllm, folder):
    client = VLLMClient(str(folder), max_tokens=99, temperature=0.7, batch=4, gpus=2)
    replies = {}

    def ask(number):
        replies[number] = client.complete(request(number, system="You are a judge."))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vllm.made == [(str(folder), 2, 32_768, {"image": 64, "video": 0})]
    assert sum(len(messages) for messages, *_ in vllm.chats) == 4
    assert len(vllm.chats) < 4
    assert json.loads(replies[3].text) == {"reasoning": "ok", "quality": 4}
    assert (replies[3].tokens_in, replies[3].tokens_out) == (70, 9)
    (system, user), params, use_tqdm = vllm.chats[0][0][0], vllm.chats[0][1][0], vllm.chats[0][2]
    assert system == {"role": "system", "content": "You are a judge."}
    assert [part["type"] for part in user["content"]] == ["text", "text", "image_url", "image_url"]
    url = user["content"][2]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))).size == (48, 32)
    assert (params.temperature, params.max_tokens, use_tqdm) == (0.7, 99, False)
    assert params.structured_outputs.json == request().schema()


def test_the_same_question_is_seeded_alike_and_a_repeat_otherwise(vllm, folder):
    client = VLLMClient(str(folder), temperature=0.7)
    client.complete_many([request(), request(), request(repeat=1), request(structured=False)])
    seeds = [params.seed for params in vllm.chats[0][1]]
    assert seeds[0] == seeds[1] != seeds[2]
    assert vllm.chats[0][1][3].structured_outputs is None


def test_a_whole_film_is_shown_a_frame_a_second(vllm, folder, tmp_path):
    write_video(tmp_path / "film.mp4", np.zeros((20, 32, 48, 3), np.uint8), 8.0)
    film = VLMMedia("Result", (), (tmp_path / "film.mp4").read_bytes(), "digest")
    VLLMClient(str(folder)).complete_many([VLMRequest(("Look:", film), structured=False)])
    parts = vllm.chats[0][0][0][0]["content"]
    # Frames 0, 8, 16 and the last.
    assert [part["type"] for part in parts] == ["text"] + ["image_url"] * 4


def test_the_engine_is_chosen_by_what_is_installed_and_kept_in_the_key(vllm, folder, monkeypatch):
    def client(*overrides):
        base = ["judge.kind=transformers", f"judge.model={folder}"]
        config = load_config(EvaluateConfig, [*base, *overrides])
        config.check()
        return judge_client(config.judge)

    assert isinstance(client("judge.gpus=1"), VLLMClient)
    # Without GPUs of its own it takes none that it sees.
    assert (type(client("judge.gpus=0")), client("judge.gpus=0").device) == (QwenVLClient, "cpu")
    assert isinstance(client("judge.gpus=1", "judge.engine=transformers"), QwenVLClient)
    assert client("judge.gpus=1").identity() != client("judge.gpus=0").identity()
    with pytest.raises(UserError, match=r"judge\.engine=vllm: needs whole GPUs"):
        client("judge.engine=vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"judge\.engine=vllm: .*install vllm 0\.11"):
        client("judge.gpus=1", "judge.engine=vllm").complete_many([request()])


def test_a_folder_without_a_model_is_named(vllm, tmp_path):
    with pytest.raises(UserError, match=r"judge\.model=.*empty: no config\.json"):
        VLLMClient(str(tmp_path / "empty")).complete_many([request()])
