"""The window that model, metrics and judge share."""

import numpy as np

from loomvideo.pipelines.evaluation.inputs import InputOptions, load_item
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.media.video_writer import write_video


def test_source_and_target_of_an_odd_rate_keep_the_same_frames(tmp_path):
    ramp = np.arange(9, dtype=np.uint8)[:, None, None, None] * 25
    for name in ("source.mp4", "target.mp4"):
        write_video(tmp_path / name, np.broadcast_to(ramp, (9, 64, 64, 3)), 30.0)
    item = EvalItem("sample", "a", "video_edit", "", "x", source="source.mp4", target="target.mp4")
    loaded = load_item(item, tmp_path, InputOptions((64,), (64,), num_frames=9))
    # At 24 frames a second nine frames at 30 hold seven, of which five make whole latent frames.
    assert loaded.frame_indices == (0, 1, 2, 4, 5)
    assert loaded.num_frames == 5
    np.testing.assert_array_equal(loaded.source, loaded.target)
