"""Who may ask: one token for everybody, or one a person with quotas of their own."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from loomvideo.platform.errors import UserError

_KEYS = ("token", "token_sha256", "max_active", "max_per_day")


@dataclass(frozen=True)
class User:
    """A person. Quotas are requests that wait or run, and requests in 24 hours; None takes the server's, 0 is none."""

    name: str
    max_active: int | None = None
    max_per_day: int | None = None

    def quotas(self, max_active: int, max_per_day: int) -> tuple[int, int]:
        """Their quotas, given the server's."""
        own = (self.max_active, self.max_per_day)
        return tuple(
            default if quota is None else quota for quota, default in zip(own, (max_active, max_per_day), strict=True)
        )


EVERYBODY = User("")


@dataclass(frozen=True)
class Users:
    """People by the SHA-256 of their token; none lets everyone in as :data:`EVERYBODY`."""

    by_hash: Mapping[str, User] = field(default_factory=dict)

    @classmethod
    def read(cls, token: str = "", file: str = "") -> "Users":
        """People of a YAML file, ``NAME: {token: …, max_active: …, max_per_day: …}``, and one token for everybody.

        Args:
            token: Lets in whoever has it, without a name; empty for none.
            file: The file; empty for none. ``token_sha256`` may stand in place of ``token``.

        Raises:
            UserError: naming file, person and key.
        """
        users = {_hash(token): EVERYBODY} if token else {}
        for name, values in _read(file).items():
            known, user = _user(file, name, values)
            if known in users:
                raise UserError(
                    f"users={file}: {name}: token is {users[known].name or 'everybody'}'s too; make another"
                )
            users[known] = user
        return cls(users)

    def find(self, token: str) -> User | None:
        """Whose token it is; None for nobody's."""
        if not self.by_hash:
            return EVERYBODY
        given, found = _hash(token), None
        for known, user in self.by_hash.items():  # all of them: how long it takes says nothing
            found = user if hmac.compare_digest(known, given) else found
        return found


def _read(file: str) -> Mapping[str, object]:
    if not file:
        return {}
    try:
        stated = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"users={file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(stated, dict) or not stated:
        raise UserError(f"users={file}: expected a line NAME: {{token: …}} for each person")
    return stated


def _user(file: str, name: str, values: object) -> tuple[str, User]:
    where = f"users={file}: {name}"
    if not isinstance(values, dict) or set(values) - set(_KEYS):
        raise UserError(f"{where}: expected {', '.join(_KEYS)}")
    if ("token" in values) == ("token_sha256" in values):
        raise UserError(f"{where}: give one of token and token_sha256")
    for key in ("max_active", "max_per_day"):
        if not isinstance(values.get(key, 0), int) or values.get(key, 0) < 0:
            raise UserError(f"{where}: {key}={values[key]!r}: expected a number, 0 for no limit")
    if "token" in values and len(str(values["token"])) < 16:
        raise UserError(f"{where}: token is shorter than 16 characters; make one with: openssl rand -hex 24")
    hashed = str(values.get("token_sha256", "")).lower() or _hash(str(values["token"]))
    return hashed, User(str(name), values.get("max_active"), values.get("max_per_day"))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
