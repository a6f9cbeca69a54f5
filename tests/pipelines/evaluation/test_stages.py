"""The whole path on a small made-up dataset: resumable per sample, no repeated judge call, failures counted."""

import json

import numpy as np
import pytest
from fixtures.evaluation import run_local

from loomvideo.pipelines.evaluation import media, store
from loomvideo.pipelines.evaluation.aggregate import aggregate_suite, sample_values
from loomvideo.pipelines.evaluation.generators import BlendGenerator, sample_seed
from loomvideo.pipelines.evaluation.inputs import InputOptions
from loomvideo.pipelines.evaluation.judge_stage import JudgeStage
from loomvideo.pipelines.evaluation.judges.fake import FakeJudgeServer, PixelJudge
from loomvideo.pipelines.evaluation.judges.rubrics import official_rubrics, own_rubrics
from loomvideo.pipelines.evaluation.judges.session import JudgeSession
from loomvideo.pipelines.evaluation.stages import (
    GenerateStage,
    MeasureStage,
    NormaliseStage,
    PrepareStage,
    check_rows,
    initial_rows,
)
from loomvideo.pipelines.evaluation.suites import official, own
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.sources.samples import Sample, write_jsonl
from loomvideo.pipelines.vlm.clients import OpenAIClient
from loomvideo.pipelines.vlm.requests import FrameSampling
from loomvideo.pipelines.vlm.session import AnswerCache, Session
from loomvideo.platform.errors import UserError

OPTIONS = InputOptions(bucket_classes=(64,), reference_classes=(64,), num_frames=5, text_size=(64, 64))


def moving_square(colour, frames=9, size=64):
    y, x = np.mgrid[0:size, 0:size]
    video = np.stack([np.stack([x * 2, y * 2, (x + y) // 2 + 3 * i], -1) for i in range(frames)]).astype(np.uint8)
    for i in range(frames):
        video[i, 20:44, 10 + i : 34 + i] = colour
    return video


@pytest.fixture
def dataset(tmp_path):
    """Held-out edits of three sources, a picture edit and a text-to-video sample."""
    folder = tmp_path / "data"
    samples = []
    for n in range(3):
        write_video(folder / f"s{n}.mp4", moving_square((200, 40 * n, 40)), 24)
        for m, colour in enumerate([(20, 200, 30), (30, 30, 220)]):
            key = f"edit-{n}-{m}"
            write_video(folder / f"{key}.mp4", moving_square(colour), 24)
            edit = {"edit": {"kind": "recolour"}}
            samples.append(
                Sample(key, "video_edit", "fashion-world", f"{key}.mp4", f"s{n}.mp4", instruction=f"make it {m}",
                       group=f"g{n}", split="heldout", extra=edit)
            )  # fmt: skip
    media.save_png(media.thumbnail(moving_square((9, 9, 200))[:1], 64), folder / "p.png")
    samples.append(
        Sample("pic", "image_edit", "x", "p.png", "p.png", instruction="keep", group="gp", split="heldout")
    )  # fmt: skip
    samples.append(Sample("text", "t2v", "x", "s0.mp4", caption="a red square", group="gt", split="heldout"))
    samples.append(Sample("seen", "t2v", "x", "s0.mp4", caption="a red square", split="train"))
    write_jsonl(samples, folder / "samples.jsonl")
    return folder


class Counting:
    """A generator that counts, and may break after a number of samples."""

    def __init__(self, generator, break_after=10**9):
        self.generator, self.break_after, self.calls = generator, break_after, 0

    @property
    def fingerprint(self):
        return self.generator.fingerprint

    def generate(self, item, seed, use_source=True):
        if self.calls == self.break_after:
            raise KeyboardInterrupt
        self.calls += 1
        return self.generator.generate(item, seed, use_source)


def run(tmp_path, dataset, generator, client=None, series=("model", "identity"), suite=own.sample, **judge_options):
    disk = store.Store(tmp_path / "store")
    manifest = suite(dataset)
    rows = initial_rows(manifest, series, lambda s, k: sample_seed(0, s, k))
    judge = None
    if client is not None:
        session = JudgeSession(Session(client, AnswerCache(tmp_path / "answers"), sleep=lambda s: None, max_attempts=2))
        judge = JudgeStage(disk, session, FrameSampling(2, 64), own_rubrics(), threads=2, **judge_options)
    stages = [
        PrepareStage(disk, OPTIONS),
        GenerateStage(disk, lambda: generator, generator.fingerprint),
        NormaliseStage(disk),
        MeasureStage(disk),
    ]
    return list(run_local(rows, stages, judge)), disk


def test_lossless_store_keeps_every_pixel(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 18, 22, 3)).astype(np.uint8)
    store.write_lossless(tmp_path / "v.mkv", video, 24)
    assert np.array_equal(store.read_lossless(tmp_path / "v.mkv"), video)


def test_an_entry_appears_whole_or_not_at_all(tmp_path):
    disk = store.Store(tmp_path)

    def broken(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.make("results", "abcd", broken)
    assert disk.record("results", "abcd") is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert disk.make("results", "abcd", lambda folder: {"n": 1}) == {"n": 1}
    assert disk.make("results", "abcd", broken) == {"n": 1}


def test_rows_have_metrics_media_judgements_and_identity(tmp_path, dataset):
    rows, disk = run(tmp_path, dataset, BlendGenerator(0.8, 2.0), PixelJudge())
    assert len(rows) == 8 + 7
    by_key = {(r["series"], r["key"]): r for r in rows}
    edit, copy = by_key["model", "edit-0-0"], by_key["identity", "edit-0-0"]
    assert edit["metrics"]["gain_psnr_db"] > 5
    assert copy["metrics"]["gain_psnr_db"] == 0
    assert copy["metrics"]["edit_strength"] == 0
    assert copy["defects"] == ["source copied"]
    assert edit["metrics"]["garment_delta_e"] < copy["metrics"]["garment_delta_e"]
    assert edit["metrics"]["outside_psnr_db"] > edit["metrics"]["source_psnr_db"]
    assert edit["judgements"][0]["parsed"]["scores"].keys() == {"instruction", "preservation", "quality", "motion"}
    assert copy["judgements"] == []
    assert "edit_strength" not in by_key["model", "text"]["metrics"]
    assert "flicker" not in by_key["model", "pic"]["metrics"]
    for name in ("video.mp4", "strip.png", "thumb.png"):
        assert (disk.entry("media", edit["media"]) / name).stat().st_size > 200
    assert edit["seed"] != by_key["model", "edit-0-1"]["seed"]
    assert json.loads(json.dumps(rows)) == rows


def test_a_killed_run_resumes_without_repeating_anything(tmp_path, dataset):
    with FakeJudgeServer().running() as server:
        client = OpenAIClient(f"{server.base_url}/v1", "judge")
        first = Counting(BlendGenerator(), break_after=4)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, dataset, first, client)
        judged_before = len(server.calls)
        assert judged_before == 4
        second = Counting(BlendGenerator())
        rows, _ = run(tmp_path, dataset, second, client)
        assert second.calls == 8 - 4
        assert len(server.calls) == 8
        third = Counting(BlendGenerator())
        again, _ = run(tmp_path, dataset, third, client)
        assert third.calls == 0
        assert len(server.calls) == 8
    assert all(j["cached"] for row in again for j in row["judgements"])
    assert [r["metrics"] for r in again] == [r["metrics"] for r in rows]


def test_another_model_or_seed_is_made_anew(tmp_path, dataset):
    run(tmp_path, dataset, BlendGenerator(0.5))
    other = Counting(BlendGenerator(0.6))
    run(tmp_path, dataset, other)
    assert other.calls == 8


def test_failures_are_counted_by_reason_both_ways(tmp_path, dataset):
    (dataset / "s1.mp4").write_bytes(b"not a video")
    behaviour = lambda call: "refuse" if call % 3 == 0 else "ok"  # noqa: E731
    with FakeJudgeServer(behaviour, score=4).running() as server:
        client = OpenAIClient(f"{server.base_url}/v1", "judge")
        rows, _ = run(tmp_path, dataset, BlendGenerator(), client)
    result = aggregate_suite("sample", rows)
    assert result.failures["unreadable input"] == 2
    blocked = result.failures["judge: blocked"]
    assert blocked == 2
    assert result.coverage == pytest.approx(1 - 4 / 8)
    assert result.status == "partial"
    figures = {f.name: f for f in result.figures}
    assert figures["sample/judge"].value == 4
    assert figures["sample/judge"].num_failed == 4
    worst = figures["sample/judge_worst"]
    # Every planned sample counts, also the two that could not be read.
    assert (worst.value, worst.num_valid) == (pytest.approx((4 * 4 + 1 * 4) / 8), 8)


def test_no_success_at_all_is_an_error(tmp_path, dataset):
    for path in dataset.glob("*.*4"):
        path.write_bytes(b"not a video")
    (dataset / "p.png").write_bytes(b"not a picture")
    rows, _ = run(tmp_path, dataset, BlendGenerator())
    with pytest.raises(UserError, match="no sample succeeded"):
        check_rows(rows)


def test_aggregate_names_intervals_and_categories(tmp_path, dataset):
    rows, _ = run(tmp_path, dataset, BlendGenerator(), PixelJudge(), repeats=3)
    result = aggregate_suite("sample", rows)
    figures = {f.name: f for f in result.figures}
    assert {"sample/gain_psnr_db/image_edit", "sample/judge", "sample/judge_macro"} <= set(figures)
    gain = figures["sample/gain_psnr_db/video_edit"]
    assert gain.low <= gain.value <= gain.high
    assert gain.num_valid == 6
    assert result.reliability.num_repeats == 3
    identity = {f.name: f for f in result.identity}
    assert identity["sample/gain_psnr_db"].value == 0
    assert result.official == {}
    values = sample_values(rows[0])
    assert values["judge"] == pytest.approx(np.mean([j["parsed"]["sample"] for j in rows[0]["judgements"]]))


def test_official_and_loomvideo_modes_go_through_the_whole_path(tmp_path):
    folder = tmp_path / "OpenVE-Bench"
    header, lines = "edited_type,prompt,original_video", []
    for n, kind in enumerate(("local_change", "local_change", "global_style")):
        write_video(folder / f"videos/{n}.mp4", moving_square((200, 40 * n, 40)), 24)
        lines.append(f"{kind},make it red,videos/{n}.mp4")
    (folder / "benchmark_videos.csv").write_text("\n".join([header, *lines]))
    rubric = "Grade the two videos from 1 to 5 on three axes. Instruction: <edit_prompt>. " * 2
    (folder / "rubrics.py").write_text(f"Local_Change = {rubric!r}\nGlobal_Style = {rubric!r}\n")
    texts = []

    class Recording(PixelJudge):
        def complete(self, request):
            texts.append(request.text)
            return super().complete(request)

    judge = {"mode": "official", "official": {"openve": official_rubrics(folder / "rubrics.py")}}
    made, _ = run(tmp_path, folder, BlendGenerator(), Recording(), suite=official.openve, **judge)
    assert len(texts) == 3
    assert all("Instruction: make it red." in text for text in texts)
    result = aggregate_suite("openve", made, "official")
    replies = [row["judgements"][0]["reply"] for row in made if row["series"] == "model"]
    numbers = [[float(line.split(": ")[1]) for line in reply.splitlines()] for reply in replies]
    samples = [round(sum(found) / 3, 2) for found in numbers]
    assert result.official["overall_average"] == round(sum(samples) / 3, 2)
    assert result.official["local_change"] == round(sum(samples[:2]) / 2, 2)
    with pytest.raises(UserError, match=r"set judge\.official_rubrics\.openve"):
        run(tmp_path, folder, BlendGenerator(), Recording(), suite=official.openve, mode="loomvideo")


def test_a_checklist_is_judged_in_shares_and_its_failures_count_nothing(tmp_path, dataset):
    made, _ = run(
        tmp_path,
        dataset,
        BlendGenerator(),
        PixelJudge(noise=0),
        suite=own.fashion,
        mode="checklist",
        judge_identity=True,
    )
    by_series = {row["series"]: sample_values(row) for row in made if row["key"] == "edit-0-0"}
    assert by_series["model"]["checklist"] * 13 == pytest.approx(round(by_series["model"]["checklist"] * 13))
    assert by_series["model"]["checklist/done"] > by_series["identity"]["checklist/done"] == 0
    assert by_series["model"]["checklist/preserved"] == 1
    assert "judge" not in by_series["model"]
    result = aggregate_suite("fashion", made, "checklist")
    assert set(result.official) == {"all", "done", "plausible", "preserved"}
    failed = {"judged": "checklist", "judgements": [], "metrics": {}}
    assert sample_values(failed) == {"checklist_worst": 0.0}


def test_fashion_suite_takes_categories_from_the_kind_of_edit(tmp_path, dataset):
    manifest = own.fashion(dataset)
    assert manifest.counts() == {"garment_text": 6}
    assert "model_swap: no samples" in manifest.problems
    rows, _ = run(tmp_path, dataset, BlendGenerator(), PixelJudge(), suite=own.fashion)
    scores = rows[0]["judgements"][0]["parsed"]["scores"]
    assert "garment_color" in scores


@pytest.mark.slow
def test_the_graph_on_ray_gives_the_same_rows(tmp_path, dataset, ray_cluster):
    from loomvideo.pipelines.evaluation.graph import Resources, run_graph

    local, _ = run(tmp_path / "a", dataset, BlendGenerator(), PixelJudge())
    disk = store.Store(tmp_path / "b" / "store")
    rows = initial_rows(own.sample(dataset), ("model", "identity"), lambda s, k: sample_seed(0, s, k))
    answers = tmp_path / "b" / "answers"

    def judge():
        session = JudgeSession(Session(PixelJudge(), AnswerCache(answers)))
        return JudgeStage(disk, session, FrameSampling(2, 64), own_rubrics(), threads=2)

    made = run_graph(
        rows, PrepareStage(disk, OPTIONS), lambda: GenerateStage(disk, BlendGenerator, BlendGenerator().fingerprint),
        NormaliseStage(disk), MeasureStage(disk), judge, Resources(generator_cpus=0.5, measurers=1, measurer_cpus=0.5),
    )  # fmt: skip
    keep = ("suite", "key", "series", "result", "metrics", "defects", "judgements")
    by_key = {(r["series"], r["key"]): {k: r[k] for k in keep} for r in made}
    assert by_key == {(r["series"], r["key"]): {k: r[k] for k in keep} for r in local}
