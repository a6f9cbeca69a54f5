"""The rooms and their one-way arrows: who imports whom, circles of files, and where rooms are listed."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("platform", "model", "pipelines", "jobs")
"""From the ground up; a room imports only itself and rooms before it."""


def module_name(path: Path) -> str:
    """``loomvideo.model.dit`` of ``model/dit.py``; a package is named like its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("loomvideo", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def modules() -> dict[str, Path]:
    """All modules of the rooms."""
    return {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


@cache
def imports(lazy: bool) -> dict[str, set[str]]:
    """``{module: modules it imports}``; with ``lazy`` also inside functions, never for type checkers alone."""
    known = modules()
    graph = {}
    for name, path in known.items():
        found: set[str] = set()
        for node in _statements(ast.parse(path.read_text()), lazy):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loomvideo"):
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
                found |= inside
                # Names of a package run its __init__; its modules run it too, but do not depend on what it says.
                if node.module in known and len(inside) < len(node.names):
                    found.add(node.module)
        graph[name] = found - {name}
    return graph


def _statements(tree: ast.AST, lazy: bool) -> list[ast.AST]:
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                queue += child.orelse
            elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                found.append(child)
                queue.append(child)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_room_imports_a_room_above_it():
    height = {room: number for number, room in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {other}"
        for name, others in imports(lazy=True).items()
        for other in others
        if height[other.split(".")[1]] > height[name.split(".")[1]]
    ]
    assert wrong == []


@pytest.mark.parametrize("lazy", [False, True], ids=["when imported", "when called"])
def test_no_files_import_each_other_in_a_circle(lazy):
    assert circles(imports(lazy)) == []


def test_the_model_room_knows_no_cluster_and_no_tracking():
    wrong = [
        f"{name}: {line.strip()}"
        for name, path in modules().items()
        if name.startswith("loomvideo.model")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(import|from) (ray|mlflow|deepspeed)\b", line)
    ]
    assert wrong == []


def test_a_class_has_a_name_of_its_own():
    found = defaultdict(list)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


def test_tables_and_bars_are_made_in_one_place():
    made = re.compile(r"(?<![\w.])(Console|Table|Text|BarColumn)\(")
    makers = [name for name, path in modules().items() if made.search(path.read_text())]
    assert makers == ["loomvideo.platform.console"]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def packages() -> list[str]:
    """Folders of the rooms that hold modules, as ``pipelines/prepare``."""
    return sorted({path.parent.relative_to(ROOT).as_posix() for path in modules().values()})


def test_every_package_has_a_line_in_the_architecture_page():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms inside the rooms")[2]
    listed = re.findall(r"^\| `([a-z_/0-9]+)/` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == packages()


def test_every_room_has_a_line_in_the_readme():
    listed = re.findall(r"^\| `(\w+)/` \| `loomvideo\.(\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == [(room, room) for room in ROOMS]


def test_every_package_is_packed():
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    named = {f"loomvideo.{folder.replace('/', '.')}" for folder in packages()}
    assert named == set(packed)
    assert len(packed) == len(set(packed))


def test_pipelines_has_no_files_beside_its_rooms():
    assert [path.name for path in (ROOT / "pipelines").glob("*.py")] == ["__init__.py"]


def test_tests_mirror_the_rooms():
    wrong = [
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / "tests" / room).rglob("test_*.py")
        if not (ROOT / path.parent.relative_to(ROOT / "tests")).is_dir()
    ]
    assert wrong == []


HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "pandas", "cv2", "pyarrow")


@pytest.mark.parametrize(
    "statement",
    [
        "from loomvideo.jobs import prepare, pretrain, finetune_edit, distill, prefer, evaluate, generate",
        "import loomvideo.model",
        "import loomvideo.jobs.cli",
        "from loomvideo.platform.shards import ShardDataset",
    ],
)
def test_the_door_opens_without_loading_anything_heavy(statement):
    script = f"{statement}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_decoder_starts_without_the_compiler():
    """Tens of decoders start for each GPU; importing the compiler was 2.6 of 4.4 seconds of CPU and 140 MB of each."""
    script = "import loomvideo.pipelines.prepare.loading, sys; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_training_starts_without_transformers():
    """Its controller and every rank imported them for 2.7 of 6 seconds, and an MLLM is in no training process."""
    script = "import loomvideo.jobs.training.job, sys; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_every_catch_of_everything_says_why():
    """Reading loops catch what readers raise; where anything at all is caught, a comment gives the reason."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                if re.match(r"\s*except (Exception|BaseException)\b", line) or re.match(r"\s*except:", line):
                    # Beside it, or in the block where it stands.
                    near = [line, *lines[number + 1 : number + 4]]
                    raised = lines[number + 1].strip() == "raise" or lines[number + 2].strip() == "raise"
                    if not raised and not any("#" in one for one in near):
                        found.append(f"{path.relative_to(ROOT)}:{number + 1}")
    assert found == []


def test_arguments_are_described_by_what_they_are():
    """``config: The configuration of the job.``, not ``config: Of the job.``, of which nobody knows what it is."""
    bare = re.compile(r"\s+\w+(, \w+)*: (Of|On|In|At|From|For|As|By|Per|With|Whose) ")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bare.match(line)
    ]
    assert found == []
