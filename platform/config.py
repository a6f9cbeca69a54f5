"""Typed job configurations: dataclass schemas, YAML presets and ``section.key=value`` overrides.

A schema is a dataclass whose fields are declared with :func:`option`, so that a key's default and its one-line
documentation stand in one place and ``--help`` can print both. Values come, later ones winning, from the schema's
defaults, the preset's YAML file, and the command line. A key's declared type decides how its text is read
(:mod:`loomvideo.platform.typed_text`): prompts, names and paths are taken exactly as typed.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loomvideo.platform.errors import UserError
from loomvideo.platform.typed_text import key_parts, parse_text, read_yaml, type_at, typed, write_yaml

Schema = TypeVar("Schema")


def option(default: Any, help: str) -> Any:
    """Declare a documented configuration key.

    Args:
        default: The value when nothing overrides it; a dataclass type makes a section, a list or dict is copied.
        help: One line for ``--help``.
    """
    metadata = {"help": help}
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def split_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` arguments, in order.

    Raises:
        UserError: if an argument has no ``=`` or is no UTF-8.
    """
    pairs = {}
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument):
            shown = re.sub("[\ud800-\udfff]", "\ufffd", argument)
            raise UserError(f"argument {shown!r}: is not UTF-8 text; check the terminal's encoding")
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise UserError(f"argument {argument!r}: expected section.key=value")
        pairs[key] = value
    return pairs


def load_config(
    schema: type[Schema],
    overrides: Sequence[str] = (),
    preset_file: Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> Schema:
    """Build a configuration from a schema, an optional preset file and overrides.

    Args:
        schema: The dataclass that declares every key.
        overrides: ``section.key=value`` strings; the key's type decides how the value is read.
        preset_file: YAML with any part of the schema's keys.
        values: Values from Python, by key or section: ``{"training": {"steps": 3}}`` or ``{"training.steps": 3}``.

    Raises:
        UserError: naming the source, the key and the nearest valid key or the expected type.
    """
    config = OmegaConf.structured(schema)
    if preset_file is not None:
        if not preset_file.is_file():
            raise UserError(f"preset file {preset_file}: not found")
        for key, value in _leaves(_read_preset(preset_file)):
            _set(config, schema, key, typed(value, type_at(schema, key)), source=str(preset_file))
    for key, text in split_overrides(overrides).items():
        try:
            value = parse_text(text, type_at(schema, key))
        except ValueError as error:
            raise UserError(f"command line: {key}={text}: {error}") from error
        _set(config, schema, key, value, source="command line")
    for key, value in _leaves(values or {}):
        text = str(value) if isinstance(value, Path) else value
        _set(config, schema, key, typed(text, type_at(schema, key)), source="keyword arguments")
    missing = [key for key, value in _leaves(config) if value == "???"]
    if missing:
        raise UserError(f"missing configuration: set {missing[0]}=…")
    return cast(Schema, OmegaConf.to_object(config))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML."""
    return write_yaml(dataclasses.asdict(config))


def flatten(config: Any) -> dict[str, Any]:
    """The resolved configuration as ``{"section.key": value}``, for experiment tracking."""
    return dict(_leaves(dataclasses.asdict(config)))


def document_keys(schema: type) -> list[tuple[str, str, str]]:
    """Rows ``(key, default, help)`` for every key of a schema, sections flattened."""
    return list(_document(schema, ""))


def _document(schema: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    instance = schema()
    for field in dataclasses.fields(schema):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from _document(type(value), f"{prefix}{field.name}.")
        else:
            default = "required" if value == "???" else write_yaml({"v": value})[3:].strip()
            yield f"{prefix}{field.name}", default.replace("\n", " "), field.metadata.get("help", "")


def _read_preset(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"preset file {file}: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"preset file {file}: expected `key: value` lines")
    return values or {}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in node.keys():  # noqa: SIM118 - a missing (???) value is not iterated over
        child = "???" if isinstance(node, DictConfig) and OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, Mapping) and len(child):
            yield from _leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


def _literal(value: Any) -> Any:
    """A value whose texts OmegaConf leaves as they are: nothing of ours is interpolated."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return value


def _set(config: DictConfig, schema: type, key: str, value: Any, source: str) -> None:
    node = config
    *parents, last = key_parts(schema, key)
    for depth, part in enumerate(parents):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 - a missing (???) value is not `in` the node
            if isinstance(node, DictConfig) and not dataclasses.is_dataclass(OmegaConf.get_type(node)):
                break  # an open mapping: the sections in it are made
            _unknown_key(config, key, source)
        node = node[part]
        if not isinstance(node, DictConfig):
            raise UserError(f"{source}: {'.'.join(parents[: depth + 1])} is a value, not a section (in {key})")
    open_mapping = not dataclasses.is_dataclass(OmegaConf.get_type(node))
    if last not in node.keys() and not open_mapping:  # noqa: SIM118
        _unknown_key(config, key, source)
    if value == "???":
        raise UserError(f"{source}: {key}=???: this text stands for a value that is missing; write something else")
    try:
        if "." in last:
            node[last] = _literal(value)  # OmegaConf.update would take the name apart
        else:
            OmegaConf.update(config, key, _literal(value), merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        expected = getattr(node._get_node(last), "_metadata", None)
        expected_type = getattr(getattr(expected, "ref_type", None), "__name__", "another type")
        detail = f" ({str(error).splitlines()[0]})" if expected_type == "another type" else ""
        raise UserError(f"{source}: {key}={value!r} has the wrong type, expected {expected_type}{detail}") from error


def _unknown_key(config: DictConfig, key: str, source: str) -> None:
    valid = [name for name, _ in _leaves(config)]
    candidates = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    last = key.split(".")[-1]
    candidates = candidates or [name for name in valid if name.split(".")[-1] == last]
    hint = f"; did you mean {candidates[0]}?" if candidates else f"; valid keys: {', '.join(valid)}"
    raise UserError(f"{source}: unknown key {key}{hint}")
