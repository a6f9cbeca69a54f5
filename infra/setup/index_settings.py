"""The package-index settings of a person's pip, in the words of uv.

uv reads its own ``UV_*`` variables and files but nothing of pip's, and what companies hand out are pip settings: a
mirror, a proxy, a certificate, a folder of wheels. Only what uv was not told itself is added.
"""

import ast
import os
import ssl
import subprocess
from collections.abc import Mapping

# pip's key, uv's variable. pip lets the best version of all places win, so uv is told to do the same where we hand
# it pip's places.
_PLAIN = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "keyring-provider": "UV_KEYRING_PROVIDER",
    "timeout": "UV_HTTP_TIMEOUT",
    "retries": "UV_HTTP_RETRIES",
}
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
_UV_KEYRING = {"disabled", "subprocess"}


def pip_settings(python: str) -> dict[str, str]:
    """What ``pip config list`` of a Python says for installing: files first, then environment variables over them."""
    shown = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, str] = {}
    # The order in which pip itself lets one overrule another.
    sections = {"global": 0, "install": 1, ":env:": 2}
    lines = [line.partition("=") for line in shown.stdout.splitlines() if "=" in line]
    ranked = [(sections.get(name.rpartition(".")[0].rstrip("."), -1), name, value) for name, _, value in lines]
    for rank, name, value in sorted(ranked, key=lambda entry: entry[0]):
        if rank >= 0:
            found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return found


def uv_variables(pip: Mapping[str, str], environment: Mapping[str, str], find_links: bool = True) -> dict[str, str]:
    """The variables to start uv with.

    Args:
        pip: Settings as :func:`pip_settings` gives them.
        environment: The variables uv would have anyway; what they say stays.
        find_links: Whether folders of wheels and additional indexes count, or only the main index.
    """
    added = {variable: pip[key] for key, variable in _PLAIN.items() if key in pip and variable not in environment}
    if added.get("UV_KEYRING_PROVIDER", "disabled") not in _UV_KEYRING:
        added["UV_KEYRING_PROVIDER"] = "subprocess"
    if not any(variable in environment for variable in _INDEX_VARIABLES):
        if "index-url" in pip:
            added["UV_DEFAULT_INDEX"] = pip["index-url"]
        if find_links and pip.get("extra-index-url"):
            added["UV_INDEX"] = " ".join(pip["extra-index-url"].split())
            added["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if find_links and pip.get("find-links") and "UV_FIND_LINKS" not in environment:
        added["UV_FIND_LINKS"] = ",".join(pip["find-links"].split())
    if pip.get("trusted-host") and "UV_INSECURE_HOST" not in environment:
        added["UV_INSECURE_HOST"] = " ".join(pip["trusted-host"].split())
    return added


def system_certificates(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that let uv trust what this machine trusts, as pip does: only there is an inspecting proxy known.

    uv brings certificates of its own, which stay in use where the machine has none. Older uv knows the second name.
    """
    if "UV_SYSTEM_CERTS" in environment or "UV_NATIVE_TLS" in environment:
        return {}
    paths = ssl.get_default_verify_paths()
    folder = paths.capath if paths.capath and os.path.isdir(paths.capath) else None
    if not paths.cafile and not (folder and os.listdir(folder)):
        return {}
    return {"UV_SYSTEM_CERTS": "true", "UV_NATIVE_TLS": "true"}


def uses_no_index(pip: Mapping[str, str]) -> bool:
    """Whether pip was told to take packages from folders alone; uv has no variable for it, only ``--no-index``."""
    return pip.get("no-index", "").lower() in ("1", "true", "yes", "on")


def has_own_index(environment: Mapping[str, str]) -> bool:
    """Whether a person said where packages come from, so that no other place may be asked."""
    return any(variable in environment for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"))


def environment_for_uv(python: str) -> dict[str, str]:
    """This process's environment with the pip settings of ``python`` added, for what needs only the main index."""
    settings = uv_variables(pip_settings(python), os.environ, find_links=False)
    return {**os.environ, **system_certificates(os.environ), **settings}
