"""The sample suite in this process: the figures of training jobs, equal to those of an evaluation run."""

import numpy as np
import pytest
from fixtures.evaluation import run_local

from loomvideo.pipelines.evaluation.controls import CONTROLS, merge_controls
from loomvideo.pipelines.evaluation.generators import BlendGenerator
from loomvideo.pipelines.evaluation.in_process import evaluate_in_process
from loomvideo.pipelines.evaluation.inputs import InputOptions
from loomvideo.pipelines.evaluation.rows import MODEL
from loomvideo.pipelines.evaluation.stages import GenerateStage, MeasureStage, PrepareStage, initial_rows
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites import own
from loomvideo.pipelines.evaluation.table import METRICS, metric
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.platform.errors import UserError

OPTIONS = InputOptions((64,), (64,), num_frames=5)


def clip(level: int) -> np.ndarray:
    ramp = np.tile(np.linspace(0, 120, 64, dtype=np.uint8), (64, 1))
    return np.stack([np.stack([np.roll(ramp, t, 1) + level] * 3, -1) for t in range(5)])


@pytest.fixture
def manifest(tmp_path):
    samples = []
    for n in range(3):
        write_video(tmp_path / f"s{n}.mp4", clip(10 * n))
        write_video(tmp_path / f"t{n}.mp4", clip(100 + 10 * n))
        samples.append(
            Sample(f"e{n}", "video_edit", "x", f"t{n}.mp4", f"s{n}.mp4", instruction=f"edit {n}", split="heldout")
        )
    samples.append(Sample("g", "t2v", "x", "t0.mp4", caption="a ramp", split="heldout"))
    write_jsonl(samples, tmp_path / "samples.jsonl")
    return own.sample(tmp_path)


class Teller(BlendGenerator):
    """A model that does what the text says: fails at other instructions, and at everything without its source."""

    def generate(self, item, seed, use_source=True):
        right = item.item.text.removeprefix("edit ") == item.item.key.removeprefix("e")
        return BlendGenerator(0.9 if right and use_source else 0.2, 0.0).generate(item, seed, use_source)


def seed(suite: str, key: str) -> int:
    return 7


def test_figures_are_those_of_the_stages_and_controls_tell_a_model_that_listens(manifest, tmp_path):
    seen = []
    result, rows = evaluate_in_process(manifest, Teller(), OPTIONS, seed, lambda *found: seen.append(found))
    figures = {f.metric: f.value for f in result.figures if not f.category}
    assert figures["edit_psnr_db"] > figures["no_source_psnr_db"] + 5
    assert figures["edit_psnr_db"] > figures["wrong_instruction_psnr_db"] + 5 > figures["copy_psnr_db"] + 5
    assert result.coverage == 1
    assert [row["series"] for row in rows] == [MODEL] * 4
    assert [sorted(results) for _, results, _ in seen] == [sorted([MODEL, *CONTROLS])] * 3 + [[MODEL]]
    # Pixels of a generation are no edit's.
    assert "edit_psnr_db" not in rows[-1]["metrics"]

    store = Store(tmp_path / "store")
    stages = [PrepareStage(store, OPTIONS), GenerateStage(store, Teller, "teller"), MeasureStage(store)]
    staged = merge_controls(list(run_local(initial_rows(manifest, (MODEL, *CONTROLS), seed), stages)))
    assert [row["metrics"] for row in staged] == [row["metrics"] for row in rows]


def test_a_model_that_makes_nothing_ends_the_run(manifest):
    class Broken(BlendGenerator):
        def generate(self, item, seed, use_source=True):
            raise RuntimeError("out of memory")

    with pytest.raises(UserError, match="no sample succeeded; e0: generation failed: RuntimeError: out of memory"):
        evaluate_in_process(manifest, Broken(), OPTIONS, seed, lambda *found: None)


def test_every_measured_metric_is_in_the_table(manifest):
    _, rows = evaluate_in_process(manifest, Teller(), OPTIONS, seed, lambda *found: None)
    assert {name for row in rows for name in row["metrics"]} <= set(METRICS)
    assert metric("judge/quality").higher_is_better is True
    assert metric("edit_psnr_db_macro").unit == "dB"
    assert metric("nothing-of-ours").higher_is_better is None
