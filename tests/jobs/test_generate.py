import dataclasses
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from loomvideo.jobs.generate_config import GenerateConfig
from loomvideo.jobs.generate_job import GeneratorActor, load_generator, run
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.presets import preset
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.evaluation.media import write_video
from loomvideo.pipelines.generation import MAX_PROMPT_CHARACTERS, Request, read_requests, sidecar_path
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    model = LoomVideoDiT(preset("tiny").dit)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    save_dit(model, model.config, folder / "weights")
    video = np.random.default_rng(0).integers(0, 255, (14, 48, 80, 3), dtype=np.uint8)
    write_video(folder / "clip with spaces é.mp4", video, 24.0)
    Image.fromarray(video[0]).save(folder / "picture.png")
    return folder


def config(folder, **changes):
    base = GenerateConfig(
        checkpoint=str(folder / "weights"), buckets=[64], default_size=[64, 64], num_frames=9, steps=2, scale=2.0
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def generator(folder):
    generator = load_generator(config(folder))
    yield generator
    generator.close()


def request(folder, task, out, source="", num_refs=0, **changes):
    refs = [str(folder / "picture.png")] * num_refs
    source = str(folder / source) if source else ""
    return Request(task, "make the dress red", str(folder / out), source, refs, **changes)


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("task", "source", "num_refs", "shape"),
    [
        ("t2v", "", 0, (9, 64, 64, 3)),
        ("edit", "clip with spaces é.mp4", 0, (9, 64, 96, 3)),
        ("ref_edit", "clip with spaces é.mp4", 2, (9, 64, 96, 3)),
        ("mi2v", "", 1, (9, 64, 64, 3)),
    ],
)
def test_every_video_task_writes_a_playable_file(folder, generator, task, source, num_refs, shape):
    made = generator.generate(request(folder, task, f"{task}.mp4", source, num_refs, seed=1))
    assert np.stack(frames_of(made)).shape == shape
    with av.open(str(made)) as container:
        assert json.loads(container.metadata["comment"])["prompt"] == "make the dress red"
    facts = json.loads(sidecar_path(str(made)).read_text())
    assert facts["seed"] == 1
    assert facts["checkpoint"]["model"] == "tiny"


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_pictures_carry_their_facts(folder, generator, suffix):
    made = generator.generate(request(folder, "edit", f"picture-edit.{suffix}", "picture.png"))
    with Image.open(made) as picture:
        assert picture.size == (96, 64)
        text = picture.text["loomvideo"] if suffix == "png" else picture.getexif()[0x010E]
    assert json.loads(text)["task"] == "image_edit"


def test_the_same_seed_gives_the_same_file_and_another_seed_another(folder, generator):
    first = generator.generate(request(folder, "t2v", "a.mp4", seed=3)).read_bytes()
    again = generator.generate(request(folder, "t2v", "a.mp4", seed=3)).read_bytes()
    other = frames_of(generator.generate(request(folder, "t2v", "b.mp4", seed=4)))
    assert first == again
    assert not np.array_equal(frames_of(folder / "a.mp4"), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "paint"}, "task=paint: choose one of"),
        ({"task": "edit"}, "task=edit: set source="),
        ({"task": "t2v", "source": "picture.png"}, "task=t2v: takes no source"),
        ({"task": "mi2v"}, "task=mi2v: set refs="),
        ({"task": "mi2v", "refs": ["picture.png"] * 7}, "refs: 7 references, at most 6"),
        ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, "characters, at most"),
        ({"prompt": "  "}, "prompt: must not be empty"),
        ({"out": "a.gif"}, "out=a.gif: name a"),
        ({"out": "a.png"}, "t2v makes a video"),
        ({"task": "edit", "source": "weights/config.json"}, "source="),
        ({"task": "edit", "source": "absent.mp4"}, "no such file"),
    ],
)
def test_bad_requests_are_one_line(folder, generator, changes, message, monkeypatch):
    monkeypatch.chdir(folder)
    values = {"task": "t2v", "prompt": "a dress", "out": "bad.mp4"} | changes
    with pytest.raises(UserError) as caught:
        generator.generate(Request(**values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "bad.mp4").exists()


def test_huge_pictures_are_refused(folder, generator):
    Image.new("RGB", (7680, 4320)).save(folder / "8k.png")
    with pytest.raises(UserError, match="7680x4320 pixels, sides of at most"):
        generator.generate(request(folder, "edit", "8k-out.png", "8k.png"))


def test_a_batch_keeps_what_is_done_and_names_what_failed(folder):
    lines = [
        {"task": "t2i", "prompt": "a red dress", "out": "batch/one.png"},
        {"task": "edit", "prompt": "make it blue", "out": "batch/two.png", "source": "picture.png"},
        {"task": "edit", "prompt": "make it blue", "out": "batch/three.png", "source": "weights/config.json"},
    ]
    batch = folder / "batch.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    actor = GeneratorActor(config(folder))
    outcomes = [actor.generate(item)[0] for item in read_requests(batch)]
    assert outcomes == ["done", "done", "failed"]
    assert [actor.generate(item)[0] for item in read_requests(batch)] == ["kept", "kept", "failed"]
    (folder / "batch/one.png").unlink()
    assert actor.generate(next(read_requests(batch)))[0] == "done"
    actor.generator.close()


def test_batch_mistakes_name_the_line(folder):
    batch = folder / "wrong.jsonl"
    batch.write_text('{"task": "t2i", "prompt": "a", "out": "a.png"}\n{"task": "t2i", "promt": "a", "out": "b.png"}\n')
    with pytest.raises(UserError, match=r"wrong\.jsonl:2: .*promt"):
        list(read_requests(batch))
    with pytest.raises(UserError, match="no such file"):
        list(read_requests(folder / "absent.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "task: set task="),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "checkpoint": "nowhere"}, "checkpoint=nowhere"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "num_frames": 10}, "num_frames=10: must be 4k"),
    ],
)
def test_command_mistakes(folder, changes, message):
    with pytest.raises(UserError, match=message):
        run(config(folder, **changes))
