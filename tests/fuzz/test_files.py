"""Random bit flips in media and weights: a result, a reason or one line, in a limited time."""

import json

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="make setup-dev")
from fixtures import media_corpus as corpus
from fixtures.damage import damaged
from fixtures.media import write_picture
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loomvideo.model.stored_weights import open_checkpoint
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.platform.errors import UserError

MEDIA = ("p.png", "p.jpg", "p.webp", "p.gif", "p.tif", "v.mp4", "v.mkv", "v.avi", "v.ts", "v.h264")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in MEDIA:
        if name == "p.gif":
            corpus.animation(folder / name, 100, "GIF")
        elif name.startswith("p"):
            write_picture(folder / name, corpus.quarters())
        else:
            corpus.video(folder / name, corpus.numbered(8))
    return {name: (folder / name).read_bytes() for name in MEDIA}


@pytest.fixture(scope="module")
def decoder():
    decoder = IsolatedDecoder(timeout_s=30)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("name", MEDIA)
@given(data=st.data())
def test_media(fresh, media, decoder, name, data):
    path = fresh() / name
    path.write_bytes(damaged(data, media[name]))
    try:
        info = decoder.probe(str(path))
        assert info.width >= 2
        for chunk in decoder.read(str(path), range(min(info.num_frames, 4))):
            assert chunk.dtype == np.uint8
    except DecodeError as error:
        assert error.reason


@given(data=st.data())
def test_safetensors(fresh, data):
    import torch

    path = fresh() / "w.safetensors"
    save_file({"patch_embedding.weight": torch.zeros(4, 4), "proj_out.bias": torch.zeros(4)}, path)
    path.write_bytes(damaged(data, path.read_bytes()))
    try:
        checkpoint = open_checkpoint(path)
        list(checkpoint.tensors(checkpoint.shapes))
    except UserError as error:
        assert str(path) in str(error)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
def test_checkpoint_configs(fresh, content):
    folder = fresh()
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        open_checkpoint(folder)
