"""Traces of chosen steps: ``training.profile_steps=[20,21]`` writes them to the run's ``profile/`` folder."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextlib.contextmanager
def profiled(step: int, steps: Sequence[int], folder: Path, rank: int) -> Iterator[None]:
    """Trace the body on rank 0 if ``step`` is one of ``steps``.

    The trace ``step-00000020.json.gz`` opens in Perfetto or chrome://tracing; ``step-00000020.txt`` lists operations by
    their own time. Other ranks wait for rank 0 in the step's collectives, so a traced step is slower, not different.
    """
    if step not in steps or rank:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, record_shapes=True, profile_memory=True) as trace:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(folder / f"step-{step:08d}.json.gz"))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    (folder / f"step-{step:08d}.txt").write_text(trace.key_averages().table(sort_by=by, row_limit=40) + "\n")
