"""A suite in this process with a model that is loaded already, for figures beside and after training.

The same manifest, windows, metrics and means as a run of ``loomvideo evaluate``; results stay in memory, and there is
no judge.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np

from loomvideo.pipelines.evaluation import measures
from loomvideo.pipelines.evaluation.aggregate import SuiteResult, aggregate_suite
from loomvideo.pipelines.evaluation.controls import CONTROLS, NO_SOURCE, merge_controls
from loomvideo.pipelines.evaluation.generators import SampleGenerator
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem, load_item
from loomvideo.pipelines.evaluation.rows import MODEL, Row, item_of
from loomvideo.pipelines.evaluation.stages import check_rows, initial_rows
from loomvideo.pipelines.evaluation.suites.items import SuiteManifest
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.platform.errors import UserError

OnResults = Callable[[LoadedItem, dict[str, np.ndarray], Row], None]


def evaluate_in_process(
    manifest: SuiteManifest,
    generator: SampleGenerator,
    options: InputOptions,
    seed_of: Callable[[str, str], int],
    on_results: OnResults,
    series: Sequence[str] = (MODEL, *CONTROLS),
) -> tuple[SuiteResult, list[Row]]:
    """Generate, measure and aggregate.

    Args:
        manifest: The suite.
        generator: The loaded model.
        options: Sizes of what is generated.
        seed_of: Seed of a sample, from suite and key.
        on_results: Called for each sample with its media, its results by series, and the model's row.
        series: What is generated for each sample.

    Returns:
        The suite's figures, and a row a sample with the controls' figures among its metrics.

    Raises:
        UserError: if no sample succeeds.
    """
    finished: list[Row] = []
    for _, rows in groupby(initial_rows(manifest, series, seed_of), key=lambda row: row["key"]):
        finished += _sample(list(rows), manifest, generator, options, on_results)
    check_rows(finished)
    merged = merge_controls(finished)
    return aggregate_suite(manifest.suite, merged, judged=False), merged


def _sample(
    rows: list[Row], manifest: SuiteManifest, generator: SampleGenerator, options: InputOptions, on_results: OnResults
) -> Iterable[Row]:
    try:
        loaded = load_item(item_of(rows[0]), manifest.root, options)
    except (DecodeError, UserError) as error:
        return [{**row, "failure": "unreadable input", "detail": str(error)} for row in rows]
    done, results = [], {}
    for row in rows:
        inputs = loaded.with_item(item_of(row))
        try:
            video = generator.generate(inputs, row["seed"], use_source=row["series"] != NO_SOURCE)
        except (RuntimeError, ValueError) as error:
            done.append({**row, "failure": "generation failed", "detail": f"{type(error).__name__}: {error}"[:500]})
            continue
        results[row["series"]] = video
        if row["series"] in CONTROLS:
            done.append({**row, "metrics": measures.measure_control(video, inputs), "defects": []})
        else:
            values, faults = measures.measure_checked(video, inputs)
            done.append({**row, "metrics": values, "defects": faults})
    if MODEL in results:
        on_results(loaded, results, next(row for row in merge_controls(done) if row["series"] == MODEL))
    return done
