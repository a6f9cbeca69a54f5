"""The machine a process finds itself on: how slow it is, and the odd ones made ordinary.

Containers run as users that no passwd file knows, with no home or a read-only one, behind proxies, under odd locales
and twenty times slower than others. What libraries need is set once, before they are loaded.
"""

import contextlib
import functools
import locale
import os
import pwd
import stat
import sys
import tempfile
import time
from pathlib import Path

# What the loop below takes on an ordinary processor of 2020 that is not busy.
_REFERENCE_S = 0.02
_REFERENCE_LOOP = 400_000
_MAX_SLOWNESS = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@functools.cache
def slowness() -> float:
    """How many times slower this machine runs now than an ordinary idle one, between 1 and 30; measured once.

    By the wall clock: other processes and a cgroup's limit count, as they do for whatever is waited for.
    """
    start = time.perf_counter()
    total = 0
    for number in range(_REFERENCE_LOOP):
        total += number
    return min(max((time.perf_counter() - start) / _REFERENCE_S, 1.0), _MAX_SLOWNESS)


def patience(seconds: float) -> float:
    """A time limit meant for an ordinary machine, for this one."""
    return seconds * slowness()


def make_ordinary() -> None:
    """Give libraries what they expect of a machine: UTF-8, a user's name, a home to write to, no proxy to itself."""
    _use_utf8()
    _have_a_user()
    _reach_oneself_directly()


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


def _reach_oneself_directly() -> None:
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        given = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*given, *(host for host in LOOPBACK if host not in given)])
