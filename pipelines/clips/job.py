"""The job that cuts films: which parts of which films are wanted, what is done already, and the sample file at the end.

A film is a unit of work, read once by one worker whatever the number of samples that name parts of it. Its result is
one file, named after all that it depends on; clips are named after their content. So a killed run goes on, a second one
does nothing, and parts that are added later cost one more reading of their films alone.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from loomvideo.pipelines.clips.config import CutConfig
from loomvideo.pipelines.clips.cutter import CUT_VERSION, CutClip, Part
from loomvideo.pipelines.clips.worker import FilmProcess
from loomvideo.pipelines.media.files import media_stamp
from loomvideo.pipelines.media.fragments import Fragment, split_fragment
from loomvideo.pipelines.media.media_info import DecodeError
from loomvideo.pipelines.prepare.curation.shots import build_detector
from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.base import is_video
from loomvideo.pipelines.sources.samples import Sample, media_paths
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute
from loomvideo.platform.shards.commits import Commit, commits, read_all
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage, patiently

CUT_FOLDER = "work/cut"
CLIP_FOLDER = "clips"
SAMPLES_FILE = "samples.jsonl"
LEDGER_FILE = "cut.parquet"
LEDGER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "dataset", "status", "path", "detail")] + [("written", pa.bool_())]
)
_LEDGER_ROWS = 16_384
# By film and part: the clip, or why there is none and the same for a person.
Made: TypeAlias = dict[str, dict[str, tuple[str, str, str]]]


class FilmRow(TypedDict):
    """What a worker is told: a film, its parts, and results of earlier runs.

    Attributes:
        unit: Name of the unit.
        recipe: What the result depends on.
        basis: The same without the parts.
        film: The path of the film.
        parts: Names of its parts.
        shots: Whether it is cut at its shots.
        before: File names of earlier results.
    """

    unit: str
    recipe: str
    basis: str
    film: str
    parts: list[str]
    shots: bool
    before: list[str]


class FilmReport(TypedDict):
    """What came of a film.

    Attributes:
        film: Its path.
        clips: Clips by ``copied``, ``encoded``, ``picture`` and ``kept``.
        lost: Parts without a clip.
        num_frames: Frames that were read.
        num_read: Bytes that were read of the film.
    """

    film: str
    clips: dict[str, int | None]
    lost: int
    num_frames: int
    num_read: int


@dataclasses.dataclass
class CutResult:
    """What a run did.

    Attributes:
        films: Films that were read.
        films_before: Films whose clips were there.
        counts: Inputs and samples by what came of them.
        clips: Clips by how they were made.
        num_read: Bytes that were read of films.
    """

    films: int
    films_before: int
    counts: Counter[str]
    clips: Counter[str]
    num_read: int


def split_time(path: str) -> tuple[str, str, str]:
    """A media path as file, name of the part of its time, and what is left of the fragment (a crop)."""
    file, fragment = split_fragment(path)
    if fragment is None:
        return path, "", ""
    box = Fragment(box=fragment.box, box_unit=fragment.box_unit, side=fragment.side)
    time = dataclasses.replace(fragment, box=None, box_unit=Fragment().box_unit, side=Fragment().side)
    return file, str(time), str(box)


class FilmCutter:
    """Cuts one film after another; a Ray actor."""

    def __init__(self, config: CutConfig):
        self.storage = Storage(config.output)
        self._process = FilmProcess(config.options, config.workers.piece_timeout_s)

    def __call__(self, row: FilmRow) -> FilmReport:
        """Cut a film and commit the result."""
        known: dict[str, Any] = {}
        for file in row["before"]:
            earlier = json.loads(self.storage.read_bytes(f"{CUT_FOLDER}/{file}"))
            if earlier["basis"] == row["basis"] and not row["shots"]:
                known |= {clip["part"]: clip for clip in earlier["clips"] if clip["file"]}
        wanted = [name for name in row["parts"] if name not in known]
        made, how, reading = self._cut(row, wanted)
        clips = [known[name] for name in row["parts"] if name in known] + made
        commit = Commit(row["unit"], row["recipe"], 0, "json")
        result = {"film": row["film"], "basis": row["basis"], "clips": clips}
        self.storage.write_bytes(f"{CUT_FOLDER}/{commit.file}", json.dumps(result, sort_keys=True).encode())
        for file in row["before"]:
            if file != commit.file:
                self.storage.delete(f"{CUT_FOLDER}/{file}")
        lost = sum(1 for clip in clips if not clip["file"])
        how["kept"] += len(clips) - len(made)
        return FilmReport(film=row["film"], clips={**how}, lost=lost, num_frames=reading[0], num_read=reading[1])

    def _cut(self, row: FilmRow, wanted: list[str]) -> tuple[list[dict[str, Any]], Counter[str], tuple[int, int]]:
        parts = [Part(name, split_fragment(f"x#{name}")[1]) for name in wanted]
        made: dict[str, dict[str, Any]] = {}
        how: Counter[str] = Counter()
        reading = (0, 0)
        if not parts and not row["shots"]:
            return [], how, reading
        fault: DecodeError | None = None
        with tempfile.TemporaryDirectory(prefix="loomvideo-cut-") as folder:
            try:
                for clip, seen in self._process.cut(row["film"], parts, row["shots"], Path(folder)):
                    reading = (seen.num_frames, seen.num_bytes)
                    if clip is None:
                        made, how = {}, Counter()
                    elif clip.part:
                        made[clip.part] = self._published(clip)
                        how[clip.how] += bool(clip.how)
            except DecodeError as error:
                fault = error
        if fault is not None:
            # What was cut before the fault is whole.
            for name in [name for name in wanted if name not in made]:
                made[name] = dataclasses.asdict(CutClip(name, reason=fault.reason, message=str(fault)))
            if row["shots"]:
                made[""] = dataclasses.asdict(CutClip("", reason=fault.reason, message=str(fault)))
        return list(made.values()), how, reading

    def _published(self, clip: CutClip) -> dict[str, Any]:
        values = dataclasses.asdict(clip)
        if clip.file:
            local = Path(clip.file)
            values["file"] = f"{CLIP_FOLDER}/{clip.sha256[:2]}/{clip.sha256}{local.suffix}"
            if self.storage.size(values["file"]) != clip.num_bytes:
                with self.storage.staged(values["file"]) as staged:
                    staged.write_bytes(local.read_bytes())
            local.unlink()
        return values

    def close(self) -> None:
        """End the process that cuts."""
        self._process.close()


def cut(
    config: CutConfig,
    session: Callable[[], Any] = contextlib.nullcontext,
    on_progress: Callable[[FilmReport, int], None] = lambda report, total: None,
) -> CutResult:
    """Cut the films of a dataset, and write a sample file of what they became.

    Args:
        config: The job.
        session: Makes a context in which Ray is up; entered only when there is work.
        on_progress: Called with a film's report and the number of films.

    Raises:
        UserError: for bad input or configuration, or when nothing is left.
    """
    config.check()
    if config.shots.detector != "off":
        build_detector(config.shots)
    storage = Storage(config.output)
    rows = planned(config, storage)
    stale = _stale(storage, rows)
    clips: Counter[str] = Counter()
    num_read = 0
    if stale:
        located = dataclasses.replace(config, input=absolute(config.input), output=absolute(config.output))
        pool = Pool(config.workers.count, config.workers.cpus)
        with session():
            for report in map_on_actors(FilmCutter, (located,), stale, pool):
                clips.update({name: count for name, count in report["clips"].items() if count})
                clips["lost"] += report["lost"]
                num_read += report["num_read"]
                on_progress(report, len(stale))
    counts = _write(config, storage, rows)
    return CutResult(len(stale), len(rows) - len(stale), counts, clips, num_read)


def planned(config: CutConfig, storage: Storage) -> list[FilmRow]:
    """The films of an input with the parts that samples name, in the order of their paths."""
    films: dict[str, set[str]] = {}
    for sample in _samples(config):
        for path in media_paths(sample):
            file, part, _ = split_time(path)
            if part:
                films.setdefault(file, set()).add(part)
            elif _is_cut_at_shots(sample, config):
                films.setdefault(file, set()).add("")
    found = commits(storage, CUT_FOLDER)
    rows = []
    for film, parts in sorted(films.items()):
        shots = "" in parts
        names = sorted(parts - {""})
        basis = digest(CUT_VERSION, film, _stamp(film), config.height, config.crf, *([config.shots] if shots else ()))
        unit = f"film-{digest(film)}"
        recipe = digest(basis, *names)
        before = [commit.file for commit in found.get(unit, ())]
        rows.append(FilmRow(unit=unit, recipe=recipe, basis=basis, film=film, parts=names, shots=shots, before=before))
    return rows


def _is_cut_at_shots(sample: Sample, config: CutConfig) -> bool:
    # Pairs would fall out of step, and references belong to the whole clip.
    return config.shots.detector != "off" and sample.task == "t2v" and not sample.source and is_video(sample.target)


def extracted_to(config: CutConfig) -> str:
    """Where media out of tables go: workers on other nodes reach them too."""
    return f"{absolute(config.output)}/extracted"


def _samples(config: CutConfig) -> Iterator[Sample]:
    for found in open_source(config.input, config.format, extracted_to(config), **config.source_options):
        sample = found.unfinished if isinstance(found, Rejected) else found
        if sample is not None:
            yield sample


def _stamp(path: str) -> object:
    """What tells a film from one written anew under its name; None where nothing is there."""
    if "://" not in path:
        return media_stamp(path)
    fs, remote = fsspec.url_to_fs(path)
    try:
        info = patiently(path, fs.info, remote)
    except FileNotFoundError:
        return None
    return [str(info.get(name)) for name in ("size", "mtime", "ETag", "etag", "LastModified", "updated")]


def _stale(storage: Storage, rows: list[FilmRow]) -> list[FilmRow]:
    """Films without a result that holds, or whose faults may pass, or whose clips are gone."""
    stale, known = [], []
    for row in rows:
        (known if _result(row) in row["before"] else stale).append(row)
    sizes = functools.cache(lambda folder: storage.sizes(folder))
    for row, data in zip(known, read_all(storage, CUT_FOLDER, map(_result, known)), strict=True):
        clips = json.loads(data)["clips"]
        there = (sizes(folder).get(name) for folder, _, name in (clip["file"].rpartition("/") for clip in clips))
        holds = (
            size == clip["num_bytes"] if clip["file"] else clip["reason"] not in _MAY_PASS
            for clip, size in zip(clips, there, strict=True)
        )
        if not all(holds):
            stale.append(row)
    return stale


def _result(row: FilmRow) -> str:
    return Commit(row["unit"], row["recipe"], 0, "json").file


_MAY_PASS = ("missing_file", "timeout", "decoder_crash", "download_failed", "decoder_error")


def _write(config: CutConfig, storage: Storage, rows: list[FilmRow]) -> Counter[str]:
    """The sample file, and the ledger with a row for every input."""
    made: Made = {}
    for row, data in zip(rows, read_all(storage, CUT_FOLDER, map(_result, rows)), strict=True):
        clips = json.loads(data)["clips"]
        made[row["film"]] = {clip["part"]: (clip["file"], clip["reason"], clip["message"]) for clip in clips}
    counts: Counter[str] = Counter()
    ledger: list[tuple] = []
    with (
        storage.staged(SAMPLES_FILE) as samples_path,
        storage.staged(LEDGER_FILE) as ledger_path,
        samples_path.open("w", encoding="utf-8") as out,
        pq.ParquetWriter(ledger_path, LEDGER_SCHEMA, compression="zstd") as ledger_out,
    ):

        def note(*row: object) -> None:
            ledger.append(row)
            if len(ledger) == _LEDGER_ROWS:
                flush()

        def flush() -> None:
            columns = list(zip(*ledger, strict=True)) or [[] for _ in LEDGER_SCHEMA]
            ledger_out.write_table(pa.table([pa.array(c) for c in columns], schema=LEDGER_SCHEMA))
            ledger.clear()

        for found in open_source(config.input, config.format, extracted_to(config), **config.source_options):
            counts["inputs"] += 1
            sample = found.unfinished if isinstance(found, Rejected) and found.unfinished is not None else found
            if isinstance(sample, Rejected):
                counts[sample.reason] += 1
                note(sample.where, sample.dataset, sample.reason, "", sample.detail, False)
                continue
            finished, reason, detail = _cut_sample(sample, made, config)
            for one in finished:
                out.write(one.to_json() + "\n")
            status = reason or ("cut" if any(one.extra.get("cut_from") for one in finished) else "whole")
            counts[status] += 1
            counts["samples"] += len(finished)
            note(sample.key, sample.dataset, status, sample.target, detail, bool(finished))
        flush()
        if not counts["samples"]:
            raise UserError(f"input={config.input}: no sample is left of {counts['inputs']} inputs; {dict(counts)}")
    return counts


def _cut_sample(sample: Sample, made: Made, config: CutConfig) -> tuple[list[Sample], str, str]:
    """The samples that one became, or why it became none."""
    cut_from = [path for path in media_paths(sample) if split_time(path)[1]]
    paths: dict[str, str] = {}
    for path in media_paths(sample):
        file, part, box = split_time(path)
        if part:
            clip, reason, message = made[file][part]
            if not clip:
                return [], reason, message
            file = clip
        paths[path] = f"{file}#{box}" if box else file
    extra = sample.extra
    if cut_from:
        # Who asks for the film to be taken down asks by its name.
        extra = {"source_id": split_time(cut_from[0])[0]} | extra | {"cut_from": cut_from}
    replaced = dataclasses.replace(
        sample,
        target=paths[sample.target],
        source=sample.source and paths[sample.source],
        references=[paths[path] for path in sample.references],
        extra=extra,
    )
    if not split_time(sample.target)[1] and _is_cut_at_shots(sample, config):
        return _shots(replaced, made[split_time(sample.target)[0]])
    return [replaced], "", ""


def _shots(sample: Sample, clips: dict[str, tuple[str, str, str]]) -> tuple[list[Sample], str, str]:
    file, _, box = split_time(sample.target)
    shots = sorted((int(name[7:].partition(",")[0]), name) for name in clips if name.startswith("frames="))
    lost = [(reason, message) for clip, reason, message in clips.values() if not clip]
    finished = [
        dataclasses.replace(
            sample,
            key=f"{sample.key}-shot{number:03d}",
            target=f"{clips[name][0]}#{box}" if box else clips[name][0],
            group=sample.group or sample.key,
            extra={"source_id": file} | sample.extra | {"cut_from": [f"{file}#{name}"]},
        )
        for number, (_, name) in enumerate(shots)
        if clips[name][0]
    ]
    reason = "" if finished else lost[0][0] if lost else "no_shot"
    return finished, reason, "; ".join(message for _, message in lost)
