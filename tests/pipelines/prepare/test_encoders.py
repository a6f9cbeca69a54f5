"""How encoders compute: settings are part of what is made, and what a host does ahead changes no byte."""

import contextlib
import threading

import pytest
import torch
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare import pixels
from loomvideo.pipelines.prepare.background import one_ahead
from loomvideo.pipelines.prepare.config import EncoderOptions, FeatureOptions
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.job import UP_TO_DATE, prepare
from loomvideo.pipelines.prepare.load import SampleLoader
from loomvideo.pipelines.prepare.pixels import PixelCopier
from loomvideo.pipelines.prepare.recipe import encode_parts, manifest_config
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.platform.config import flatten
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset

CLIPS = [torch.full((2, 4, 6, 3), value, dtype=torch.uint8) for value in (0, 51, 255)]


def test_pixels_are_normalised_in_the_order_asked_for():
    copier = PixelCopier(torch.device("cpu"))
    copied = copier.copy(CLIPS, [2, 0])
    assert copied.numbers == [2, 0]
    assert copied.copied is None
    video = copier.video(copied, torch.bfloat16)
    assert video.shape == (2, 3, 2, 4, 6)
    assert video.dtype == torch.bfloat16
    assert video[:, 0, 0, 0, 0].tolist() == [1.0, -1.0]


class Stream:
    """Writes down what a CUDA stream is told."""

    def __init__(self, told):
        self.told = told

    def record_event(self):
        self.told.append("copied")
        return "event"

    def wait_event(self, event):
        self.told.append(f"wait for {event}")


def test_whoever_encodes_waits_for_the_copy_on_the_device(monkeypatch):
    told = []

    @contextlib.contextmanager
    def stream(own):
        told.append("copy stream")
        yield
        told.append("back")

    class Frames:
        """Page-locked pixels, and what becomes of them."""

        def to(self, device, non_blocking):
            assert non_blocking
            told.append(f"to {device}")
            return self

        def record_stream(self, stream):
            told.append("kept for the encoder")

        def permute(self, *axes):
            return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(told))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(told))
    monkeypatch.setattr(pixels, "_page_locked", lambda clips: told.append(f"pin {len(clips)}") or Frames())
    copier = PixelCopier(torch.device("cuda:0"))
    copied = copier.copy(CLIPS, [0, 1, 2])
    copier.video(copied, torch.float32)
    assert told == [
        "pin 3", "copy stream", "to cuda:0", "copied", "back", "wait for event", "kept for the encoder",
    ]  # fmt: skip


def test_one_ahead_keeps_the_order_and_hands_errors_on():
    worked, threads = [], set()

    def items():
        for number in range(4):
            threads.add(threading.current_thread().name)
            worked.append(number)
            if number == 3:
                raise KeyError(number)
            yield number

    seen = []
    with pytest.raises(KeyError, match="3"):
        seen.extend(one_ahead(items()))
    assert seen == [0, 1, 2]
    assert all(name.startswith("one ahead") for name in threads)
    assert list(one_ahead(iter(()))) == []
    worked.clear()
    with contextlib.closing(one_ahead(items())) as ahead:
        assert next(ahead) == 0
    assert len(worked) <= 2


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return folder, raw_samples(folder, 6)


def test_what_is_made_ready_ahead_changes_no_byte(raw, tmp_path):
    config = prepare_config(raw[0], tmp_path)
    encoder = SampleEncoder(model_size("tiny"), FeatureOptions())
    loader = SampleLoader(config, base_folder(config.input), encoder.computed_by)
    try:
        batch = [(loader.load(sample), None) for sample in raw[1]]
    finally:
        loader.close()
    ready = encoder.ready([loaded for loaded, _ in batch])
    # Of 3 videos, 2 sources and 2 references, and of pictures: clips of one shape lie together.
    assert len(ready.copies) == len({clip.shape for part in ready.windows.values() for clip in part})
    for now, ahead in zip(
        encoder.encode_together(batch, "train"), encoder.encode_together(batch, "train", ready), strict=True
    ):
        assert now.metadata == ahead.metadata
        for member, tensors in now.tensors.items():
            for name, tensor in tensors.items():
                assert tensor.equal(ahead.tensors[member][name]), (member, name)


def test_what_fails_ahead_is_told_in_its_turn(raw, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    original = SampleEncoder.ready

    def ready(self, batch):
        if batch[0].sample.key == "sample-003":
            raise RuntimeError("no such picture")
        return original(self, batch)

    monkeypatch.setattr(SampleEncoder, "ready", ready)
    config = prepare_config(raw[0], tmp_path)
    config.limits.max_loss = 0.5
    assert prepare(config).summary()["quarantined"] == 1
    rows = ShardDataset.open(tmp_path).rows_by_key
    assert sorted(rows) == [f"sample-{number:03d}" for number in (0, 1, 2, 4, 5)]


def test_settings_at_their_defaults_make_nothing_stale(raw, tmp_path):
    config = prepare_config(raw[0], tmp_path)
    assert not any(key.startswith("encoders.") for key in manifest_config(config))
    before = encode_parts(config)
    assert any(key.startswith("encoders.") for key in flatten(config))
    config.encoders.packed = True
    assert manifest_config(config)["encoders.packed"] is True
    assert encode_parts(config)["config"] != before["config"]


def test_packed_prompts_make_the_features_again_and_no_latents(raw, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    config = prepare_config(raw[0], tmp_path)
    prepare(config)
    before = ShardDataset.open(tmp_path)
    stored = [before.read(row) for row in range(len(before))]
    config.encoders = EncoderOptions(packed=True)
    changes = [(part.name, part.members, part.why) for part in stale_parts(config) if part.what == "config"]
    assert changes == [("encoders.packed", "mllm", "False -> True")]
    result = prepare(config)
    assert result.reason == "rebuilt: changed config (encoders.packed False -> True)"
    assert (result.work["made.mllm"], result.work["kept.target"], result.work["made.target"]) == (6, 6, 0)
    again = ShardDataset.open(tmp_path)
    for sample in stored:
        packed = again.read(again.rows_by_key[sample.key])
        for name, tensor in sample.tensors["mllm"].items():
            torch.testing.assert_close(packed.tensors["mllm"][name], tensor, rtol=0.02, atol=0.02)
    assert prepare(config).reason == UP_TO_DATE
    config.encoders = EncoderOptions()
    assert prepare(config).reason == "rebuilt: changed config (encoders.packed True -> False)"
    assert ShardDataset.open(tmp_path).manifest.digest == before.manifest.digest


def test_a_built_in_codec_has_no_layout_to_choose(raw, tmp_path):
    for key in ("channels_last", "compile"):
        config = prepare_config(raw[0], tmp_path)
        setattr(config.encoders, key, True)
        with pytest.raises(UserError, match=rf"encoders\.{key}=true: the codec of model=tiny is built in"):
            config.check()


def test_how_the_codec_computes_is_in_the_members_names():
    tiny = model_size("tiny")
    plain = SampleEncoder(tiny, FeatureOptions()).computed_by
    fast = SampleEncoder(tiny, FeatureOptions(), options=EncoderOptions(channels_last=True, compile=True, packed=True))
    assert fast.computed_by == {
        "codec": f"{plain['codec']}-channels_last-compiled",
        "mllm": f"{plain['mllm']}-packed",
    }
    assert fast.fingerprints == SampleEncoder(tiny, FeatureOptions()).fingerprints


@pytest.mark.gpu
def test_pixels_copied_beside_other_work_arrive_whole():
    copier = PixelCopier(torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randint(0, 256, (33, 256, 256, 3), dtype=torch.uint8, generator=generator) for _ in range(8)]
    copies = [copier.copy(clips, [number]) for number in range(8)]
    busy = torch.randn(2048, 2048, device="cuda")
    for copied, clip in zip(copies, clips, strict=True):
        busy = busy @ busy / 50
        video = copier.video(copied, torch.float32).cpu()[0]
        # A GPU divides by a constant as it multiplies by its inverse: the last bit may differ.
        wanted = clip.permute(3, 0, 1, 2).float() / 127.5 - 1
        torch.testing.assert_close(video, wanted, rtol=0, atol=3e-7)
