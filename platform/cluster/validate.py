"""Check manifests, images and scripts without a cluster: schemas, operators' rules, cross references, secrets, lint."""

import contextlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import yaml

from loomvideo.platform.cluster.admission import ENFORCE, object_problems, quota_problems, restricted_problems
from loomvideo.platform.cluster.network import network_problems
from loomvideo.platform.cluster.operator_pods import pods_of
from loomvideo.platform.cluster.privileges import privilege_problems
from loomvideo.platform.cluster.profile import ClusterProfile
from loomvideo.platform.cluster.references import Given, reference_problems
from loomvideo.platform.cluster.render import KUBERNETES, build, find_kubectl, write_folder
from loomvideo.platform.cluster.rules import rule_problems
from loomvideo.platform.cluster.schemas import CRDS_VARIABLE, Loader, crd_folder, schema_problems
from loomvideo.platform.errors import UserError, how_to_add

SECRET_NAMES = re.compile(r"password|passwd|secret|token|access_?key|api_?key|credential", re.IGNORECASE)
SECRET_VALUES = {
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "password in a URL": re.compile(r"\b[a-z][a-z0-9+]{0,20}://[^\s/:@$%]+:[^\s/@$%]+@"),
    "bearer token": re.compile(r"\bBearer +[0-9a-zA-Z._~+/=-]{20,}"),
    "Hugging Face token": re.compile(r"\bhf_[0-9a-zA-Z]{30,}\b"),
}


RAY_KINDS = ("RayCluster", "RayJob", "RayService")


@dataclass
class Report:
    """What was checked.

    Attributes:
        checked: Number of objects and files.
        problems: ``where: what``, empty when all is well.
        skipped: Checks that could not run here and why.
    """

    checked: int = 0
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, where: str, problems: Iterable[str]) -> None:
        """Count one thing and keep its problems."""
        self.checked += 1
        self.problems += [f"{where}: {problem}" for problem in problems]


def validate_manifests(
    manifests: list[dict[str, Any]], given: Given, kubernetes_version: str, report: Report, source: str
) -> None:
    """Check a set of objects that are applied together."""
    crds = crd_folder()
    if crds is None:
        _skip(
            report,
            f"KubeRay schemas: set {CRDS_VARIABLE} to a folder with ray.io_rayclusters.yaml, ray.io_rayjobs.yaml",
        )
    seen: set[tuple[str, str]] = set()
    for manifest in manifests:
        identity = (manifest.get("kind", "?"), manifest.get("metadata", {}).get("name", "?"))
        where = f"{source}: {identity[0]} {identity[1]}"
        problems = list(schema_problems(manifest, kubernetes_version, crds))
        # The operators' rules read fields that a schema problem may have put in doubt.
        problems = problems or list(rule_problems(manifest))
        problems += [*secret_problems(manifest), *object_problems(manifest)]
        if identity in seen:
            problems.append("defined twice")
        seen.add(identity)
        report.add(where, problems)
    across = (reference_problems(manifests, given), privilege_problems(manifests, given), admission_problems(manifests))
    for manifest, problem in itertools.chain(*across):
        report.problems.append(f"{source}: {manifest['kind']} {manifest['metadata']['name']}: {problem}")


def admission_problems(manifests: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """``(object, problem)`` for pods that the API server would refuse or the network policies would cut off.

    Pods are read as the operators make them. Where the namespace does not enforce the restricted standard, only what
    a group's own capabilities and the host's network break of it is allowed.
    """
    enforced = [m["metadata"].get("labels", {}).get(ENFORCE) for m in manifests if m.get("kind") == "Namespace"]
    quotas = [manifest for manifest in manifests if manifest.get("kind") == "ResourceQuota"]
    pods = [(manifest, list(pods_of(manifest))) for manifest in manifests]
    for manifest, made in pods:
        for pod in made:
            for problem in restricted_problems(pod):
                if "privileged" not in enforced or not _excepted(pod.role, problem):
                    yield manifest, f"{pod.role}: {problem}"
            for quota in quotas:
                for problem in quota_problems(pod, quota):
                    yield manifest, f"{pod.role}: {problem}"
    around = [pod for manifest, made in pods if manifest.get("kind") not in RAY_KINDS for pod in made]
    for manifest, made in pods:
        if manifest.get("kind") in RAY_KINDS:
            spec = manifest["spec"]
            cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
            for problem in network_problems(manifests, [*made, *around], bool(cluster.get("enableInTreeAutoscaling"))):
                yield manifest, problem


def _excepted(role: str, problem: str) -> bool:
    fast_network = ("hostNetwork", "container ray-worker: must not add", "container wait-gcs-ready: must not add")
    return role.startswith("worker group ") and problem.startswith(fast_network)


def validate_profile(
    profile: ClusterProfile,
    jobs: tuple[dict[str, Any], ...],
    folder: Path,
    report: Report,
    kubernetes: Path = KUBERNETES,
) -> None:
    """Render a profile into ``folder`` and check all of it.

    Args:
        profile: The cluster.
        jobs: RayJob manifests of the profile to check along.
        folder: Scratch folder.
        report: Where the result goes.
        kubernetes: The repository's ``infra/kubernetes``.
    """
    write_folder(profile, folder, kubernetes)
    source = f"{profile.name} ({profile.queue.kind})"
    if find_kubectl() is None:
        _skip(report, "kustomize: kubectl is not on PATH (or LOOMVIDEO_KUBECTL)")
        return
    manifests = [*build(folder), *jobs]
    given = Given.read(kubernetes / "given.yaml")
    validate_manifests(manifests, given, profile.kubernetes_version, report, source)


def validate_folder(folder: Path, kubernetes_version: str, report: Report, kubernetes: Path = KUBERNETES) -> None:
    """Check a rendered folder as it is now, with what was changed by hand.

    Raises:
        UserError: if it is no Kustomize folder, or a file of it is no YAML.
    """
    try:
        jobs = [job for path in sorted(folder.glob("*.rayjob.yaml")) for job in yaml.load_all(path.read_text(), Loader)]
    except yaml.YAMLError as error:
        raise UserError(f"{folder}: a .rayjob.yaml is not YAML: {str(error).splitlines()[-1].strip()}") from error
    given = Given.read(kubernetes / "given.yaml")
    validate_manifests([*build(folder), *jobs], given, kubernetes_version, report, str(folder))


def secret_problems(node: Any, path: str = "") -> Iterator[str]:
    """Literal secrets in an object: values of variables named like one, and texts that look like one."""
    if isinstance(node, dict):
        if isinstance(node.get("name"), str) and isinstance(node.get("value"), str):
            # A variable that points at a secret (a path, a user) is fine; one that holds it is not.
            named = SECRET_NAMES.search(node["name"]) and not node["name"].endswith(("_PATH", "_FILE"))
            if named and node["value"]:
                yield f"{path}: env {node['name']} holds its value in the manifest; use secretKeyRef"
        for key, value in node.items():
            yield from secret_problems(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from secret_problems(value, f"{path}[{position}]")
    elif isinstance(node, str):
        for kind in secrets_in(node):
            yield f"{path}: looks like a {kind}"


def secrets_in(text: str) -> list[str]:
    """The kinds of secrets that a text seems to hold."""
    return [kind for kind, pattern in SECRET_VALUES.items() if pattern.search(text)]


@contextlib.contextmanager
def linting(root: Path, report: Report) -> Iterator[None]:
    """Lint the repository's Dockerfiles and shell scripts beside what is done meanwhile; reported at the end."""
    infra = root / "infra"
    # Debian's package versions leave the archive with every update; the base image's digest is what pins them.
    tools = {
        "hadolint": (["--no-color", "--ignore=DL3008"], sorted(infra.rglob("Dockerfile*"))),
        "shellcheck": (["--format=gcc"], sorted(infra.rglob("*.sh"))),
    }
    with ThreadPoolExecutor(1) as beside:
        linted: list[tuple[Path, Future[subprocess.CompletedProcess[str]]]] = []
        for tool, (options, files) in tools.items():
            executable = find_tool(tool)
            if executable is None:
                _skip(report, f"{tool}: not installed ({how_to_add('dev')})")
                continue
            for path in files:
                command = [executable, *options, str(path)]
                linted.append((path, beside.submit(subprocess.run, command, capture_output=True, text=True)))
        yield
        for path, running in linted:
            result = running.result()
            report.add(str(path), result.stdout.splitlines() if result.returncode else [])


def find_tool(name: str) -> str | None:
    """A tool beside this Python, in one of its paths' ``bin``, or on PATH."""
    places = [
        Path(sys.executable).parent,
        *(Path(entry).parents[2] / "bin" for entry in sys.path if entry.count("/") > 3),
    ]
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    return which(name)


def _skip(report: Report, reason: str) -> None:
    if reason not in report.skipped:
        report.skipped.append(reason)
