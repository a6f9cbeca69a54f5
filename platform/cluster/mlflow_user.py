"""The user that jobs have on an MLflow server: no administrator, owner of the experiments and models it makes.

``python mlflow_user.py URL`` waits for the server and makes the user, or sets its password, as its administrator.
Administrator and user come from the environment. The MLflow image holds this file alone: it needs only Python.
"""

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request

ADMINISTRATOR = ("MLFLOW_ADMIN_USERNAME", "MLFLOW_ADMIN_PASSWORD")
USER = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
WAIT_S = 600.0


def ensure_user(url: str, administrator: tuple[str, str], user: tuple[str, str], wait_s: float = WAIT_S) -> str:
    """Make a user, or give it the stated password and no more rights; the same call again changes nothing.

    Args:
        url: The address of the MLflow server.
        administrator: Name and password of an administrator.
        user: Name and password of the user.
        wait_s: How long the server may take to answer.

    Returns:
        ``created`` or ``kept``.

    Raises:
        ConnectionError: if the server does not answer in time.
        PermissionError: if it refuses the administrator.
    """
    _wait(url, wait_s)
    name, password = user
    body = {"username": name, "password": password}
    outcome = "kept"
    status, text = _ask(url, administrator, "GET", f"users/get?username={name}")
    if status == 404:
        outcome = "created"
        status, text = _ask(url, administrator, "POST", "users/create", body)
    elif status == 200:
        administers = json.loads(text)["user"]["is_admin"]
        status, text = _ask(url, administrator, "PATCH", "users/update-password", body)
        if status == 200 and administers:
            demoted = {"username": name, "is_admin": False}
            status, text = _ask(url, administrator, "PATCH", "users/update-admin", demoted)
    if status in (401, 403):
        raise PermissionError(f"{url}: refuses the administrator {administrator[0]!r}")
    if status != 200:
        raise ConnectionError(f"{url}: answers {status} when asked for user {name!r}: {text[:200]}")
    return outcome


def _wait(url: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"{url}: no MLflow server answers there ({error})") from error
        time.sleep(1.0)


def _ask(url: str, login: tuple[str, str], method: str, path: str, body: dict | None = None) -> tuple[int, str]:
    token = base64.b64encode(":".join(login).encode()).decode()
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def main() -> int:
    """Command line: the URL of the server is its only argument."""
    missing = [name for name in (*ADMINISTRATOR, *USER) if not os.environ.get(name)]
    if len(sys.argv) != 2 or missing:
        print(f"usage: mlflow_user.py URL, with {', '.join(missing or ADMINISTRATOR + USER)} set", file=sys.stderr)
        return 2
    administrator, user = ((os.environ[name], os.environ[password]) for name, password in (ADMINISTRATOR, USER))
    try:
        print(f"user {user[0]}: {ensure_user(sys.argv[1].rstrip('/'), administrator, user)}")
    except (ConnectionError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
