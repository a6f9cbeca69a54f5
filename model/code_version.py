"""A version of the code that turns a checkpoint into pixels, for stores that keep results.

Taken from the code itself, so that a fix changes it without anybody remembering to; comments, docstrings and layout do
not count.
"""

import ast
import functools
import hashlib
from pathlib import Path

_ROOT = Path(__file__).parent
_SAMPLING = (
    "adapted_parts.py", "adapters.py", "attention.py", "blocks.py", "codec", "conditioning", "conditions.py", "dit.py",
    "few_steps.py", "float8.py", "flow.py", "guidance.py", "loading.py", "lora.py", "packing.py", "parts.py",
    "pipeline.py", "quantize.py", "sampler.py", "shortcuts.py", "sizes.py", "tasks.py",
)  # fmt: skip


@functools.cache
def sampler_version() -> str:
    """Of everything between a request and its pixels but the kernels."""
    return _version(_SAMPLING)


@functools.cache
def kernels_version() -> str:
    """Of the kernels."""
    return _version(("kernels",))


def _version(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = _ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.suffix == ".py":
                digest.update(f"{file.relative_to(_ROOT)}\n{meaning(file.read_text(encoding='utf-8'))}\n".encode())
            elif file.suffix in (".cpp", ".h", ".txt", ".json"):
                digest.update(f"{file.relative_to(_ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def meaning(source: str) -> str:
    """Python source as its syntax tree, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
