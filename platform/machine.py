"""The machine a process finds itself on: how slow it is, and the odd ones made ordinary.

Containers run as users that no passwd file knows, with no home or a read-only one, behind proxies, under odd locales
and twenty times slower than others. What libraries need is set once, before they are loaded.
"""

import contextlib
import locale
import math
import os
import pwd
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# What the loop below takes on an ordinary processor of 2020 that is not busy.
_REFERENCE_S = 0.02
_REFERENCE_LOOP = 400_000
_MAX_SLOWNESS = 30.0
# A busy machine is not busy for ever: what was measured holds for so long.
_MEASURED_FOR_S = 60.0
_CGROUPS = Path("/sys/fs/cgroup")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


_measured: tuple[float, float] | None = None
"""When the slowness was measured, and what it was."""


def slowness() -> float:
    """How many times slower this machine runs now than an ordinary idle one, between 1 and 30.

    The worst of three: a fixed loop by the wall clock, processes that wait for each core, and a cgroup's limit below
    one core. A short loop alone may slip through between two turns of others. Measured again after a minute.
    """
    global _measured
    now = time.monotonic()
    if _measured is None or now - _measured[0] > _MEASURED_FOR_S:
        loop = loop_s(time.perf_counter) / _REFERENCE_S
        waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
        _measured = now, min(max(loop, waiting, 1 / min(cpu_limit(), 1.0), 1.0), _MAX_SLOWNESS)
    return _measured[1]


def loop_s(clock: Callable[[], float]) -> float:
    """Seconds of a fixed loop by a clock, long enough for a process beside it on its core to get its turn."""
    start = clock()
    total = 0
    for number in range(_REFERENCE_LOOP):
        total += number
    return clock() - start


def cpu_limit(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores the cgroups of this process let it use, of both versions; infinite without a limit."""
    limit = math.inf
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (cgroups / controllers, cgroups / "cpu") if controllers else (cgroups,):
            # Without a namespace of its own a container sees its name outside, while its own folder is the top.
            below = top / name.lstrip("/")
            limit = min(limit, *(_quota(folder) for folder in (top, below, *below.parents)))
    return limit


def _quota(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            return int(quota) / int(period)
    return math.inf


def usable_cpus() -> int:
    """Cores that this process may use: of its affinity, and no more than its cgroup's limit."""
    return max(min(len(os.sched_getaffinity(0)), math.ceil(min(cpu_limit(), 1e6))), 1)


def patience(seconds: float) -> float:
    """A time limit meant for an ordinary machine, for this one."""
    return seconds * slowness()


def make_ordinary() -> None:
    """Give libraries what they expect of a machine: UTF-8, a user's name, a home to write to, no proxy to itself."""
    _use_utf8()
    _have_a_user()
    _reach_oneself_directly()
    _count_cores()


def cache_folder() -> Path:
    """Where this user's caches go: ``XDG_CACHE_HOME``, else ``.cache`` in the home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache") / "loomvideo"


def own_folder(name: str) -> Path:
    """A folder of this user alone in the machine's ``/tmp``, made when it is not there.

    Raises:
        PermissionError: if somebody else made it.
    """
    folder = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder}: belongs to somebody else")
    return folder


def _use_utf8() -> None:
    """Files are UTF-8 whatever the locale says, here and in child processes; what a terminal cannot show is escaped.

    Arguments were decoded by the locale before this, as the terminal sent them.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8":
        for name in ("C.UTF-8", "en_US.UTF-8"):
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                break
        os.environ["PYTHONUTF8"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _have_a_user() -> None:
    try:
        known = pwd.getpwuid(os.getuid())
    except KeyError:
        # Torch and Ray ask for the user's name; OpenShift and `docker run --user` give numbers without one.
        for variable in ("USER", "LOGNAME"):
            os.environ.setdefault(variable, f"uid-{os.getuid()}")
        known = None
    home = os.environ.get("HOME") or (known.pw_dir if known else "")
    if not home or not os.access(home, os.W_OK | os.X_OK) or not os.path.isdir(home):
        os.environ["HOME"] = str(own_folder("loomvideo-home"))
    elif "HOME" not in os.environ:
        os.environ["HOME"] = home


def _count_cores() -> None:
    # Torch takes a thread a core of the machine, and a cgroup that allows fewer stops them all most of the time.
    if usable_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))


def _reach_oneself_directly() -> None:
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        given = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*given, *(host for host in LOOPBACK if host not in given)])
