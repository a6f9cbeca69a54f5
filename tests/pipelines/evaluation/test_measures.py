"""All metrics of a result, and a chosen few of them."""

import numpy as np

from loomvideo.pipelines.evaluation import metrics, motion
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.measures import NAMES, measure
from loomvideo.pipelines.evaluation.suites.items import EvalItem


def test_a_few_metrics_are_those_of_all_and_cost_no_others(monkeypatch):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (3, 48, 48, 3), dtype=np.uint8)
    target = source.copy()
    target[:, 8:20, 8:20] = (200, 30, 30)
    item = EvalItem(
        "t",
        "k",
        "ref_edit",
        "",
        "",
        aligned=True,
        extra={"garment": True, "colour": "red", "worn": [{"type": "dress", "colour": "red"}]},
    )
    inputs = LoadedItem(item, source, (target[0],), target, None, (48, 48), 3, 24.0, block_periods=(8,))
    video = target // 2
    everything = measure(video, inputs)
    assert set(everything) == NAMES

    def wasted(*arguments):
        raise AssertionError("not asked for")

    monkeypatch.setattr(motion, "motion_fidelity", wasted)
    monkeypatch.setattr(metrics, "ssim", wasted)
    few = {"outside_psnr_db", "garment_delta_e", "gain_psnr_db", "sharpness"}
    monkeypatch.setattr("loomvideo.pipelines.evaluation.editing.ssim", lambda *arguments: 0.0)
    assert measure(video, inputs, few) == {name: everything[name] for name in everything if name in few}
