"""``make bench-gpu`` with tiny sizes on a CPU: every part runs, the table is written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    page, output = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("# Benchmarks\n\n## One GPU: the 5B model\n\nold\n\n## After\n\nkept\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--output", str(output), "--minutes", "20",
         "--parts", "train", "sample", "encoders", "deepspeed", "--write-docs", str(page)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(output.read_text())
    for part in ("train", "sample", "encoders", "deepspeed"):
        assert "problem" not in results[part], results[part]
        rows = results[part]["results"]
        assert rows
        assert all(row.get("ms", 0) > 0 for row in rows), rows
    text = page.read_text()
    assert "old" not in text
    assert "kept" in text
    assert "| DeepSpeed ZeRO-3 step |" in text
    assert "variant channels-last" in text
    assert "variant packed, samples_together 8" in text
    policies = {row["checkpointing"] for row in results["train"]["results"]}
    assert policies == {"none", "selective", "full"}


def test_the_table_counts_forms_that_are_right_and_repeat():
    specification = importlib.util.spec_from_file_location("bench_gpu", ROOT / "benchmarks/gpu.py")
    gpu = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(gpu)
    rows = [{"ok": ok, "reproducible": again} for ok, again in ((True, True), (True, False), (False, True))]
    written = gpu.table({"kernels": {"device": "a GPU", "correctness": rows}})
    assert "1 of 3 forms right" in written
