"""Write everything a cluster needs as one Kustomize folder: ``kubectl apply -k FOLDER``."""

import os
import subprocess
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import yaml

from loomvideo.platform.cluster.manifests import cron_jobs, ray_cluster
from loomvideo.platform.cluster.pods import HEAD_ACCOUNT, NODE_ACCOUNT
from loomvideo.platform.cluster.profile import ClusterProfile
from loomvideo.platform.cluster.queues import KUEUE, queue_objects
from loomvideo.platform.cluster.schemas import Dumper, Loader
from loomvideo.platform.cluster.service import service_objects
from loomvideo.platform.errors import UserError

KUBERNETES = Path("infra/kubernetes")
MLFLOW_ACCOUNT = "loomvideo-mlflow"
# Where clouds answer pods that ask who they are (GKE, EKS Pod Identity, EC2).
METADATA_SERVERS = {"169.254.169.254/32": [80], "169.254.169.252/32": [988], "169.254.170.23/32": [80]}


def namespaced_objects(profile: ClusterProfile) -> list[dict[str, Any]]:
    """What depends on the profile: namespace, accounts, volume claim, MLflow settings, queue and Ray cluster."""
    storage = profile.storage
    claim: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{storage.size_gib}Gi"}},
    }
    if storage.storage_class:
        claim["storageClassName"] = storage.storage_class
    settings = {"artifacts-destination": storage.artifacts}
    if storage.object_store_endpoint:
        settings["s3-endpoint"] = storage.object_store_endpoint
    objects = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": profile.namespace,
                "labels": {
                    "app.kubernetes.io/part-of": "loomvideo",
                    # The API server itself refuses privileged, host-network and root pods here, unless a group of
                    # the profile needs the host's network: then it still warns of each.
                    "pod-security.kubernetes.io/enforce": profile.pod_security,
                    "pod-security.kubernetes.io/warn": "restricted",
                    "pod-security.kubernetes.io/audit": "restricted",
                },
            },
        },
        *_accounts(profile),
        _object("v1", "PersistentVolumeClaim", profile, storage.claim, spec=claim),
        _object("v1", "ConfigMap", profile, "loomvideo-mlflow", data=settings),
    ]
    if storage.object_store_endpoint:
        objects.append(_object_store_policy(profile))
    if profile.identity.metadata_server:
        objects.append(_metadata_policy(profile))
    if profile.queue.kind == "kueue":
        queue = {"clusterQueue": profile.quota.cluster_queue}
        objects.append(_object(KUEUE, "LocalQueue", profile, profile.queue.name, spec=queue))
    return [*objects, *cron_jobs(profile), *service_objects(profile), ray_cluster(profile)]


def write_folder(
    profile: ClusterProfile, folder: Path, kubernetes: Path = KUBERNETES, jobs: tuple[dict[str, Any], ...] = ()
) -> list[Path]:
    """Write the Kustomize folder of a profile.

    Args:
        profile: The cluster.
        folder: Where to write; files of the same names are replaced.
        kubernetes: The repository's ``infra/kubernetes``.
        jobs: RayJob manifests, written beside it for ``kubectl apply -f``: applying a cluster starts no job.

    Returns:
        The written files.

    Raises:
        UserError: if the repository's Kubernetes folder is not there.
    """
    if not (kubernetes / "base").is_dir():
        raise UserError(f"{kubernetes}/base: not found; run from a checkout of the repository")
    inner = folder / "namespaced"
    # Namespaced and cluster-wide objects apart: Kustomize would give a namespace to kinds it does not know.
    queue = queue_objects(profile)
    files = {
        folder / "kustomization.yaml": _kustomization([inner.name, *(["queue.yaml"] if queue else [])]),
        **({folder / "queue.yaml": to_yaml(queue)} if queue else {}),
        inner / "kustomization.yaml": _kustomization(
            [_relative(kubernetes / "base", inner), "cluster.yaml"],
            namespace=profile.namespace,
            images=[_image("loomvideo/mlflow", profile.tracking.image)],
        ),
        inner / "cluster.yaml": to_yaml(namespaced_objects(profile)),
        **{folder / f"{job['metadata']['name']}.rayjob.yaml": to_yaml([job]) for job in jobs},
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(files)


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a Kustomize folder, as ``kubectl kustomize`` builds them.

    Raises:
        UserError: if kubectl is missing or refuses the folder.
    """
    kubectl = find_kubectl()
    if kubectl is None:
        raise UserError("kubectl: not found on PATH; install it or set LOOMVIDEO_KUBECTL")
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"{folder}: kustomize: {result.stderr.strip().splitlines()[-1]}")
    return [document for document in yaml.load_all(result.stdout, Loader) if document]


def find_kubectl() -> str | None:
    """kubectl from ``LOOMVIDEO_KUBECTL`` or PATH."""
    return os.environ.get("LOOMVIDEO_KUBECTL") or which("kubectl")


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """Objects as a YAML stream."""
    return yaml.dump_all(objects, sort_keys=False, width=120, Dumper=_PlainDumper)


class _PlainDumper(Dumper):
    # Anchors and aliases are legal YAML that people and reviewers stumble over.
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _object_store_policy(profile: ClusterProfile) -> dict[str, Any]:
    """The way out to an object store on a port of its own; the base allows 443 only."""
    url = urlsplit(profile.storage.object_store_endpoint)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    spec = {
        "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "loomvideo"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"protocol": "TCP", "port": port}]}],
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", profile, "object-store", spec=spec)


def _metadata_policy(profile: ClusterProfile) -> dict[str, Any]:
    """The way to the node's metadata server, which hands workload identities their tokens."""
    egress = [
        {"to": [{"ipBlock": {"cidr": address}}], "ports": [{"protocol": "TCP", "port": port} for port in ports]}
        for address, ports in METADATA_SERVERS.items()
    ]
    labels = {"app.kubernetes.io/part-of": "loomvideo"}
    spec = {"podSelector": {"matchLabels": labels}, "policyTypes": ["Egress"], "egress": egress}
    return _object("networking.k8s.io/v1", "NetworkPolicy", profile, "metadata-server", spec=spec)


def _accounts(profile: ClusterProfile) -> list[dict[str, Any]]:
    """Service accounts of nodes, of a head that scales, and of MLflow, with their cloud roles."""
    identity = profile.identity
    roles = {NODE_ACCOUNT: identity.nodes, HEAD_ACCOUNT: identity.nodes, MLFLOW_ACCOUNT: identity.mlflow}
    accounts = []
    for name, annotations in roles.items():
        account = _object("v1", "ServiceAccount", profile, name, automountServiceAccountToken=False)
        if annotations:
            account["metadata"]["annotations"] = dict(annotations)
        accounts.append(account)
    return accounts


def _kustomization(resources: list[str], **fields: Any) -> str:
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return to_yaml([head | fields | {"resources": resources}])


def _object(api_version: str, kind: str, profile: ClusterProfile, name: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": profile.namespace, "labels": {"app.kubernetes.io/part-of": "loomvideo"}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def _image(name: str, image: str) -> dict[str, str]:
    repository, at, digest = image.partition("@")
    if at:
        return {"name": name, "newName": repository, "digest": digest}
    # A colon after the last slash starts the tag; one before it is a registry's port.
    slash = image.rfind("/")
    colon = image.find(":", slash + 1)
    if colon < 0:
        return {"name": name, "newName": image, "newTag": "latest"}
    return {"name": name, "newName": image[:colon], "newTag": image[colon + 1 :]}


def _relative(target: Path, start: Path) -> str:
    return os.path.relpath(target.resolve(), start.resolve())
