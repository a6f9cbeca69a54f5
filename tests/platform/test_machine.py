"""Odd machines: no user, no home, proxies, old locales, slow processors, refused fsync, full disks."""

import errno
import getpass
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.namespaces import NAMESPACE, can_mount

from loomvideo.platform import machine, ray_session
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import storage as storage_module
from loomvideo.platform.shards.storage import Storage

SHOWN = """
import getpass, locale, os, pathlib
from loomvideo.platform.machine import cache_folder, make_ordinary
make_ordinary()
print(getpass.getuser(), pathlib.Path.home(), os.access(pathlib.Path.home(), os.W_OK), locale.getencoding().lower())
print(os.environ.get("no_proxy"), cache_folder())
print("é👗")
open(os.environ["HOME"] + "/a.txt", "w").write("é👗")
"""


@pytest.fixture
def shown(tmp_path):
    """What a process with other variables sees of itself after the settings."""
    script = tmp_path / "shown.py"
    script.write_text(SHOWN, encoding="utf-8")

    def run(**variables):
        base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=base | variables, capture_output=True, check=False, umask=0o077)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode("utf-8", "backslashreplace").splitlines()

    return run


@pytest.mark.parametrize("home", ["", "/proc", "/nonexistent"])
def test_a_user_without_name_and_home_gets_both(monkeypatch, home):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(machine.pwd, "getpwuid", unknown)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: path not in ("/proc", "/nonexistent"))
    monkeypatch.setenv("HOME", home)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    machine._have_a_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert os.environ["HOME"] == f"/tmp/loomvideo-home-{os.getuid()}"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(machine.cache_folder()) == f"/tmp/loomvideo-home-{os.getuid()}/.cache/loomvideo"


def test_files_are_utf8_in_every_locale_and_print_never_fails(shown, tmp_path):
    for variables in ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"LANG": "C.UTF-8"}):
        lines = shown(**variables)
        assert lines[0].endswith("utf-8")
        assert lines[2] in ("é👗", "\\xe9\\U0001f457")
        written = [file for file in tmp_path.iterdir() if file.suffix == ".txt"]
        assert [file.read_text(encoding="utf-8") for file in written] == ["é👗"]
        written[0].unlink()


def test_loopback_is_never_proxied(shown):
    lines = shown(http_proxy="http://proxy:3128", no_proxy="example.com")
    assert lines[1].split()[0] == "example.com,localhost,127.0.0.1,::1"
    assert shown()[1].split()[0] == "None"


def test_somebody_elses_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "getuid", lambda: 54322)
    (Path("/tmp") / "loomvideo-test-54322").mkdir(exist_ok=True)
    try:
        with pytest.raises(PermissionError, match="belongs to somebody else"):
            machine.own_folder("loomvideo-test")
    finally:
        (Path("/tmp") / "loomvideo-test-54322").rmdir()


def test_slowness_is_measured_and_bounded(monkeypatch):
    clock = iter([0.0, 0.2, 0.0, 0.001, 0.0, 1000.0, 0.0, 0.001, 0.0, 0.001])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    cores = os.cpu_count()
    found = []
    for load, limit in ((0.0, 8), (0.0, 8), (0.0, 8), (6.0 * cores, 8), (0.0, 0.25)):
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr(machine, "cpu_limit", lambda limit=limit: limit)
        monkeypatch.setattr(machine, "_measured", None)
        found.append(machine.slowness())
    assert found == [pytest.approx(10.0), 1.0, 30.0, 6.0, 4.0]


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", math.inf),
        ({"cpu.max": "max 100000", "user/a/cpu.max": "50000 100000"}, "0::/user/a", 0.5),
        ({"user/cpu.max": "200000 100000", "user/a/cpu.max": "max 100000"}, "0::/user/a", 2.0),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/docker/ab", 4.0),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "1"},
            "4:cpu,cpuacct:/x",
            math.inf,
        ),
        ({}, "1:name=systemd:/", math.inf),
    ],
)
def test_a_cgroups_limit_counts_and_not_the_cores(tmp_path, monkeypatch, files, own, limit):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert machine.cpu_limit(tmp_path, tmp_path / "own") == limit
    monkeypatch.setattr(machine, "cpu_limit", lambda: limit)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(64)))
    assert machine.usable_cpus() == (64 if math.isinf(limit) else math.ceil(limit))


@pytest.fixture
def fake_init(monkeypatch):
    calls, answers = [], []

    def init(**options):
        calls.append(options)
        if answers:
            raise answers.pop(0)

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR", "TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_session, "slowness", lambda: 1.0)
    for name in ray_session._START_LIMITS:
        monkeypatch.setenv(name, "60")
        monkeypatch.delenv(name)
    return calls, answers


def test_a_start_that_timed_out_is_tried_again_with_limits_for_this_machine(fake_init, monkeypatch):
    calls, answers = fake_init
    monkeypatch.setattr(machine, "_measured", (machine.time.monotonic(), 20.0))
    answers += [Exception("The current node timed out during startup. This"), TimeoutError("late")]
    with ray_session.ray_session():
        pass
    assert len(calls) == 3
    assert {os.environ[name] for name in ray_session._START_LIMITS} == {"1200"}


def test_a_start_that_failed_leaves_no_processes(monkeypatch, tmp_path):
    daemon = tmp_path / "ray" / "gcs_server"
    daemon.parent.mkdir()
    shutil.copy(shutil.which("sleep"), daemon)
    earlier = subprocess.Popen([daemon, "60"])
    children = []

    def init(**options):
        children.append(subprocess.Popen([daemon, "60"]))
        raise ValueError("a port is taken")

    monkeypatch.setattr(ray_session.ray, "init", init)
    with pytest.raises(UserError, match="Ray does not start: a port is taken"):
        ray_session.start_local(1)
    assert children[0].wait(10) == -signal.SIGKILL
    assert earlier.poll() is None
    earlier.kill()
    earlier.wait()


def test_a_raylet_that_ended_is_not_waited_for(fake_init, monkeypatch, tmp_path):
    """It gives its agents 15 s and leaves, on an overloaded machine: what helps is the next attempt, at once."""
    calls, _ = fake_init
    raylet = tmp_path / "raylet"
    raylet.write_text("#!/bin/sh\n")
    raylet.chmod(0o755)
    children = []

    def no_node(*arguments):
        raise RuntimeError("no such node yet")

    def init(**options):
        calls.append(options)
        if len(calls) < 3:
            children.append(subprocess.Popen([raylet]))
            ray_session.ray._private.services.get_node("address", "node")

    monkeypatch.setattr(ray_session.ray._private.services, "get_node", no_node)
    monkeypatch.setattr(ray_session.ray, "init", init)
    with ray_session.ray_session():
        pass
    assert len(calls) == 3
    for child in children:
        child.wait()


@pytest.mark.parametrize(
    ("error", "attempts", "message"),
    [
        (
            Exception("The current node timed out during startup. This"),
            3,
            "Ray did not start in 3 attempts: The current",
        ),
        (OSError("AF_UNIX path length"), 1, "Ray does not start: AF_UNIX path length"),
    ],
)
def test_a_start_that_fails_is_one_line(fake_init, error, attempts, message):
    calls, answers = fake_init
    answers += [error] * 3
    with pytest.raises(UserError, match=message) as caught, ray_session.ray_session():
        pass
    assert len(calls) == attempts
    assert "\n" not in str(caught.value)


def test_workers_start_from_an_environment_whose_path_has_spaces(fake_init, monkeypatch):
    """Else the shell that Ray starts them by looks for its first word, and the job waits for ever."""
    calls, _ = fake_init
    with ray_session.ray_session(env_vars={"A": "b"}):
        pass
    monkeypatch.setattr(ray_session.sys, "executable", "/my clone/.venv/bin/python")
    with ray_session.ray_session(env_vars={"A": "b"}):
        pass
    plain, spaced = (call["runtime_env"] for call in calls)
    assert plain == {"env_vars": {"A": "b"}}
    assert spaced == {"env_vars": {"A": "b"}, "py_executable": "'/my clone/.venv/bin/python'"}


def test_a_slow_machine_gets_more_attempts(fake_init, monkeypatch):
    calls, answers = fake_init
    monkeypatch.setattr(ray_session, "slowness", lambda: 2.5)
    answers += [TimeoutError("late")] * 4
    with ray_session.ray_session():
        pass
    assert len(calls) == 5
    monkeypatch.setattr(ray_session, "slowness", lambda: 30.0)
    answers += [TimeoutError("late")] * 8
    with pytest.raises(UserError, match="did not start in 8 attempts"), ray_session.ray_session():
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [("http://head:8265", "is a dashboard; send the job there"), ("10.0.0.1:6379", "unset it to run on this machine")],
)
def test_an_address_that_leads_nowhere_is_one_line(fake_init, monkeypatch, address, message):
    _, answers = fake_init
    monkeypatch.setenv("RAY_ADDRESS", address)
    answers.append(ConnectionError("Could not find any running Ray instance"))
    with pytest.raises(UserError, match=message), ray_session.ray_session():
        pass


def test_a_long_or_closed_temporary_folder_is_left_for_a_short_one(fake_init, monkeypatch, tmp_path):
    calls, _ = fake_init
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for folder in (long, Path("/proc/nowhere")):
        monkeypatch.setenv("TMPDIR", str(folder))
        with ray_session.ray_session():
            pass
        assert calls[-1]["_temp_dir"] == f"/tmp/loomvideo-ray-{os.getuid()}"


def test_a_machine_without_shared_memory_keeps_rays_objects_in_its_temporary_folder(fake_init, monkeypatch, tmp_path):
    """Ray asks for the size of /dev/shm and gives up without it; where it is there and small, Ray itself moves."""
    calls, _ = fake_init
    for folder in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(ray_session, "SHARED_MEMORY", folder)
        with ray_session.ray_session():
            pass
    there, absent = calls
    assert "_plasma_directory" not in there
    assert (absent["_plasma_directory"], absent["object_store_memory"]) == ("/tmp", 2 << 30)


WITHOUT_SHARED_MEMORY = """
set -e
mount -t tmpfs tmpfs $1
for name in null zero urandom random full; do touch $1/$name; mount --bind /dev/$name $1/$name; done
ln -s /proc/self/fd $1/fd
mount --move $1 /dev
exec "$2" -c "$3"
"""
OBJECT_OF_RAY = """
import os, ray
from loomvideo.platform.ray_session import ray_session
with ray_session(num_cpus=1):
    print(os.path.isdir("/dev/shm"), len(ray.get(ray.remote(lambda: bytes(1_000_000)).remote())))
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")
def test_ray_starts_without_shared_memory(tmp_path):
    command = [*NAMESPACE, "sh", "-c", WITHOUT_SHARED_MEMORY, "sh", str(tmp_path), sys.executable, OBJECT_OF_RAY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "1000000"], done.stderr[-2000:]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_storage_that_syncs_nothing_still_publishes(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage_module.os, "fsync", refuse)
    Storage(tmp_path).write_bytes("a/b.txt", b"x")
    assert (tmp_path / "a/b.txt").read_bytes() == b"x"


def test_a_failing_disk_is_not_taken_for_one_that_syncs_nothing(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage_module.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        Storage(tmp_path).write_bytes("a.txt", b"x")
    assert not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, number):
    storage = Storage(tmp_path)

    def write():
        with storage.staged("a.txt") as file:
            file.write_bytes(b"half")
            raise OSError(number, os.strerror(number), str(file))

    with pytest.raises(UserError, match=r"a\.txt: no space left"):
        write()
    assert list(tmp_path.iterdir()) == []
