"""Text of the command line and of YAML files as values of declared types.

YAML guesses a type from how a value looks: ``off`` is false, ``12:30`` is 750, ``#3`` is a comment. Here the declared
type decides. Where text is wanted, it is taken as it stands; elsewhere a plain value follows YAML 1.2's core schema.
"""

import dataclasses
import re
import types
import typing
from typing import Any

import yaml

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LIST_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*?)\s*(,|$)""", re.DOTALL)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


class Plain(str):
    """A scalar that stood in YAML without quotes, as it was written."""


class _Composer(yaml.SafeLoader):
    """Reads the nodes of a document; nothing is resolved by it."""


def read_yaml(text: str) -> Any:
    """A document of mappings, lists and scalars; unquoted scalars are :class:`Plain`, empty documents None.

    Raises:
        ValueError: in one line, for text that is no YAML, repeated keys and tags.
    """
    try:
        node = yaml.compose(text, Loader=_Composer)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return None if node is None else _value(node)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"line {line}: a key must be a plain name")
        if key.value in values:
            raise ValueError(f"line {line}: key {key.value} is there twice")
        values[key.value] = _value(item)
    return values


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error).partition("\n")[0]


def core_value(text: str) -> Any:
    """What an unquoted scalar is in YAML 1.2's core schema: null, boolean, integer, float, else the text."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text) or _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".n", "n")
                     .replace(".N", "N"))  # fmt: skip
    return str(text)


def typed(value: Any, hint: Any) -> Any:
    """A value from :func:`read_yaml` with its unquoted scalars resolved for a declared type."""
    hint, optional = _without_none(hint)
    if isinstance(value, Plain):
        if hint is str:
            return None if value in _NULL[1:] else str(value)
        return None if value in _NULL and optional else core_value(value)
    if isinstance(value, list):
        inner = (typing.get_args(hint) or (Any,))[0]
        return [typed(item, inner) for item in value]
    if isinstance(value, dict):
        fields = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        inner = (typing.get_args(hint) or (Any, Any))[-1]
        return {key: typed(item, fields.get(key, inner)) for key, item in value.items()}
    return value


def parse_text(text: str, hint: Any) -> Any:
    """The value of a ``key=text`` argument for a declared type.

    - text: as it stands, whatever it holds;
    - text that may be absent: the same, ``null`` for none;
    - a list: ``[a,b]``, or one item without brackets; items of text stand as they are unless quoted;
    - anything else: YAML where it starts with a bracket, a brace or a quote, a plain value otherwise.

    Raises:
        ValueError: in one line, when brackets, braces or quotes do not close.
    """
    hint, optional = _without_none(hint)
    if hint is str:
        return None if optional and text == "null" else text
    stripped = text.strip()
    if typing.get_origin(hint) in (list, tuple) or hint in (list, tuple):
        inner = (typing.get_args(hint) or (Any,))[0]
        if not stripped.startswith("["):
            return [typed(Plain(stripped), inner)] if stripped else []
        if inner is str:
            return _text_items(stripped)
    if stripped.startswith(("[", "{", '"', "'")):
        return typed(read_yaml(stripped), hint)
    return typed(Plain(stripped), hint) if stripped else ""


def _text_items(text: str) -> list[str]:
    if not text.endswith("]"):
        raise ValueError("the list does not end in ]; put items that hold brackets in quotes")
    inside = text[1:-1]
    items, position = [], 0
    while position < len(inside) and inside[position:].strip():
        match = _LIST_ITEM.match(inside, position)
        if match is None:
            raise ValueError(f"text after a closing quote: {inside[position:]}")
        item = match[1]
        items.append(read_yaml(item) if item[:1] in ("'", '"') and item[-1:] == item[0] and len(item) > 1 else item)
        position = match.end()
    return items


def type_at(schema: type, key: str) -> Any:
    """The declared type of ``section.key``; ``Any`` inside open mappings without one, and for unknown keys."""
    hint: Any = schema
    for part in key_parts(schema, key):
        hint, _ = _without_none(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(part, Any)
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            return Any
    return hint


def key_parts(schema: type, key: str) -> list[str]:
    """``section.key`` in its parts; what follows a mapping of plain values is one name, dots and all.

    So ``head.node_selector.cloud.google.com/gke-nodepool`` has three parts, as Kubernetes' labels need.
    """
    hint: Any = schema
    parts = key.split(".")
    for position, part in enumerate(parts):
        hint, _ = _without_none(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(part, Any)
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
            if hint in (str, int, float, bool):
                return [*parts[:position], ".".join(parts[position:])]
        else:
            break
    return parts


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return (inner[0] if len(inner) == 1 else Any), len(inner) < len(typing.get_args(hint))
    return hint, False


class _TypedDumper(yaml.SafeDumper):
    """Quotes every text that :func:`core_value` or another YAML reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML folds some line ends outside double quotes.
    style = '"' if _CONTROL.search(text) else None if isinstance(core_value(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_TypedDumper.add_representer(str, _text_node)


def write_yaml(values: Any) -> str:
    """Plain values as YAML that :func:`read_yaml` and :func:`typed` read back unchanged."""
    return yaml.dump(values, Dumper=_TypedDumper, sort_keys=False, allow_unicode=True, width=120)
