import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from fixtures import media
from fixtures.mixed_folder import everything, reasons_of_files
from PIL import Image

from loomvideo.jobs.generation.actors import GeneratorActor
from loomvideo.jobs.generation.config import GenerateConfig
from loomvideo.jobs.generation.job import run
from loomvideo.jobs.weights.model_choice import model_source
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.requests import MAX_PROMPT_CHARACTERS, Request, read_requests
from loomvideo.pipelines.generation.results import sidecar_path
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    model = LoomVideoDiT(model_size("tiny").dit)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    save_dit(model, model.config, folder / "weights")
    video = np.random.default_rng(0).integers(0, 255, (14, 48, 80, 3), dtype=np.uint8)
    write_video(folder / "clip with spaces é.mp4", video, 24.0)
    Image.fromarray(video[0]).save(folder / "picture.png")
    return folder


def config(folder, **changes):
    base = GenerateConfig(
        checkpoint=str(folder / "weights"),
        model="tiny",
        kernels="eager",
        buckets=[64],
        default_size=[64, 64],
        num_frames=9,
        steps=2,
        scale=2.0,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def generator(folder):
    generator = FileGenerator.load(model_source(config(folder)), config(folder))
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
        ("edit", "clip with spaces é.mp4", 0, (9, 48, 80, 3)),
        ("ref_edit", "clip with spaces é.mp4", 2, (9, 48, 80, 3)),
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
        assert picture.size == (80, 48)
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


@pytest.mark.parametrize("make", [partial(media.write_video, frames=None, audio_only=True), media.write_frameless])
def test_files_without_pictures_are_one_line(folder, generator, make):
    make(folder / "bad-source.mp4")
    with pytest.raises(UserError, match=r"source=.*bad-source\.mp4: [^\n]+$"):
        generator.generate(request(folder, "edit", "bad.mp4", "bad-source.mp4"))
    assert not (folder / "bad.mp4").exists()


def test_slow_sources_give_all_their_frames(folder, generator):
    """6 frames at 12 a second; as training saw them, they last as long as 11 at 24, cut to 9."""
    video = np.random.default_rng(0).integers(0, 255, (6, 48, 80, 3), dtype=np.uint8)
    write_video(folder / "slow.mp4", video, 12.0)
    assert len(frames_of(generator.generate(request(folder, "edit", "slow-out.mp4", "slow.mp4")))) == 6
    generator.settings = config(folder, keep=False)
    made = frames_of(generator.generate(request(folder, "edit", "slow-out.mp4", "slow.mp4")))
    generator.settings = config(folder)
    assert np.stack(made).shape == (9, 64, 96, 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("part", ["encode", "sample", "decode_stream"])
def test_out_of_memory_is_one_line(folder, generator, monkeypatch, error, part):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(generator.pipeline, part, fail)
    with pytest.raises(UserError, match=r"large\.mp4: out of memory; lower width, height, buckets or num_frames"):
        generator.generate(request(folder, "t2v", "large.mp4"))
    assert not list(folder.glob("*large*"))


def test_torch_names_its_allocator_when_memory_runs_out():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        torch.empty(1 << 55, dtype=torch.uint8)


def test_sizes_beyond_reason_are_refused(folder, generator):
    generator.settings = config(folder, width=65536, height=64)
    with pytest.raises(UserError, match="width=65536 height=64: sides of at most 4096"):
        generator.generate(request(folder, "t2v", "wide.mp4"))
    generator.settings = config(folder)


def test_shortcuts_print_the_error_of_each(folder, capsys):
    asked = {"task": "edit", "prompt": "make it red", "source": str(folder / "picture.png"), "steps": 6}
    shortcuts = Shortcuts(steps=3, branch_refresh=2, step_cache=0.5, guidance_to=0.5, fp8=True)
    run(config(folder, **asked, out=str(folder / "short.png"), shortcuts=shortcuts))
    said = capsys.readouterr().out
    for name in (
        "exact",
        "steps=3",
        "branch_refresh=2",
        "step_cache=0.5",
        "guidance_to=0.5",
        "fp8=True",
        "all together",
    ):
        assert name in said
    assert said.count(" dB") == 6
    with Image.open(folder / "short.png") as approximate:
        facts = json.loads(approximate.text["loomvideo"])
    assert facts["settings"]["shortcuts"]["branch_refresh"] == 2
    run(config(folder, **asked, out=str(folder / "short.png"), shortcuts=shortcuts, measure_error=False))
    assert "approximate: steps=3, guidance_to=0.5" in capsys.readouterr().out


def test_several_seeds_are_what_each_is_alone(folder, capsys):
    asked = {"task": "t2i", "prompt": "a red dress", "steps": 2}
    run(config(folder, **asked, out=str(folder / "many.png"), seeds=[3, 5, 8], batch_seeds=2))
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [f"many-{seed}.png" for seed in (3, 5, 8)]
    run(config(folder, **asked, out=str(folder / "one.png"), seed=5))
    one, many = (np.asarray(Image.open(folder / name)).astype(int) for name in ("one.png", "many-5.png"))
    assert np.abs(one - many).max() <= 1
    assert json.loads(sidecar_path(str(folder / "many-5.png")).read_text())["seed"] == 5
    with pytest.raises(UserError, match="names one twice"):
        run(config(folder, **asked, out="x.png", seeds=[1, 1]))
    with pytest.raises(UserError, match="leave out batch, ranks and whole"):
        run(config(folder, **asked, out="x.png", seeds=[1], ranks=2))


def test_a_result_is_written_while_the_next_one_is_denoised(folder, monkeypatch):
    asked = {"task": "t2i", "prompt": "a red dress", "steps": 1}
    plain = config(folder, **asked, seeds=[1, 2, 3])
    run(dataclasses.replace(plain, out=str(folder / "after.png")))
    sample, write = LoomVideoPipeline.sample_seeds, FileGenerator.write
    begun = {seed: threading.Event() for seed in plain.seeds}

    def denoise(pipeline, conditions, seeds, *arguments):
        begun[seeds[0]].set()
        return sample(pipeline, conditions, seeds, *arguments)

    def write_once_the_next_began(generator, prepared, latents):
        assert begun[min(prepared.request.seed + 1, 3)].wait(60), "the next one waits for this file"
        return write(generator, prepared, latents)

    monkeypatch.setattr(LoomVideoPipeline, "sample_seeds", denoise)
    monkeypatch.setattr(FileGenerator, "write", write_once_the_next_began)
    run(dataclasses.replace(plain, out=str(folder / "beside.png"), decode_beside=True))
    for seed in plain.seeds:
        after, beside = (np.asarray(Image.open(folder / f"{name}-{seed}.png")) for name in ("after", "beside"))
        assert np.array_equal(after, beside)


def test_an_actor_denoises_one_and_writes_another(folder, monkeypatch):
    actor = GeneratorActor(config(folder, steps=1, decode_beside=True))
    actor.load()
    asked = [request(folder, "t2i", f"actor-{number}.png", seed=number) for number in (1, 2, 3)]
    sample, write = FileGenerator.sample, FileGenerator.write
    begun, another_began = [], threading.Semaphore(0)

    def denoise(generator, prepared):
        begun.append(prepared.request.seed)
        if len(begun) > 1:
            another_began.release()
        return sample(generator, prepared)

    def write_once_another_began(generator, prepared, latents):
        assert prepared.request.seed in begun[2:] or another_began.acquire(timeout=60), "the next one waits"
        if prepared.request.seed == 2:
            raise UserError("out=actor-2.png: a full disk")
        return write(generator, prepared, latents)

    monkeypatch.setattr(FileGenerator, "sample", denoise)
    monkeypatch.setattr(FileGenerator, "write", write_once_another_began)
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(actor.generate, asked))
    actor.generator.close()
    assert outcomes == [("done", ""), ("failed", "out=actor-2.png: a full disk"), ("done", "")]
    assert [Path(item.out).is_file() for item in asked] == [True, False, True]


def test_frames_left_out_are_told(folder, capsys):
    asked = {"task": "edit", "prompt": "make it red", "source": str(folder / "clip with spaces é.mp4"), "steps": 1}
    run(config(folder, **asked, out=str(folder / "first.mp4")))
    assert "edited the first 9 of 14 frames; whole=true edits all" in capsys.readouterr().out


def test_huge_pictures_are_refused(folder, generator):
    Image.new("RGB", (7680, 4320)).save(folder / "8k.png")
    with pytest.raises(UserError, match="7680x4320 pixels, sides of at most"):
        generator.generate(request(folder, "edit", "8k-out.png", "8k.png"))


@pytest.mark.slow
def test_everything_people_bring_is_a_source_or_one_line(folder, generator):
    mixed = folder / "mixed"
    mixed.mkdir()
    wanted = reasons_of_files(everything(mixed))
    for path in sorted(mixed.iterdir()):
        said = ""
        try:
            suffix = "png" if path.suffix in (".png", ".jpg", ".webp", ".heic") else "mp4"
            generator.prepare(request(folder, "edit", f"{path.name}.{suffix}", f"mixed/{path.name}"))
        except UserError as error:
            said = str(error)
        assert bool(said) == bool(wanted.get(path.name)), (path.name, said)
        assert not said or (path.name in said and "\n" not in said), said


@pytest.mark.slow
def test_everything_people_bring_in_one_batch_is_a_result_or_one_line(folder):
    mixed = folder / "batch of everything"
    mixed.mkdir()
    wanted = reasons_of_files(everything(mixed))
    names = sorted(path.name for path in mixed.iterdir())
    lines = []
    for name in names:
        suffix = "png" if name.endswith((".png", ".jpg", ".webp", ".heic")) else "mp4"
        out = f"out/{name}.{suffix}"
        lines.append({"task": "edit", "prompt": "make it blue", "out": out, "source": f"batch of everything/{name}"})
    batch = folder / "everything.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    actor = GeneratorActor(config(folder, steps=1, num_frames=5))
    actor.load()
    outcomes = {Path(item.source).name: actor.generate(item) for item in read_requests(batch)}
    actor.generator.close()
    assert {name for name, (outcome, *_) in outcomes.items() if outcome == "failed"} == {
        name for name in names if wanted.get(name)
    }
    assert all((folder / line["out"]).is_file() == (not wanted.get(Path(line["source"]).name)) for line in lines)
    for name, (outcome, text, *_) in outcomes.items():
        assert outcome == "done" or (name in text and "\n" not in text), (name, text)


def test_a_batch_keeps_what_is_done_and_names_what_failed(folder):
    lines = [
        {"task": "t2i", "prompt": "a red dress", "out": "batch/one.png"},
        {"task": "edit", "prompt": "make it blue", "out": "batch/two.png", "source": "picture.png"},
        {"task": "edit", "prompt": "make it blue", "out": "batch/three.png", "source": "weights/config.json"},
    ]
    batch = folder / "batch.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    actor = GeneratorActor(config(folder))
    actor.load()
    outcomes = [actor.generate(item)[0] for item in read_requests(batch)]
    assert outcomes == ["done", "done", "failed"]
    assert [actor.is_done(item) for item in read_requests(batch)] == [True, True, False]
    (folder / "batch/one.png").unlink()
    assert not actor.is_done(next(read_requests(batch)))
    actor.generator.settings = config(folder, workers=7, ranks=2)
    assert actor.is_done(list(read_requests(batch))[1])
    actor.generator.settings = config(folder, steps=3)
    assert not actor.is_done(list(read_requests(batch))[1])
    actor.generator.close()


@pytest.mark.slow
def test_a_bad_line_of_a_batch_costs_itself(tmp_path):
    good = {"task": "t2i", "prompt": "a dress", "out": "one.png"}
    bad = [good, {"task": "fly"}, good | {"prompt": 12}, good | {"refs": 5}, good | {"seed": "x"}, good | {"size": 1}]
    lines = [json.dumps(line) for line in [good, *bad]] + ["{", "[1]", json.dumps(good | {"out": "two.png"})]
    batch = tmp_path / "batch.jsonl"
    batch.write_text("\n".join(lines))
    refused = []
    assert [Path(request.out).name for request in read_requests(batch, refused)] == ["one.png", "two.png"]
    assert [message.removeprefix(f"{batch}:")[0] for message in refused] == list("23456789")
    assert "one.png is named twice" in refused[0]
    assert not any("\n" in message for message in refused)
    with pytest.raises(UserError, match=r"batch\.jsonl:2: out="):
        list(read_requests(batch))


def test_a_batch_on_ray_is_resumed_and_ranks_make_the_same_file(folder, ray_cluster, capsys, monkeypatch):
    lines = [
        {"task": "t2i", "prompt": "a red dress", "out": "ray/one.png"},
        {"task": "edit", "prompt": "make it blue", "out": "ray/two.mp4", "source": "clip with spaces é.mp4"},
    ]
    batch = folder / "ray.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Ray was started in another folder than the command.
    monkeypatch.chdir(folder)
    run(config(folder, checkpoint="weights", batch="ray.jsonl", workers=2))
    first = (folder / "ray/two.mp4").read_bytes()
    (folder / "ray/two.mp4").unlink()
    run(config(folder, checkpoint="weights", batch="ray.jsonl", ranks=2))
    assert (folder / "ray/two.mp4").read_bytes() == first
    said = capsys.readouterr().out
    assert "2 done, 0 kept, 0 failed" in said
    assert "1 done, 1 kept, 0 failed" in said
    batch.write_text(json.dumps({**lines[0], "task": "edit", "source": "weights/config.json"}) + "\n")
    with pytest.raises(UserError, match=r"source=.*config\.json"):
        run(config(folder, batch=str(batch), ranks=2))


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
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "shortcuts": Shortcuts(branch_refresh=0)}, "branch_refresh=0"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "ranks": 3, "sequence_ranks": 2}, "must divide ranks=3"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "checkpoint": "nowhere"}, "checkpoint=nowhere"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "num_frames": 10}, "num_frames=10: must be 4k"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "fps": 0.5}, "fps=0.5: choose 1 to 240, or 0"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "whole": True, "keep": False}, "leave keep=true"),
        ({"task": "t2v", "prompt": "a", "out": "a.mp4", "decode_beside": True}, "no next result"),
        (
            {"task": "t2v", "prompt": "a", "out": "a.mp4", "seeds": [1], "decode_beside": True, "memory": "offload"},
            "use it with memory=resident, not offload",
        ),
    ],
)
def test_command_mistakes(folder, changes, message):
    with pytest.raises(UserError, match=message):
        run(config(folder, **changes))
