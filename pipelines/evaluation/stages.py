"""The stages of an evaluation: prepare -> generate -> normalise -> measure -> judge, each resumable per sample.

A stage is a callable from row to row. Rows are small and JSON-able; media live in the store under content keys, so a
stage that finds its entry returns at once, on any machine and after any crash. A sample that cannot be processed
carries ``failure`` onward and is counted, never dropped.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation import measures
from loomvideo.pipelines.evaluation.controls import CONTROLS, NO_SOURCE, WRONG_INSTRUCTION, other_instruction
from loomvideo.pipelines.evaluation.distances import FEATURES_FILE
from loomvideo.pipelines.evaluation.generators import IdentityGenerator, SampleGenerator
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.learned import LearnedMetric
from loomvideo.pipelines.evaluation.media import save_png, stacked_filmstrips, thumbnail
from loomvideo.pipelines.evaluation.rows import IDENTITY, MODEL, InputsRecord, Row, item_of
from loomvideo.pipelines.evaluation.store import Store, content_key, pixel_digest, read_lossless, write_lossless
from loomvideo.pipelines.evaluation.suites.items import SuiteManifest, file_digest
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.platform.errors import DiskFullError, UserError

VIDEO, FILM, STRIP, THUMB = "video.mkv", "video.mp4", "strip.png", "thumb.png"


def initial_rows(manifest: SuiteManifest, series: Sequence[str], seed_of: Callable[[str, str], int]) -> list[Row]:
    """One row a sample and series: the model under test, the source copied, controls of edits."""
    rows: list[Row] = []
    for index, item in enumerate(manifest.items):
        for name in series:
            if name != MODEL and not item.source:
                continue
            shown = item
            if name == WRONG_INSTRUCTION:
                shown = dataclasses.replace(item, text=other_instruction(manifest.items, index))
            rows.append(
                {
                    "suite": manifest.suite,
                    "key": item.key,
                    "series": name,
                    "item": json.loads(shown.to_json()),
                    "root": str(manifest.root.absolute()),
                    "seed": seed_of(manifest.suite, item.key),
                    "failure": "",
                }
            )
    return rows


@dataclass
class PrepareStage:
    """Decode, trim and resize the item's media once, and keep exact pixels and playable films of them."""

    store: Store
    options: InputOptions

    def __call__(self, row: Row) -> Row:
        """Add ``inputs``, the key of the prepared media."""
        if row["failure"]:
            return row
        item, root = item_of(row), Path(row["root"])
        try:
            digests = [file_digest(root / path) for path in item.media()]
        except OSError as error:
            return {**row, "failure": "missing file", "detail": str(error)}
        # The text is no part of the media's key, so two instructions for one source share the prepared files.
        names = [item.task, bool(item.source), len(item.references), bool(item.target), bool(item.mask)]
        key = content_key("inputs-2", names, digests, dataclasses.asdict(self.options))

        def fill(folder: Path) -> dict[str, Any]:
            loaded = load_item(item, root, self.options)
            for name, video in (("source", loaded.source), ("target", loaded.target)):
                if video is not None:
                    write_lossless(folder / f"{name}.mkv", video, loaded.fps)
                    write_video(folder / f"{name}.mp4", video, loaded.fps)
                    save_png(thumbnail(video), folder / f"{name}.png")
            for number, picture in enumerate(loaded.references):
                write_lossless(folder / f"reference{number}.mkv", picture[None], loaded.fps)
                save_png(thumbnail(picture[None], 256), folder / f"reference{number}.png")
            if loaded.mask is not None:
                np.save(folder / "mask.npy", np.packbits(loaded.mask, axis=-1))
            return {
                "size": loaded.size,
                "num_frames": loaded.num_frames,
                "fps": loaded.fps,
                "frame_indices": loaded.frame_indices,
                "references": len(loaded.references),
                "has": [n for n in ("source", "target", "mask") if getattr(loaded, n) is not None],
            }

        try:
            self.store.make("inputs", key, fill)
        except DiskFullError:
            raise
        except (DecodeError, UserError) as error:
            return {**row, "failure": "unreadable input", "detail": str(error)}
        return {**row, "inputs": key}


def read_inputs(store: Store, row: Row) -> LoadedItem:
    """The prepared media of a row."""
    folder = store.entry("inputs", row["inputs"])
    record: InputsRecord = store.kept("inputs", row["inputs"])
    width, height = record["size"]
    videos = {name: read_lossless(folder / f"{name}.mkv") for name in record["has"] if name != "mask"}
    mask = None
    if "mask" in record["has"]:
        mask = np.unpackbits(np.load(folder / "mask.npy"), axis=-1)[..., :width].astype(bool)
    references = tuple(read_lossless(folder / f"reference{n}.mkv")[0] for n in range(record["references"]))
    return LoadedItem(
        item_of(row), videos.get("source"), references, videos.get("target"), mask, (width, height),
        record["num_frames"], record["fps"], tuple(record["frame_indices"]),
    )  # fmt: skip


@dataclass
class GenerateStage:
    """Run the model under test; built once an actor.

    Attributes:
        store: Where results are kept.
        build: Makes the generator, on the actor's device.
        fingerprint: The fingerprint of the generator, known without building it so that finished samples load no
            weights.
        on_generated: Called after every new result, for progress and tests.
    """

    store: Store
    build: Callable[[], SampleGenerator]
    fingerprint: str
    on_generated: Callable[[Row], None] | None = None
    _generator: SampleGenerator | None = field(default=None, repr=False)

    def __call__(self, row: Row) -> Row:
        """Add ``result``, the key of the generated video."""
        if row["failure"]:
            return row
        if row["series"] == IDENTITY:
            # The source is kept with the inputs already.
            return {**row, "result": IDENTITY, "generate_s": 0.0}
        item = item_of(row)
        use_source = row["series"] != NO_SOURCE
        left_out = [] if use_source else [NO_SOURCE]
        key = content_key("result-1", row["inputs"], item.task, item.text, self.fingerprint, row["seed"], *left_out)

        def fill(folder: Path) -> dict[str, Any]:
            inputs = read_inputs(self.store, row)
            if self._generator is None:
                self._generator = self.build()
            started = time.monotonic()
            video = self._generator.generate(inputs, row["seed"], use_source=use_source)
            seconds = time.monotonic() - started
            write_lossless(folder / VIDEO, video, inputs.fps)
            record = {
                "seed": row["seed"],
                "generator": self.fingerprint,
                "seconds": seconds,
                "pixels": pixel_digest(video),
            }
            if self.on_generated is not None:
                self.on_generated(row)
            return record

        try:
            record = self.store.make("results", key, fill)
        except DiskFullError:
            raise
        except (RuntimeError, ValueError) as error:
            # A sample that the model cannot make is counted; a model that makes none ends the run in `check_rows`.
            return {**row, "failure": "generation failed", "detail": f"{type(error).__name__}: {error}"[:500]}
        return {**row, "result": key, "generate_s": record["seconds"], "pixels": record["pixels"]}


def read_result(store: Store, row: Row, inputs: LoadedItem) -> np.ndarray:
    """The result of a row: what was generated, or the source itself."""
    if row["series"] == IDENTITY:
        return IdentityGenerator().generate(inputs, 0)
    return read_lossless(store.entry("results", row["result"]) / VIDEO)


@dataclass
class NormaliseStage:
    """Make what people look at: H.264 film, filmstrip over its source, thumbnail."""

    store: Store

    def __call__(self, row: Row) -> Row:
        """Add ``media``, the key of the playable files."""
        if row["failure"] or row["series"] != MODEL:
            return row
        key = content_key("media-1", row["result"], row["inputs"])

        def fill(folder: Path) -> dict[str, Any]:
            inputs = read_inputs(self.store, row)
            video = read_lossless(self.store.entry("results", row["result"]) / VIDEO)
            write_video(folder / FILM, video, inputs.fps)
            strips = {"source": inputs.source, "result": video, "target": inputs.target}
            strip = stacked_filmstrips({k: v for k, v in strips.items() if v is not None}, 5, 96, max_width=900)
            save_png(strip, folder / STRIP)
            save_png(thumbnail(video), folder / THUMB)
            return {"frames": len(video), "height": video.shape[1], "width": video.shape[2]}

        self.store.make("media", key, fill)
        return {**row, "media": key}


@dataclass
class MeasureStage:
    """Judge-free metrics, and learned ones when given."""

    store: Store
    learned: Sequence[LearnedMetric] = ()
    _built: dict[str, measures.ExtraMeasure] = field(default_factory=dict, repr=False)

    def __call__(self, row: Row) -> Row:
        """Add ``metrics``, ``defects`` and, when features were kept, ``features`` with their key."""
        if row["failure"]:
            return row
        names = [[metric.name, metric.weights] for metric in self.learned]
        key = content_key("metrics", measures.VERSION, names, row["result"], row["inputs"], row["item"]["aligned"],
                          row["item"]["extra"].get("garment"), row["series"] in CONTROLS)  # fmt: skip

        def fill(folder: Path) -> dict[str, Any]:
            inputs = read_inputs(self.store, row)
            video = read_result(self.store, row, inputs)
            if row["series"] in CONTROLS:
                return {"metrics": measures.measure_control(video, inputs), "defects": [], "features": ""}
            values, found = measures.measure_checked(video, inputs)
            features: dict[str, np.ndarray] = {}
            for metric in self.learned if measures.comparable(video, inputs) else ():
                if metric.name not in self._built:
                    self._built[metric.name] = metric.build()
                for name, value in self._built[metric.name](video, inputs).items():
                    if isinstance(value, np.ndarray):
                        features[name] = value
                    else:
                        values[name] = None if np.isnan(value) else value
            if features:
                np.savez(folder / FEATURES_FILE, allow_pickle=True, **features)
            return {"metrics": values, "defects": found, "features": key if features else ""}

        record = self.store.make("metrics", key, fill)
        return {
            **row,
            "metrics": record["metrics"],
            "defects": record["defects"],
            "features": record["features"],
            "measured": key,
        }


def check_rows(rows: Sequence[Row]) -> None:
    """End a run in which no sample of the model came through.

    Raises:
        UserError: with the first reason.
    """
    own = [row for row in rows if row["series"] == MODEL]
    failed = [row for row in own if row["failure"]]
    if own and len(failed) == len(own):
        first = failed[0]
        reason = f"{first['failure']}: {first.get('detail', '')}"
        raise UserError(f"evaluation: no sample succeeded; {first['key']}: {reason}")
