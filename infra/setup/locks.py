"""Writes and checks the lock files: ``python infra/setup/locks.py write | check``.

One file a set, each of exact versions with markers for Python 3.11 to 3.13 on x86-64 and aarch64:

* ``locks/base.txt``: everything both accelerators need, without the libraries of torch's CUDA build;
* ``locks/torch-cuda.txt``: those libraries;
* ``locks/EXTRA.txt``: what an extra adds to the base set.

So ``cpu`` is base (and torch-cuda only where no CPU build of torch can be had), ``cuda`` is base, torch-cuda and gpu.
No hashes: ``torch`` may come as whichever build of the same version a person's index has, and pip's hash mode is all or
nothing. No address of an index either: where packages come from is the reader's setting.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from index_settings import environment_for_uv
from packaging.markers import Marker
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
LOCKS = REPO / "locks"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
ACCELERATORS = ("cpu", "cuda")
ALL = len(ACCELERATORS) * len(PYTHONS) * len(MACHINES)
GLIBC = "manylinux_2_28"
HEADER = "# Written by `make lock`; do not edit. See infra/setup/locks.py.\n"
SOURCE_ONLY = {"deepspeed"}
_UNREACHABLE = (
    "error sending request",
    "dns error",
    "failed to lookup",
    "connection refused",
    "timed out",
    "tunnel error",
    "connect error",
    "network is unreachable",
    "could not connect",
)


class LockError(Exception):
    """A lock cannot be written, or does not hold."""


class NoIndexError(Exception):
    """No package index can be reached, so nothing can be said about the locks."""


@dataclass(frozen=True)
class Pin:
    """One line of a lock file."""

    name: str
    version: str
    marker: str
    via: str

    @property
    def requirement(self) -> str:
        """The line without its comment."""
        return f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")


def parse(text: str) -> list[Pin]:
    """The pins in the text of a lock file, or in what ``uv pip compile`` printed."""
    pins = []
    for line in text.splitlines():
        found = re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*([^#]+?))?(?:\s+#\s*via\s*(.*))?\s*$", line)
        if found:
            name, version, marker, via = found.groups(default="")
            # uv also names the files it read; of interest here is which package asks for this one.
            asking = [part.partition(" (")[0] for part in via.strip().split(", ") if not part.startswith("-")]
            pins.append(Pin(canonicalize_name(name), version, marker.strip(), ", ".join(sorted(asking))))
    return pins


def extra_names() -> list[str]:
    """The names of the project's extras."""
    return sorted(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def compile_pins(
    source: str, *options: str, constraints: str = "", preferred: str = "", excludes: Iterable[str] = ()
) -> list[Pin]:
    """The versions uv resolves ``source`` to, from index metadata.

    Args:
        source: ``pyproject.toml``, or requirements separated by newlines.
        options: More options of ``uv pip compile``.
        constraints: Text of a constraints file: versions that must hold.
        preferred: Text of an earlier result: versions that stay where they can.
        excludes: Names to leave out with what only they need.

    Raises:
        LockError: There is no solution.
        NoIndexError: No index answered.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in (("constraints", constraints), ("excludes", "\n".join(excludes)), ("locked", preferred)):
            (folder / f"{file}.txt").write_text(text)
        (folder / "requirements.in").write_text(source)
        path = REPO / source if source == "pyproject.toml" else folder / "requirements.in"
        command = [sys.executable, "-m", "uv", "pip", "compile", str(path), "--quiet", "--no-header", "--no-sources"]
        command += ["--annotation-style", "line", "--constraints", str(folder / "constraints.txt")]
        command += ["--excludes", str(folder / "excludes.txt"), "--output-file", str(folder / "locked.txt"), *options]
        # This interpreter answers for all versions; uv would otherwise fetch one of each.
        command += ["--python", sys.executable, "--no-python-downloads"]
        environment = environment_for_uv(sys.executable)
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        if done.returncode == 0:
            return parse((folder / "locked.txt").read_text())
    message = done.stderr.strip()
    raise (NoIndexError if any(sign in message.lower() for sign in _UNREACHABLE) else LockError)(message)


def read_locks() -> dict[str, list[Pin]]:
    """The pins of every lock file by its name."""
    return {path.stem: parse(path.read_text()) for path in sorted(LOCKS.glob("*.txt"))}


def write(upgrade: bool = False) -> None:
    """Writes all lock files; versions stay as they are where they can, unless ``upgrade``."""
    earlier = [] if upgrade else [pin for pins in read_locks().values() for pin in pins]
    universal = ("--universal", "--python-version", PYTHONS[0])
    everything = compile_pins("pyproject.toml", "--all-extras", *universal, preferred=_text(earlier))
    fixed = _text(everything)
    torch = next(pin for pin in everything if pin.name == "torch")
    # What torch asks for on Linux alone are the libraries of its CUDA build: macOS has none.
    of_torch = compile_pins(torch.requirement, *universal, constraints=fixed)
    libraries = [pin for pin in of_torch if "sys_platform == 'linux'" in pin.marker]
    with ThreadPoolExecutor(4) as pool:
        extras = extra_names()
        options = [(), *(("--extra", extra) for extra in extras)]
        base, *closures = pool.map(
            lambda more: compile_pins("pyproject.toml", *more, *universal, constraints=fixed), options
        )
    in_torch = {pin.requirement for pin in libraries}
    in_base = {pin.requirement for pin in base}
    files = {"base": [pin for pin in base if pin.requirement not in in_torch], "torch-cuda": libraries}
    for extra, closure in zip(extras, closures, strict=True):
        files[extra] = [pin for pin in closure if pin.requirement not in in_base]
    LOCKS.mkdir(exist_ok=True)
    for path in LOCKS.glob("*.txt"):
        if path.stem not in files:
            path.unlink()
    for name, pins in files.items():
        lines = [pin.requirement + (f"  # via {pin.via}" if pin.via else "") for pin in pins]
        (LOCKS / f"{name}.txt").write_text(HEADER + "\n".join(lines) + "\n")
        print(f"locks/{name}.txt: {len(pins)} packages")


def _text(pins: Iterable[Pin]) -> str:
    return "\n".join(sorted({pin.requirement for pin in pins}))


@dataclass(frozen=True)
class Combination:
    """One kind of machine the locks claim to fit."""

    accelerator: str
    python: str
    machine: str

    def __str__(self) -> str:
        return f"{self.accelerator}, Python {self.python}, {self.machine}"

    def holds(self, pin: Pin) -> bool:
        """Whether a pin is installed on this kind of machine."""
        values = {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "platform_machine": self.machine,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        return not pin.marker or Marker(pin.marker).evaluate(values)


def check_combination(combination: Combination, locks: dict[str, list[Pin]]) -> list[str]:
    """What is wrong with the locks for one kind of machine: conflicts, and pins missing or not needed any more."""
    pins = [pin for name in locks for pin in locks[name]]
    only_cuda = {pin.name for pin in locks["torch-cuda"]} - {
        pin.name for name in locks if name != "torch-cuda" for pin in locks[name]
    }
    if combination.accelerator == "cpu":
        pins = [pin for pin in pins if pin.name not in only_cuda]
    wanted = {pin.name: pin.version for pin in pins if combination.holds(pin)}
    # Every pin needs a wheel for this machine, but for what is published as source alone.
    wheels = [option for name in wanted if name not in SOURCE_ONLY for option in ("--only-binary", name)]
    try:
        resolved = compile_pins(
            "pyproject.toml",
            "--all-extras",
            *("--python-version", combination.python),
            *("--python-platform", f"{combination.machine}-{GLIBC}"),
            *wheels,
            constraints=_text(pins),
            excludes=sorted(only_cuda) if combination.accelerator == "cpu" else (),
        )
    except LockError as error:
        return [str(error).removeprefix("error: ")]
    found = {pin.name: pin.version for pin in resolved}
    missing = [f"{name}=={found[name]} is in no lock file" for name in found.keys() - wanted.keys()]
    spare = [f"{name}=={wanted[name]} is locked but not needed" for name in wanted.keys() - found.keys()]
    return sorted(missing) + sorted(spare)


def check() -> dict[str, list[Combination]]:
    """What is wrong with the locks, and for which kinds of machine."""
    locks = read_locks()
    combinations = [Combination(*parts) for parts in itertools.product(ACCELERATORS, PYTHONS, MACHINES)]
    absent = {"base", "torch-cuda", *extra_names()} - locks.keys()
    if absent:
        return {f"locks/{name}.txt is missing": combinations for name in absent}
    # The first one alone: it tells at once whether there is an index, and fills uv's cache for the others.
    found = [check_combination(combinations[0], locks)]
    with ThreadPoolExecutor(4) as pool:
        found += pool.map(lambda one: check_combination(one, locks), combinations[1:])
    problems: dict[str, list[Combination]] = {}
    for combination, texts in zip(combinations, found, strict=True):
        for text in texts:
            problems.setdefault(text, []).append(combination)
    return problems


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write or check the lock files.")
    parser.add_argument("action", choices=["write", "check"])
    parser.add_argument("--upgrade", action="store_true", help="write: take the newest versions that fit")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        if arguments.action == "write":
            write(arguments.upgrade)
            return 0
        problems = check()
    except NoIndexError as error:
        last = str(error).splitlines()[-1].strip()
        if arguments.action == "write":
            print(f"error: no package index can be reached ({last})", file=sys.stderr)
            return 2
        print(f"SKIPPED: no package index can be reached, so the locks were not checked ({last})")
        return 0
    except LockError as error:
        print(f"error: the requirements in pyproject.toml cannot be met together\n{error}", file=sys.stderr)
        return 1
    for problem, combinations in sorted(problems.items()):
        where = "everywhere" if len(combinations) == ALL else "; ".join(map(str, combinations))
        print(f"error: {problem}\n  ({where})", file=sys.stderr)
    if problems:
        print("the lock files do not hold; after a change of pyproject.toml run: make lock", file=sys.stderr)
        return 1
    print(f"the locks hold for all {ALL} kinds of machine ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
