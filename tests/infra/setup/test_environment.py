"""The environment script against a package index of tiny wheels: builds of torch, and each bad case in one line."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import environment as setup
import pytest

REPO = Path(__file__).parents[3]
UV = Path(sys.executable).parent / "uv"
if not UV.exists():
    UV = Path(shutil.which("uv") or "")


def _wheel(folder: Path, name: str, version: str, files: dict[str, str] | None = None) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files or {f"{name}.py": ""}).items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def _torch(folder: Path, version: str, cuda: str | None) -> None:
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    _wheel(folder, "torch", version, {"torch/__init__.py": "", "torch/version.py": text})


@pytest.fixture
def wheels(tmp_path):
    """The only place packages come from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    _wheel(folder, "nvidia_fake", "13.0.0")
    _wheel(folder, "triton", "3.7.1")
    return folder


@pytest.fixture
def environment(tmp_path, wheels, monkeypatch):
    """An empty environment, lock files of three packages, and no network."""
    locks = tmp_path / "repo" / "locks"
    locks.mkdir(parents=True)
    (locks / "base.txt").write_text("# pins\ntorch==2.13.0  # via loomvideo\n")
    (locks / "torch-cuda.txt").write_text("nvidia-fake==13.0.0 ; sys_platform == 'linux'\ntriton==3.7.1\n")
    (locks / "dev.txt").write_text("triton==3.7.1\n")
    monkeypatch.setattr(setup, "REPO", tmp_path / "repo")
    venv = tmp_path / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    made = setup.Environment(venv)
    made.uv = str(UV)
    made.no_index = True
    made.variables = {
        **os.environ,
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(wheels),
        "UV_CACHE_DIR": str(tmp_path / "c"),
    }
    return made


def _packages(environment):
    return {
        path.name.partition(".dist-info")[0] for path in environment.venv.glob("lib/python*/site-packages/*.dist-info")
    }


def test_cpu_takes_the_cpu_build_and_no_cuda_library(environment, wheels, capsys):
    _torch(wheels, "2.13.0", "13.0")
    _torch(wheels, "2.13.0+cpu", None)
    setup.install_torch(environment, "cpu")
    assert _packages(environment) == {"torch-2.13.0+cpu"}
    assert "torch==2.13.0 for cpu … a CPU build" in capsys.readouterr().out


def test_cpu_without_a_cpu_build_takes_what_there_is_with_its_libraries(environment, wheels, capsys):
    _torch(wheels, "2.13.0", "13.0")
    setup.install_torch(environment, "cpu")
    assert _packages(environment) == {"torch-2.13.0", "nvidia_fake-13.0.0", "triton-3.7.1"}
    assert "no CPU build of torch could be had" in capsys.readouterr().out


def test_cuda_passes_over_a_cpu_build_lying_nearer(environment, wheels):
    _torch(wheels, "2.13.0", "13.0")
    _torch(wheels, "2.13.0+cpu", None)
    setup.install_torch(environment, "cuda")
    assert _packages(environment) == {"torch-2.13.0", "nvidia_fake-13.0.0", "triton-3.7.1"}


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu"])
def test_cuda_refuses_a_cpu_build(environment, wheels, version):
    _torch(wheels, version, None)
    with pytest.raises(setup.SetupError, match=r"torch==2\.13\.0"):
        setup.install_torch(environment, "cuda")
    assert _packages(environment) == set()


def test_changing_the_accelerator_changes_the_build(environment, wheels):
    _torch(wheels, "2.13.0", "13.0")
    _torch(wheels, "2.13.0+cpu", None)
    for accelerator in ("cpu", "cuda"):
        setup.install_torch(environment, accelerator)
        environment.record(accelerator)
    assert "torch-2.13.0" in _packages(environment)
    setup.install_torch(environment, "cpu")
    # triton stays: the tests' extra names it too.
    assert _packages(environment) == {"torch-2.13.0+cpu", "triton-3.7.1"}


def test_a_missing_package_is_named(environment):
    with pytest.raises(setup.SetupError, match=r"^nvidia-absent.*the same command continues$"):
        environment.install("base", ["nvidia-absent==1.0"])


def test_no_network_is_one_line_naming_the_package(environment):
    environment.no_index = False
    del environment.variables["UV_FIND_LINKS"]
    environment.variables |= {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    with pytest.raises(setup.SetupError) as error:
        environment.install("base", ["rich==15.0.0"])
    assert str(error.value).startswith("rich")
    assert "onnect" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_network_under_pip_is_told_from_a_missing_package():
    broken = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError': /simple/{}/\n"
    output = (
        broken.format("accelerate") + broken.format("aiohttp") + "ERROR: No matching distribution found for aiohttp\n"
    )
    told = setup.explain("base", output)
    assert told.startswith("aiohttp could not be installed: no package index answered")
    foreign = "error: Failed to fetch\n  cause: invalid peer certificate: UnknownIssuer\n"
    assert "UnknownIssuer (a proxy that inspects? PIP_CERT=" in setup.explain("torch", foreign)
    assert "No matching" in setup.explain("base", "ERROR: No matching distribution found for aiohttp==1\n")


def test_wrong_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 2))
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 to 3\.13 is needed, this is 3\.14\.2"):
        setup.check_machine(tmp_path, "cpu")


def test_no_venv_module(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(setup.SetupError, match=r"no venv module.*apt-get install python3\.\d+-venv"):
        setup.check_machine(tmp_path, "cpu")


def test_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(setup.SetupError, match="cannot be written to"):
        setup.check_machine(tmp_path / "repo" / ".venv", "cpu")


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(setup.NEEDED_GB, "cpu", 10**9)
    with pytest.raises(setup.SetupError, match="GB free; about 1000000000 GB are needed"):
        setup.check_machine(tmp_path / ".venv", "cpu")


def test_without_a_home_downloads_are_kept_in_the_environment(environment, monkeypatch):
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(setup, "pip_settings", lambda python: {})
    monkeypatch.setenv("LOOMVIDEO_INSTALLER", "pip")
    environment.find_installer()
    assert environment.variables["UV_CACHE_DIR"] == str(environment.venv / ".cache")


def test_accelerator_is_cpu_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.detect_accelerator() == "cpu"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert setup.detect_accelerator() == "cuda"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'Python 2.7.18' >&2; [ \"$1\" = --version ]", "Python 2.7.18"),
        (None, "python does not run"),
    ],
)
def test_make_refuses_what_cannot_even_read_the_script(tmp_path, script, found):
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    command = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("error"))
    assert line.startswith("error: Python 3.11 to 3.13 is needed (")
    assert found in line


def test_a_path_with_spaces(tmp_path, wheels):
    """Of the repository, the environment, the packages and the Python: everything that a shell might split."""
    _torch(wheels, "2.13.0+cpu", None)
    repository = tmp_path / "my clone"
    (repository / "infra").mkdir(parents=True)
    (repository / "locks").mkdir()
    (repository / "infra" / "setup").symlink_to(REPO / "infra" / "setup")
    for name in ("Makefile", "pyproject.toml", "locks/base.txt", "locks/torch-cuda.txt", "locks/gpu.txt"):
        (repository / name).symlink_to(REPO / name)
    python = tmp_path / "my python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nmkdir .venv; printf "%s|" "$@" >asked\n'
    )
    python.chmod(0o755)
    subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=repository, check=True, capture_output=True)
    assert (repository / "asked").read_text() == "infra/setup/environment.py|--venv|.venv|"
    made = setup.Environment(repository / "my environment")
    made.uv = str(UV)
    made.no_index = True
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, made.venv], check=True)
    places = wheels.rename(tmp_path / "my wheels").as_uri()
    made.variables = {**os.environ, "UV_FIND_LINKS": places, "UV_CACHE_DIR": str(tmp_path / "my cache")}
    made.install("torch", ["torch==2.13.0+cpu"])
    assert "torch-2.13.0+cpu" in _packages(made)


def test_bytecode_is_compiled_where_no_process_may_keep_it(environment, wheels, capsys):
    _wheel(wheels, "some", "1.0", {"some/__init__.py": "", "some/for_another_python.py": "print 1\n"})
    environment.install("some", ["some==1.0"])
    setup.compile_ahead(environment)
    assert [path.name.partition(".")[0] for path in environment.venv.rglob("some/**/*.pyc")] == ["__init__"]
    assert "PYTHONDONTWRITEBYTECODE" in capsys.readouterr().out
