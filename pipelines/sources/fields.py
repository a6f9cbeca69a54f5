"""What the fields of a row may be: every reader's values pass here before they become a sample.

Spreadsheets, JSON and Parquet bring numbers where text is meant, cells that say ``N/A``, bytes in another encoding.
A value that has one meaning takes it; any other is a :class:`FieldError` with a reason code, and costs its row alone.
"""

import contextlib
import datetime
import decimal
import hashlib
import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from loomvideo.model.conditioning.prompts import SPECIAL_TOKENS
from loomvideo.platform.errors import UserError

KEY_PATTERN = re.compile(r"[0-9a-zA-Z_-]{1,80}")
# What pandas, spreadsheets and ffprobe write for a value that is not there.
MISSING_CELLS = frozenset(
    ("nan", "NaN", "null", "NULL", "None", "N/A", "n/a", "NA", "#N/A", "<NA>", "NaT", "undefined", "-")
)
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("heldout", "held-out", "held_out", "validation", "valid", "val", "test", "dev", "eval"), "heldout"
    ),
}
MAX_FPS = 1000.0
_MAX_DEPTH = 32
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


class FieldError(UserError):
    """A value that a field cannot have; ``reason`` is its code in the accounts."""

    def __init__(self, field: str, problem: str, reason: str = "invalid_field"):
        super().__init__(f"{field}: {problem}")
        self.reason = reason


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, empty or blank text, NaN."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value != value


def cell(text: str) -> str:
    """A cell of a table that has nothing but text: what stands for a missing value becomes empty."""
    return "" if text.strip() in MISSING_CELLS else text


def clean_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sample with the types they must have; fields without a value are left out.

    Raises:
        FieldError: naming the field, what was found and its reason code.
    """
    cleaned: dict[str, Any] = {}
    extra = mapping(values.get("extra"), "extra")
    for field, value in values.items():
        if field in _CLEAN:
            cleaned[field] = _CLEAN[field](value, field)
        elif field == "key":
            given = name(value, field)
            if given is not None and not KEY_PATTERN.fullmatch(given):
                extra.setdefault("source_id", given)
                given = make_key(str(values.get("dataset") or ""), given)
            cleaned[field] = given
    if "fps" in extra and (fps := rate(extra.pop("fps"), "extra.fps")) is not None:
        extra["fps"] = fps
    cleaned["extra"] = extra
    return {field: value for field, value in cleaned.items() if value not in (None, "", [], {})}


def text(value: Any, field: str) -> str | None:
    """A text as a model will read it, without spaces around it; None when there is none.

    Raises:
        FieldError: for what is no text, and for text that no file or tokenizer can hold.
    """
    if is_missing(value):
        return None
    value = _decoded(value)
    if not isinstance(value, str):
        raise FieldError(field, f"expected text, found {_described(value)}")
    _check_characters(value, field)
    if (found := _SPECIAL.search(value)) is not None:
        raise FieldError(field, f"contains the special token {found[0]}: remove it", "invalid_text")
    return value.strip()


def _decoded(value: Any) -> Any:
    """Bytes as the text they are: Spark and others write Parquet texts without saying that they are text."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value


def name(value: Any, field: str) -> str | None:
    """A name or id: text, or a whole number that a spreadsheet made of one (17.0 is 17).

    Raises:
        FieldError: for anything else.
    """
    if is_missing(value):
        return None
    if not isinstance(value, str):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FieldError(field, f"expected a name, found {_described(value)}")
        value = str(value)
    shown = value.strip()
    _check_characters(shown, field)
    return shown


def path(value: Any, field: str) -> str | None:
    """One path or URL.

    Raises:
        FieldError: for anything but text.
    """
    if is_missing(value):
        return None
    value = _decoded(value)
    if not isinstance(value, str):
        raise FieldError(field, f"expected one path, found {_described(value)}")
    _check_characters(value, field)
    return value.strip()


def paths(value: Any, field: str) -> list[str]:
    """Several paths: a list, or one path as text.

    Raises:
        FieldError: for anything else, and for an empty entry, whose place would shift the others.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise FieldError(field, f"expected a list of paths, found {_described(value)}")
    found = [path(item, f"{field}[{number}]") for number, item in enumerate(value)]
    if None in found:
        raise FieldError(f"{field}[{found.index(None)}]", "is empty")
    return [item for item in found if item]


def texts(value: Any, field: str) -> list[str]:
    """Several texts: a list, or one.

    Raises:
        FieldError: for anything else, and for an empty entry.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise FieldError(field, f"expected a list of texts, found {_described(value)}")
    found = [text(item, f"{field}[{number}]") for number, item in enumerate(value)]
    if None in found:
        raise FieldError(f"{field}[{found.index(None)}]", "is empty")
    return [item for item in found if item]


def split(value: Any, field: str) -> str | None:
    """``train`` or ``heldout``, by any of the names in use (validation, val, test, dev, …).

    Raises:
        FieldError: for a split that nothing would read.
    """
    given = name(value, field)
    if given is None:
        return None
    if given.lower() not in SPLITS:
        raise FieldError(field, f"{given!r} is none of {', '.join(SPLITS)}")
    return SPLITS[given.lower()]


_CLEAN = {
    **dict.fromkeys(("instruction", "caption"), text),
    **dict.fromkeys(("dataset", "task", "licence", "group"), name),
    **dict.fromkeys(("target", "source"), path),
    "references": paths,
    "texts": texts,
    "split": split,
}


def rate(value: Any, field: str) -> float | None:
    """Frames a second: a number, ``30000/1001`` or ``29.97 fps``; None for ``N/A`` and ``0/0``.

    Raises:
        FieldError: for anything else, and rates that no file has.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        given = re.sub(r"\s*fps$", "", value.strip(), flags=re.IGNORECASE).replace(",", ".")
        if given in MISSING_CELLS or given in ("0", "0/0"):
            return None
        try:
            value = float(Fraction(given))
        except (ValueError, ZeroDivisionError) as error:
            raise FieldError(field, f"{given!r} is no frame rate") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(field, f"expected a frame rate, found {_described(value)}")
    if not 0 < value <= MAX_FPS:
        raise FieldError(field, f"{value:g} is no frame rate")
    return float(value)


def mapping(value: Any, field: str) -> dict[str, Any]:
    """An object, or its JSON text, with values that JSON can hold.

    Raises:
        FieldError: for anything else.
    """
    if is_missing(value):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FieldError(field, "is text, and no JSON object") from error
    if not isinstance(value, Mapping):
        raise FieldError(field, f"expected an object, found {_described(value)}")
    return storable(value, field)


def storable(value: Any, field: str, depth: int = 0) -> Any:
    """A value as JSON holds it: times and decimals become text and numbers, NaN becomes null.

    Raises:
        FieldError: for bytes, other objects, and nesting that readers refuse.
    """
    if depth > _MAX_DEPTH:
        raise FieldError(field, f"is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        _check_characters(value, field)
        return value
    if isinstance(value, Mapping):
        return {str(key): storable(item, f"{field}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item, f"{field}[{number}]", depth + 1) for number, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return float(value) if value.is_finite() else None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    raise FieldError(field, f"{_described(value)} cannot be kept; leave the column out")


def make_key(dataset: str, name: str, *identity: object) -> str:
    """A unique key: a readable part, and a hash of everything that identifies the sample in its dataset.

    Texts that differ in spaces alone identify the same sample.
    """
    readable = re.sub(r"[^0-9a-zA-Z]+", "-", f"{dataset}-{name}").strip("-")[:60]
    digest = hashlib.sha256(repr((dataset, name, *map(without_spaces, identity))).encode()).hexdigest()[:12]
    return f"{readable}-{digest}"


def without_spaces(value: Any) -> Any:
    """A text with its runs of white space made one space; other values as they are."""
    return " ".join(value.split()) if isinstance(value, str) else value


def _check_characters(value: str, field: str) -> None:
    if "\0" in value:
        raise FieldError(field, "holds a NUL character", "invalid_text")
    if value.isascii():
        return
    found = re.search("[\ud800-\udfff]", value)
    if found is None:
        return
    if "\udc80" <= found[0] <= "\udcff":
        problem = "is not UTF-8; name the file's encoding: source_options.encoding=cp1252 (or gbk, shift_jis, …)"
        raise FieldError(field, problem, "not_utf8")
    raise FieldError(field, f"holds half a character (\\u{ord(found[0]):04x})", "invalid_text")


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"
