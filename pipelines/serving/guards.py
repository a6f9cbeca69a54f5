"""Who may ask a server that a browser can reach: checks against foreign pages and rebound names."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_CHANGES = ("POST", "PUT", "PATCH", "DELETE")
# What a page of any origin may send without asking first: none is a body of this interface.
_FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")


def check_host(request: Request, names: Sequence[str]) -> None:
    """Refuse a name that this server is not known by: a foreign page may point its own name at our address.

    Args:
        request: What came in.
        names: Names without ports; none accepts every one.

    Raises:
        HTTPException: 421.
    """
    name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    if names and name not in names:
        raise HTTPException(421, f"this server does not answer as {name[:100]}; whoever runs it can add it to hosts")


def check_origin(request: Request) -> None:
    """Refuse a change that a page of another origin sends, and bodies that need no preflight.

    Raises:
        HTTPException: 403 or 415.
    """
    if request.method not in _CHANGES:
        return
    origin = request.headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
    if foreign or request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise HTTPException(403, "another site's page may not ask for this")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORM_TYPES:
        raise HTTPException(415, f"content-type {kind}: send application/json, or a file as application/octet-stream")
