"""Compare what a prepare writes with other numbers of encoders and decoders, on real Ray.

    python benchmarks/equal_prepare.py data/sample/samples.jsonl --samples 24

Every number of encoders (builders) with every number of decoders, a builder's own counted: SHA-256 of all shards, the
index and the manifest must be equal. A builder's own decoder waits before every sample, so that those in actors take
part as soon as they run; how many samples each process decoded is printed.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kill_prepare import checksums, subset

from loomvideo.pipelines.prepare import job
from loomvideo.pipelines.prepare.builder import ShardBuilder
from loomvideo.pipelines.prepare.load import SampleLoader
from loomvideo.pipelines.prepare.pools import map_on_actors
from loomvideo.platform.ray_session import start_local


class NotedLoader(SampleLoader):
    """Writes down which process loads."""

    wait_s = 0.0

    def __init__(self, config, base, encoders):
        super().__init__(config, base, encoders)
        self._log = Path(config.output).with_suffix(".loaded")

    def load(self, sample, previous=None):
        """Load it, after a while."""
        time.sleep(self.wait_s)
        with self._log.open("a") as out:
            out.write(f"{os.getpid()}\n")
        return super().load(sample, previous)


class WaitingBuilder(ShardBuilder):
    """The builder, its own decoder held up where there are others."""

    def __init__(self, config, wait_s):
        super().__init__(config, loader=NotedLoader)
        self.loader.wait_s = wait_s if config.workers.decoders else 0.0


def prepared(samples, output, builders, decoders, wait_s):
    """Prepare once; returns checksums and the samples that each process decoded."""
    from loomvideo.jobs.command import job_config
    from loomvideo.pipelines.prepare.config import PrepareConfig

    config = job_config(PrepareConfig, "data-prepare", [
        "preset=tiny", f"input={samples}", f"output={output}", "shards.max_samples=4", f"workers.count={builders}",
        "workers.cpus=1", f"workers.decoders={decoders - 1}", "workers.decoder_cpus=0",
    ])  # fmt: skip

    def run(stage, config, work):
        yield from map_on_actors(WaitingBuilder, (config, wait_s), work, stage.pool(config))

    original, job.run_stage = job.run_stage, run
    try:
        job.prepare(config)
    finally:
        job.run_stage = original
    return checksums(output), Counter(Path(output).with_suffix(".loaded").read_text().split())


def main():
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples_file", type=Path)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--builders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decoders", type=int, nargs="+", default=[1, 2, 3], help="of each builder")
    parser.add_argument("--wait", type=float, default=4.0, help="seconds before a sample of a builder's own decoder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="equal-prepare-"))
    samples = subset(arguments.samples_file, folder, arguments.samples)
    start_local(max(arguments.builders), log_to_driver=False)
    expected, different = None, 0
    for builders, decoders in itertools.product(arguments.builders, arguments.decoders):
        found, loaded = prepared(samples, folder / f"{builders}-{decoders}", builders, decoders, arguments.wait)
        expected = expected or found
        different += found != expected
        print(f"builders {builders}  decoders {decoders}  files {len(found)}  equal {found == expected}  "
              f"samples decoded by each process {sorted(loaded.values())}", flush=True)  # fmt: skip
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
