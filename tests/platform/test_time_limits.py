"""Time limits: one home, a reason each, more of them on a slow machine."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.platform import machine, ray_session
from loomvideo.platform.time_limits import all_limits

REPO = Path(__file__).parents[2]
# Words of names that say how long something is waited for before it is given up.
WORDS = re.compile(r"timeout|deadline|patience|grace|straggler", re.IGNORECASE)
# A look at a queue or a flag that is repeated is no limit.
LONGEST_LOOK_S = 1.0
# The MLflow image holds this file alone.
ALONE = REPO / "platform/cluster/mlflow_user.py"


def fixed_limits(tree):
    """``(line, name, seconds)`` of numbers that are time limits where they stand; keys of configurations have help."""
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Assign):
            pairs = [(ast.unparse(target), node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.FunctionDef):
            named = [*node.args.posonlyargs, *node.args.args]
            defaults = node.args.defaults
            pairs = [(a.arg, d) for a, d in zip(named[len(named) - len(defaults) :], defaults, strict=True)]
            pairs += [(a.arg, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        for name, value in pairs:
            is_number = isinstance(value, ast.Constant) and isinstance(value.value, int | float)
            if WORDS.search(name) and is_number and value.value > LONGEST_LOOK_S:
                yield value.lineno, name, value.value


# What somebody may set, and the default says how long: documented keys and arguments of clients of model servers.
SETTABLE = {
    ("pipelines/evaluation/rewards.py", "patience_s"),
    ("pipelines/serving/client.py", "patience_s"),
    ("pipelines/vlm/clients.py", "timeout_s"),
    ("platform/nodes/artifacts.py", "lock_timeout_s"),
}


def test_every_fixed_limit_is_in_one_place():
    found = []
    for room in ("platform", "model", "pipelines", "jobs"):
        for file in sorted((REPO / room).rglob("*.py")):
            if file in (REPO / "platform/time_limits.py", ALONE):
                continue
            name = file.relative_to(REPO).as_posix()
            limits = fixed_limits(ast.parse(file.read_text(encoding="utf-8")))
            found += [f"{name}:{line}: {key} = {s}" for line, key, s in limits if (name, key) not in SETTABLE]
    assert not found, f"move to platform/time_limits.py: {found}"


def test_the_scan_sees_limits_in_calls_defaults_and_names():
    tree = ast.parse(
        "get(timeout=30)\ndef f(a, timeout_s=5.0, *, b=1): ...\nSTOP_GRACE_S: int = 60\nq.get(timeout=0.2)"
    )
    found = {(name, seconds) for _, name, seconds in fixed_limits(tree)}
    assert found == {("timeout", 30), ("timeout_s", 5.0), ("STOP_GRACE_S", 60)}


# Dates, which clocks of other machines or of another day are compared with; all else counts seconds that do not jump.
DATES = {
    "platform/cluster/doctor.py": "how far the clocks of two nodes are apart",
    "platform/cluster/drain.py": "Ray takes the end of a notice as a date",
    "pipelines/evaluation/prune.py": "files older than so many days",
    "pipelines/serving/jobs.py": "requests of a day, and deadlines that outlive the server",
    "pipelines/serving/store.py": "results and uploads older than so many seconds",
}


def dates_counted_with(tree):
    """Lines where the clock of the day is added to, taken from or compared with something."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        if any(ast.unparse(part) in ("time.time()", "datetime.datetime.now()") for part in parts):
            yield node.lineno


def test_nothing_is_waited_for_by_a_clock_that_may_jump():
    found = {}
    for room in ("platform", "model", "pipelines", "jobs"):
        for file in sorted((REPO / room).rglob("*.py")):
            lines = list(dates_counted_with(ast.parse(file.read_text(encoding="utf-8"))))
            if lines:
                found[file.relative_to(REPO).as_posix()] = lines
    assert set(found) <= set(DATES), f"count by time.monotonic(): {found}"
    counted = ast.parse("a = time.time()\nb = time.time() - a\nwhile time.time() < b: pass")
    assert list(dates_counted_with(counted)) == [2, 3]


def test_the_page_says_every_limit_and_its_reason():
    page = (REPO / "docs/operations.md").read_text(encoding="utf-8")
    for name, limit in all_limits().items():
        row = f"| `{name}` | {limit.seconds:g}{' scaled' if limit.scaled else ''} | {limit.reason} |"
        assert row in page, f"docs/operations.md lacks:\n{row}"


@pytest.mark.parametrize("name", all_limits())
def test_a_slow_machine_gets_more_of_each_limit_that_is_scaled(name, monkeypatch):
    monkeypatch.setattr(machine, "_measured", (machine.time.monotonic(), 12.0))
    limit = all_limits()[name]
    assert limit.here() == limit.seconds * (12.0 if limit.scaled else 1.0)
    uses = {use for text in programs() for use in re.findall(rf"\b{name}\b(\.\w+)?", text)}
    # A default of the decoder, which scales whatever it is given: see below.
    allowed = {".seconds"} if name == "DECODER" else {".here", ""}
    assert uses, f"{name} is used nowhere"
    assert uses <= allowed, f"{name}.seconds is the same on every machine; take {name}.here()"


@cache
def programs():
    """The text of every file that may use a limit, without the lines that import it."""
    files = [file for room in ("platform", "model", "pipelines", "jobs") for file in (REPO / room).rglob("*.py")]
    texts = (file.read_text(encoding="utf-8") for file in files if file.name != "time_limits.py")
    return [re.sub(r"(?m)^(from .*|    [A-Z_]+,)$", "", text) for text in texts]


def test_a_decoder_scales_what_it_is_given(monkeypatch):
    monkeypatch.setattr(machine, "_measured", (machine.time.monotonic(), 12.0))
    assert IsolatedDecoder(timeout_s=2.0).timeout_s == 24.0


CLOCK = re.compile(r"\b(monotonic|perf_counter|time\.time)\(\)")


def held_to_a_time(tree):
    """Lines of assertions that compare what a clock says passed with a number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            passed = [p for p in ast.walk(node.test) if isinstance(p, ast.BinOp) and isinstance(p.op, ast.Sub)]
            if any(CLOCK.search(ast.unparse(part)) for part in passed):
                yield node.lineno


def test_no_test_holds_a_machine_to_a_speed():
    found = []
    for file in sorted((REPO / "tests").rglob("*.py")):
        found += [f"{file.name}:{line}" for line in held_to_a_time(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found, f"wait for what must come, or count what must not be done: {found}"
    timed = ast.parse("assert time.monotonic() < end\nassert time.monotonic() - began < 1\nassert 1 < time.time() - a")
    assert list(held_to_a_time(timed)) == [2, 3]


BUSY = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"
# By its own time a processor is as fast as alone, however fast that is.
MEASURE = """
import os, time
os.sched_setaffinity(0, {%d})
from loomvideo.platform.machine import loop_s
print(max(loop_s(time.perf_counter) for _ in range(10)) / min(loop_s(time.process_time) for _ in range(10)))
"""
START = """
import os, ray
os.sched_setaffinity(0, {%d})
from loomvideo.platform.ray_session import ray_session
with ray_session(num_cpus=1):
    print(ray.get(ray.remote(lambda: os.getpid() > 0).remote()))
"""


@pytest.fixture
def busy_core():
    """A core with a process that never rests: what runs there is twice as slow."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", BUSY % core])
    yield core
    process.kill()
    process.wait()


def run_on(core, program):
    done = subprocess.run([sys.executable, "-c", program % core], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_busy_processes_beside_are_measured(busy_core):
    assert float(run_on(busy_core, MEASURE)[0]) > 1.2


@pytest.mark.slow
def test_ray_starts_on_a_core_that_is_busy(busy_core):
    assert run_on(busy_core, START) == ["True"]


def test_a_node_that_registers_late_is_waited_for(monkeypatch):
    late = iter([RuntimeError("no such node"), RuntimeError("no such node"), {"labels": {}}])
    services = ray_session.ray._private.services

    def look_up(*arguments):
        found = next(late)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(services, "get_node", look_up)
    monkeypatch.setattr(ray_session.time, "sleep", lambda seconds: None)
    with ray_session.nodes_may_be_late():
        assert services.get_node("127.0.0.1:1", "id") == {"labels": {}}
    assert services.get_node is look_up
