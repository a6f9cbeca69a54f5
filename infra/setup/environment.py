"""Makes or refreshes the virtual environment from the lock files; needs nothing but a Python with ``venv``.

``python infra/setup/environment.py --accelerator cpu dev`` installs torch, the base set, the extra ``dev`` and the
project itself into ``.venv``, with uv (from PATH, or brought into the environment) or with pip where there is no uv.
Nothing is resolved: the lock files name every package. Running it again continues and repairs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from index_settings import has_own_index, pip_settings, system_certificates, uses_no_index, uv_variables

REPO = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (3, 11), (3, 13)
# Older ones know neither --torch-backend nor --no-python-downloads.
OLDEST_UV = (0, 8)
# On disk, with what the downloads need meanwhile; measured, see docs/benchmarks.md.
NEEDED_GB = {"cpu": 4, "cuda": 12}


class SetupError(Exception):
    """What a person has to do before it goes on, in one line."""


def check_machine(venv: Path, accelerator: str) -> None:
    """Refuses a Python, folder or disk that cannot hold the environment.

    Raises:
        SetupError: naming what is wrong and what to do.
    """
    found = ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise SetupError(f"Python {wanted} is needed, this is {found}; name one: make setup PYTHON=/path/to/python3.11")
    try:
        import venv as module  # noqa: F401
        from ensurepip import bootstrap  # noqa: F401
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise SetupError(f"Python {found} has no venv module; on Debian or Ubuntu: apt-get install {package}") from None
    folder = next(parent for parent in (venv, *venv.parents) if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"{folder} cannot be written to; copy the repository into a folder of your own")
    free = shutil.disk_usage(folder).free / 1e9
    if not (venv / ".accelerator").exists() and free < NEEDED_GB[accelerator]:
        raise SetupError(f"{folder} has {free:.1f} GB free; about {NEEDED_GB[accelerator]} GB are needed")


def detect_accelerator() -> str:
    """``cuda`` where ``nvidia-smi`` lists a GPU, else ``cpu``."""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if shown.returncode == 0 and "GPU 0" in shown.stdout else "cpu"


class Phase:
    """One line about one step: what it does, then how much it put on disk and how long it took."""

    def __init__(self, what: str, venv: Path):
        self.venv = venv
        print(f"{what} …", end="", flush=True)
        if sys.stderr.isatty():
            print(flush=True)

    def __enter__(self) -> Phase:
        self.began, self.size = time.monotonic(), _size(self.venv)
        self.note = ""
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind:
            print(" failed", flush=True)
            return
        grown = (_size(self.venv) - self.size) / 1e6
        parts = [self.note, f"{grown:+,.0f} MB" if abs(grown) >= 0.5 else "", f"{time.monotonic() - self.began:.0f} s"]
        print(" " + ", ".join(part for part in parts if part), flush=True)


def _size(folder: Path) -> int:
    """Bytes in a folder."""
    total, stack = 0, [str(folder)]
    while stack:
        try:
            entries = list(os.scandir(stack.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            else:
                total += entry.stat(follow_symlinks=False).st_size
    return total


class Environment:
    """A virtual environment and the installer that fills it."""

    def __init__(self, venv: Path, compile_bytecode: bool = False):
        self.venv = venv
        self.compile_bytecode = compile_bytecode
        self.python = str(venv / "bin" / "python")
        self.uv: str | None = None
        self.variables: dict[str, str] = dict(os.environ)
        self.no_index = False

    def accelerator(self) -> str | None:
        """What the environment was made for, if it was finished."""
        path = self.venv / ".accelerator"
        return path.read_text().strip() if path.exists() else None

    def record(self, accelerator: str) -> None:
        """Notes what the environment was made for."""
        (self.venv / ".accelerator").write_text(accelerator + "\n")

    def create(self) -> None:
        """Makes the environment, or repairs one whose Python is gone."""
        if os.path.exists(self.python):
            works = subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True, check=False)
            if works.returncode == 0:
                return
        with Phase(f"making {self.venv} with Python {'.'.join(map(str, sys.version_info[:3]))}", self.venv):
            self._run([sys.executable, "-m", "venv", str(self.venv)], "the virtual environment")

    def find_installer(self) -> None:
        """Takes uv from PATH or beside this Python, brings it in, or stays with pip."""
        settings = pip_settings(self.python)
        self.no_index = uses_no_index(settings)
        self.variables = {**os.environ, **system_certificates(os.environ), **uv_variables(settings, os.environ)}
        self.variables["UV_PYTHON_DOWNLOADS"] = "never"
        home = Path(os.path.expanduser("~"))
        if "UV_CACHE_DIR" not in os.environ and not os.access(home, os.W_OK):
            # No home, or one that cannot be written to: pip and uv would each complain in their own way.
            self.variables["UV_CACHE_DIR"] = str(self.venv / ".cache")
            self.variables.setdefault("PIP_CACHE_DIR", str(self.venv / ".cache"))
        if os.environ.get("LOOMVIDEO_INSTALLER") == "pip":
            return
        for candidate in (str(self.venv / "bin" / "uv"), shutil.which("uv")):
            if candidate and _uv_version(candidate) >= OLDEST_UV:
                self.uv = candidate
                return
        with Phase("bringing in uv, the installer", self.venv) as phase:
            wanted = next(line for line in _lines("dev") if line.startswith("uv=="))
            command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            done = subprocess.run([*command, "--no-deps", wanted], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                self.uv = str(self.venv / "bin" / "uv")
            else:
                phase.note = "not to be had, going on with pip"

    def install(self, what: str, requirements: list[str], *options: str, **variables: str) -> None:
        """Installs exactly these requirements.

        Raises:
            SetupError: naming the package that failed.
        """
        if self.uv:
            command = [self.uv, "pip", "install", "--python", self.python, "--no-deps"]
            command += ["--no-index"] if self.no_index else []
            command += ["--compile-bytecode"] if self.compile_bytecode else []
        else:
            command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
            command += [] if self.compile_bytecode else ["--no-compile"]
            command += [] if sys.stderr.isatty() else ["--quiet"]
        self._run([*command, *options, *requirements], what, variables)

    def remove(self, names: list[str]) -> None:
        """Removes packages."""
        command = (
            [self.uv, "pip", "uninstall", "--python", self.python]
            if self.uv
            else ([self.python, "-m", "pip", "uninstall", "--quiet", "--yes"])
        )
        self._run([*command, *names], "what is not needed")

    def _run(self, command: list, what: str, variables: dict[str, str] | None = None) -> None:
        # On a terminal the installer shows its own progress; elsewhere only what went wrong is of interest.
        shown = None if sys.stderr.isatty() and not variables else subprocess.PIPE
        environment = {**self.variables, **(variables or {})}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=shown, text=True, env=environment, check=False)
        if done.returncode:
            raise SetupError(explain(what, (done.stderr or "") + (done.stdout or "")))


# Where uv and pip say which package they were at.
_NAMED = re.compile(
    r"`([\w.-]+==[^`]+)`|/simple/([\w.-]+)/|requirement ([\w.-]+==\S+)|[Bb]ecause ([\w.-]+) was not found"
    r"|[Nn]o version of ([\w.-]+==\S+)|[Bb]ecause ([\w.-]+==\S+) has no"
)


def explain(what: str, output: str) -> str:
    """One line from what an installer printed: which package, why, and that the same command continues."""
    lines = [re.sub(r"^\W*(?:error|cause)?:? *", "", line, flags=re.IGNORECASE).strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("hint", "[notice]", "WARNING"))]
    # The last one named is what it stopped at.
    named = [group for found in _NAMED.finditer(output) for group in found.groups() if group]
    name = named[-1] if named else what
    reason = lines[-1].rstrip(".") if lines else "see above"
    if "connection broken by" in output:  # pip, whose last line only says that nothing was found
        reason = "no package index answered (no network, or a proxy or an index of your own to name)"
    if "certificate" in reason.lower():
        reason += " (a proxy that inspects? PIP_CERT=/its/certificates.pem)"
    return f"{name} could not be installed: {reason}. What is downloaded is kept: the same command continues"


def _uv_version(uv: str) -> tuple[int, ...]:
    try:
        shown = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", shown)[:2])


def _lines(name: str) -> list[str]:
    path = REPO / "locks" / f"{name}.txt"
    if not path.exists():
        raise SetupError(f"there is no extra {name}: {path} does not exist")
    lines = [line.partition("  #")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _installed_torch(venv: Path) -> tuple[str, str | None]:
    """Version of the installed torch and the CUDA release it is built for (None: a CPU build), without importing it."""
    for path in venv.glob("lib/python*/site-packages/torch/version.py"):
        text = path.read_text()
        version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
        cuda = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", text, re.MULTILINE)
        return (version.group(1) if version else "", cuda.group(1) if cuda else None)
    return "", None


def install_torch(environment: Environment, accelerator: str) -> None:
    """Installs the build of torch that the accelerator needs, and the CUDA libraries where it is a CUDA build.

    For ``cpu``: a CPU build from the person's own places, else from PyTorch's (which uv knows) if no other index was
    asked for, else what the index has. For ``cuda``: never a CPU build.

    Raises:
        SetupError: No build of the right kind can be had.
    """
    pin = next(line for line in _lines("base") if line.startswith("torch==")).partition(";")[0].strip()
    version = pin.partition("==")[2]
    installed, cuda = _installed_torch(environment.venv)
    if environment.accelerator() != accelerator or installed.partition("+")[0] != version:
        with Phase(f"{pin} for {accelerator}", environment.venv) as phase:
            if accelerator == "cuda":
                environment.install(pin, [f"{pin},!={version}+cpu"])
            else:
                _install_cpu_torch(environment, pin)
            cuda = _installed_torch(environment.venv)[1]
            phase.note = f"built for CUDA {cuda}" if cuda else "a CPU build"
    if accelerator == "cuda" and cuda is None:
        environment.remove(["torch"])
        raise SetupError(
            f"your package index has only a CPU build of {pin}, which ACCELERATOR=cuda refuses; name an index with the "
            "CUDA build (PIP_INDEX_URL), or set ACCELERATOR=cpu"
        )
    libraries = _lines("torch-cuda")
    if cuda:
        with Phase(f"CUDA libraries of torch, {len(libraries)} packages", environment.venv) as phase:
            environment.install("the CUDA libraries", ["-r", str(REPO / "locks" / "torch-cuda.txt")])
            if accelerator == "cpu":
                phase.note = "no CPU build of torch could be had, and this one needs them"
    elif environment.accelerator() == "cuda":
        with Phase("removing the CUDA libraries", environment.venv):
            elsewhere = {_name(line) for name in ("base", "dev") for line in _lines(name)}
            environment.remove(sorted({_name(line) for line in libraries} - elsewhere))


def _install_cpu_torch(environment: Environment, pin: str) -> None:
    try:
        environment.install(pin, [f"{pin}+cpu"])
        return
    except SetupError:
        pass  # Not in the places that were asked; the last attempt below tells if nothing could be reached.
    if environment.uv and not environment.no_index and not has_own_index(environment.variables):
        try:
            environment.install(pin, [f"{pin}+cpu"], "--torch-backend", "cpu", UV_HTTP_RETRIES="0")
            return
        except SetupError:
            pass
    environment.install(pin, [pin])


def _name(line: str) -> str:
    return re.split(r"[=<>!;\s]", line, maxsplit=1)[0]


def install_project(environment: Environment, editable: bool) -> None:
    """Installs the project itself, with the setuptools that the lock file names."""
    with Phase("loomvideo itself", environment.venv):
        options = ["--no-build-isolation", *(["--editable"] if editable else [])]
        environment.install("loomvideo", [str(REPO)], *options)


def start_once(environment: Environment) -> None:
    """Imports what Ray starts under a time limit of seconds, which on a slow machine the first import alone takes.

    Raises:
        SetupError: The environment does not even import Ray.
    """
    with Phase("first import of Ray", environment.venv):
        command = [environment.python, "-c", "import ray.dashboard.agent"]
        done = subprocess.run(command, cwd=environment.venv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{environment.venv} is made, but Ray does not load: {done.stderr.strip().splitlines()[-1]}")


def compile_ahead(environment: Environment) -> None:
    """Compiles what is installed, where Python may not keep bytecode (``PYTHONDONTWRITEBYTECODE``).

    Every process, and a job starts a dozen, would compile it anew: 18 of 32 seconds of imports, measured.
    """
    with Phase("bytecode, as PYTHONDONTWRITEBYTECODE is set and no process would keep it", environment.venv):
        folders = [str(folder) for folder in environment.venv.glob("lib/python*/site-packages")]
        # Its status tells of files for other Pythons, which packages ship and nothing imports.
        command = [environment.python, "-m", "compileall", "-q", "-j", "0", *folders]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make or refresh the virtual environment from the lock files.")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml, such as dev or server")
    parser.add_argument("--venv", type=Path, default=REPO / ".venv")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], help="default: cuda where nvidia-smi lists a GPU")
    parser.add_argument("--part", choices=["all", "dependencies", "project"], default="all", help="for image layers")
    parser.add_argument("--no-editable", action="store_true", help="copy the project in, do not link to this folder")
    parser.add_argument("--compile", action="store_true", help="compile bytecode ahead, for a folder read-only later")
    arguments = parser.parse_args()
    environment = Environment(arguments.venv.absolute(), arguments.compile)
    accelerator = arguments.accelerator or environment.accelerator() or detect_accelerator()
    began = time.monotonic()
    try:
        check_machine(environment.venv, accelerator)
        environment.create()
        environment.find_installer()
        if arguments.part != "project":
            install_torch(environment, accelerator)
            extras = dict.fromkeys([*arguments.extras, *(["gpu"] if accelerator == "cuda" else [])])
            for name in ["base", *extras]:
                lines = _lines(name)
                with Phase(
                    f"{'the base set' if name == 'base' else f'extra {name}'}, {len(lines)} packages", environment.venv
                ):
                    environment.install(name, ["-r", str(REPO / "locks" / f"{name}.txt")])
            environment.record(accelerator)
        if arguments.part != "dependencies":
            install_project(environment, not arguments.no_editable)
            if os.environ.get("PYTHONDONTWRITEBYTECODE") and not arguments.compile:
                compile_ahead(environment)
            start_once(environment)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{environment.venv} is ready for {accelerator} ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
