"""Structured captions: JSON schemas with vocabularies, and their check."""

import json
import re
from typing import Any

import jsonschema

CATEGORIES = (
    "dress", "coat", "jacket", "blazer", "vest", "shirt", "blouse", "t-shirt", "top", "sweater", "hoodie", "cardigan",
    "trousers", "jeans", "shorts", "skirt", "jumpsuit", "suit", "swimwear", "underwear", "shoes", "bag", "hat", "scarf",
    "jewellery", "other",
)  # fmt: skip
COLOURS = (
    "black", "white", "grey", "beige", "brown", "red", "pink", "orange", "yellow", "green", "blue", "navy", "purple",
    "gold", "silver", "multicoloured",
)  # fmt: skip
PATTERNS = ("plain", "striped", "checked", "dotted", "floral", "animal", "graphic", "logo", "lace", "other")
FABRICS = (
    "cotton", "denim", "wool", "knit", "silk", "satin", "linen", "leather", "fur", "chiffon", "lace", "synthetic",
    "unknown",
)  # fmt: skip
FITS = ("slim", "regular", "loose", "oversized", "flared", "unknown")
NECKLINES = ("round", "v-neck", "collar", "turtleneck", "off-shoulder", "halter", "square", "hood", "none", "unknown")
SLEEVES = ("sleeveless", "short", "half", "three-quarter", "long", "none", "unknown")
LENGTHS = ("cropped", "hip", "thigh", "knee", "midi", "ankle", "floor", "none", "unknown")
CLOSURES = ("none", "buttons", "zip", "snaps", "hooks", "laces", "belt", "wrap", "drawstring", "buckle", "unknown")
LOGOS = ("none", "small", "large", "all over", "unknown")
FRAMINGS = ("face", "upper body", "knees up", "full body", "detail", "product alone", "other")
LIGHTS = ("soft studio", "hard studio", "daylight", "backlight", "indoor", "night", "mixed", "unknown")
VERDICTS = ("yes", "partly", "no")
MOTIONS = ("still", "standing", "walking", "turning", "posing", "sitting", "dancing", "running", "other")

GARMENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "category": {"enum": list(CATEGORIES)},
        "colour": {"enum": list(COLOURS)},
        "pattern": {"enum": list(PATTERNS)},
        "fabric": {"enum": list(FABRICS)},
        "fit": {"enum": list(FITS)},
        "neckline": {"enum": list(NECKLINES)},
        "sleeve": {"enum": list(SLEEVES)},
        "length": {"enum": list(LENGTHS)},
        "closure": {"enum": list(CLOSURES)},
        "logo": {"enum": list(LOGOS)},
    },
    "additionalProperties": False,
}
GARMENT_SCHEMA["required"] = list(GARMENT_SCHEMA["properties"])


def answer_schema(mode: str, code: str, wordings: int = 0) -> dict[str, Any]:
    """The schema of an answer; ``id`` must come back as it was sent.

    Args:
        mode: ``caption``, ``fashion``, ``instruction``, or ``verify`` for the second question about an instruction.
        code: The code of the request, see :func:`~loomvideo.pipelines.captions.requests.CaptionRequest.code`.
        wordings: Other wordings of the text that are asked for.
    """
    sentence = {"type": "string", "minLength": 8, "maxLength": 2000}
    properties: dict[str, Any] = {"id": {"enum": [code]}}
    if mode == "verify":
        properties |= {"reason": sentence, "verdict": {"enum": list(VERDICTS)}}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    if mode == "fashion":
        properties |= {
            "garments": {"type": "array", "items": GARMENT_SCHEMA, "minItems": 1, "maxItems": 8},
            "background": {"type": "string", "minLength": 2, "maxLength": 200},
            "motion": {"enum": list(MOTIONS)},
            "framing": {"enum": list(FRAMINGS)},
            "light": {"enum": list(LIGHTS)},
        }
    properties["instruction" if mode == "instruction" else "sentence"] = sentence
    if wordings:
        properties["wordings"] = {"type": "array", "items": sentence, "minItems": wordings, "maxItems": wordings}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class InvalidAnswerError(Exception):
    """An answer that is no caption; ``mixed_up`` when it belongs to another request."""

    def __init__(self, message: str, mixed_up: bool = False):
        super().__init__(message)
        self.mixed_up = mixed_up


def parse_answer(text: str, mode: str, code: str, wordings: int = 0) -> dict[str, Any]:
    """The answer's fields without the id.

    Raises:
        InvalidAnswerError: naming the field that breaks the schema.
    """
    return json_answer(text, answer_schema(mode, code, wordings), code)


def json_answer(text: str, schema: dict[str, Any], code: str) -> dict[str, Any]:
    """The fields without the id of an answer of any schema.

    Raises:
        InvalidAnswerError: naming the field that breaks the schema.
    """
    # Models without guided decoding wrap JSON in a fence or a sentence.
    braces = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        answer = json.loads(braces.group(0)) if braces else None
    except json.JSONDecodeError as error:
        raise InvalidAnswerError(f"no JSON: {error}") from error
    if not isinstance(answer, dict):
        raise InvalidAnswerError("no JSON object")
    if answer.get("id") != code:
        raise InvalidAnswerError(f"answers {answer.get('id')!r}, asked {code!r}", mixed_up="id" in answer)
    try:
        jsonschema.validate(answer, schema)
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "answer"
        raise InvalidAnswerError(f"{where}: {error.message[:200]}") from error
    return {name: value for name, value in answer.items() if name != "id"}
