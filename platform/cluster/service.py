"""``loomvideo serve`` on Kubernetes: a RayService, the ingress before it, and the way between them.

KubeRay replaces the whole cluster when the service changes and moves traffic once the new one is ready; it probes every
node that answers for Serve.
"""

import hashlib
from typing import Any

import yaml

from loomvideo.platform.cluster.manifests import API_VERSION, cluster_spec, labels_of
from loomvideo.platform.cluster.profile import ClusterProfile
from loomvideo.platform.time_limits import OLD_SERVICE, SERVICE_READY

PORT = 8000
IMPORT_PATH = "loomvideo.jobs.serving.job:build"
DIGEST_ANNOTATION = "loomvideo.io/service-digest"


def service_objects(profile: ClusterProfile) -> list[dict[str, Any]]:
    """RayService, ingress and network policy; nothing for a profile without a service."""
    if not profile.service.arguments:
        return []
    name = f"{profile.name}-serve"
    return [_policy(profile, name), _ingress(profile, name), ray_service(profile, name)]


def ray_service(profile: ClusterProfile, name: str) -> dict[str, Any]:
    """The service itself, on the groups that list ``serve``."""
    cluster = cluster_spec(profile, profile.groups_of("serve"), own_cluster=False)
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:
        container = pod["spec"]["containers"][0]
        container["ports"].append({"name": "serve", "containerPort": PORT})
        container["envFrom"].append({"secretRef": {"name": profile.service.token_secret}})
    application = {
        "name": "loomvideo",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"arguments": list(profile.service.arguments)},
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [application],
    }
    config = yaml.safe_dump(serve, sort_keys=False)
    # KubeRay takes a changed configuration over in the cluster that runs, generator by generator, unless the cluster
    # changes too.
    metadata = cluster["headGroupSpec"]["template"]["metadata"]
    metadata.setdefault("annotations", {})[DIGEST_ANNOTATION] = hashlib.sha256(config.encode()).hexdigest()[:16]
    spec = {
        "serveConfigV2": config,
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": int(OLD_SERVICE.here()),
        "deploymentUnhealthySecondThreshold": int(SERVICE_READY.here()),
        "serviceUnhealthySecondThreshold": int(SERVICE_READY.here()),
        # The head runs no proxy that a busy generator could starve, and no generator.
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": cluster,
    }
    return {"apiVersion": API_VERSION, "kind": "RayService", "metadata": _metadata(profile, name), "spec": spec}


def _ingress(profile: ClusterProfile, name: str) -> dict[str, Any]:
    service = profile.service
    backend = {"service": {"name": f"{name}-serve-svc", "port": {"number": PORT}}}
    metadata = _metadata(profile, name)
    if service.annotations:
        metadata["annotations"] = dict(service.annotations)
    path = {"path": "/", "pathType": "Prefix", "backend": backend}
    spec = {
        "ingressClassName": service.ingress_class,
        "tls": [{"hosts": [service.host], "secretName": service.tls_secret}],
        "rules": [{"host": service.host, "http": {"paths": [path]}}],
    }
    return {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata, "spec": spec}


def _policy(profile: ClusterProfile, name: str) -> dict[str, Any]:
    controller = {"matchLabels": {"kubernetes.io/metadata.name": profile.service.ingress_namespace}}
    spec = {
        "podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"namespaceSelector": controller}], "ports": [{"protocol": "TCP", "port": PORT}]}],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(profile, name),
        "spec": spec,
    }


def _metadata(profile: ClusterProfile, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": profile.namespace, "labels": labels_of(profile)}
