"""Reach a cluster's dashboard from a person's machine: a URL, or a port-forward to the head, with the token."""

import base64
import contextlib
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from loomvideo.platform.cluster.profile import ClusterProfile
from loomvideo.platform.cluster.render import find_kubectl
from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import PORT_FORWARD

FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


@contextlib.contextmanager
def dashboard(profile: ClusterProfile) -> Iterator[str]:
    """The URL of a cluster's dashboard, with the token in this process's environment.

    ``RAY_API_SERVER_ADDRESS`` wins over the profile; a token that is set already wins over the cluster's secret.

    Raises:
        UserError: if kubectl is needed and missing or cannot reach the cluster.
    """
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or profile.access.address
    if address:
        yield address
        return
    if profile.existing:
        raise UserError(
            f"profile {profile.name}: no address; set RAY_API_SERVER_ADDRESS=http://HEAD:8265 or access.address"
        )
    kubectl = _kubectl(profile)
    if not has_token():
        os.environ["RAY_AUTH_TOKEN"] = _token(profile, kubectl)
    os.environ["RAY_AUTH_MODE"] = "token"
    with _port_forward(profile, kubectl) as port:
        yield f"http://127.0.0.1:{port}"


def has_token() -> bool:
    """Whether Ray will find a token on this machine."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path(os.path.expanduser("~")) / ".ray" / "auth_token").is_file()


def _kubectl(profile: ClusterProfile) -> list[str]:
    executable = find_kubectl()
    if executable is None:
        raise UserError(
            "kubectl: not found; install it, or set access.address in the profile or RAY_API_SERVER_ADDRESS"
        )
    context = ["--context", profile.access.context] if profile.access.context else []
    return [executable, *context, "--namespace", profile.namespace]


def _token(profile: ClusterProfile, kubectl: list[str]) -> str:
    command = [*kubectl, "get", "secret", profile.token_secret, "--output", "jsonpath={.data.auth_token}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 or not result.stdout:
        reason = (result.stderr.strip().splitlines() or ["it has no key auth_token"])[-1]
        raise UserError(f"secret {profile.token_secret} in namespace {profile.namespace}: {reason}")
    return base64.b64decode(result.stdout).decode().strip()


@contextlib.contextmanager
def _port_forward(profile: ClusterProfile, kubectl: list[str]) -> Iterator[int]:
    command = [*kubectl, "port-forward", f"service/{profile.name}-head-svc", ":8265"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield _forwarded_port(process, profile)
    finally:
        process.terminate()
        process.wait()


def _forwarded_port(process: subprocess.Popen, profile: ClusterProfile) -> int:
    deadline = time.monotonic() + PORT_FORWARD.here()
    said = ""
    while time.monotonic() < deadline:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        line = process.stdout.readline() if ready else ""
        match = FORWARDING.search(line)
        if match:
            return int(match.group(1))
        said = line.strip() or said
        if ready and not line:
            break
    raise UserError(f"port-forward to service {profile.name}-head-svc: {said or 'no answer'}")
