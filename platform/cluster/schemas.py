"""Schema checks of Kubernetes objects without a cluster: core kinds, and KubeRay's kinds by their CRD files."""

import copy
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS_VARIABLE = "LOOMVIDEO_KUBERAY_CRDS"
KUBERAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
METADATA_KEYS = {"name", "namespace", "labels", "annotations", "generateName", "finalizers", "ownerReferences"}
# Kinds of other operators that the repository uses; their schemas are not part of any package.
UNCHECKED_GROUPS = ("kueue.x-k8s.io", "scheduling.volcano.sh", "monitoring.coreos.com", "ray.io")

# libyaml's, ten times faster than Python's own.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def crd_folder() -> Path | None:
    """The folder with KubeRay's CRD files (``LOOMVIDEO_KUBERAY_CRDS``), or None when not given or not there."""
    value = os.environ.get(CRDS_VARIABLE)
    folder = Path(value) if value else Path("../shared/kuberay-crds")
    return folder if folder.is_dir() else None


def schema_problems(manifest: dict[str, Any], kubernetes_version: str, crds: Path | None) -> Iterator[str]:
    """Problems of one object against its schema, each ``path: what``.

    Args:
        manifest: The object.
        kubernetes_version: Such as ``1.34``.
        crds: Folder of KubeRay's CRD files; None leaves KubeRay's kinds unchecked.
    """
    group = manifest.get("apiVersion", "").rpartition("/")[0]
    # Most objects are the same in every profile and under every queue.
    text = json.dumps(manifest, default=str)
    if group == "ray.io" and manifest.get("kind") in KUBERAY_KINDS:
        if crds is not None:
            yield from _custom_problems(text, crds)
    elif group not in UNCHECKED_GROUPS:
        yield from _core_problems(text, kubernetes_version)


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy of a value with the schema's defaults filled in, as the API server does before it validates."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        filled = {}
        for key, child in properties.items():
            if key in value:
                # null on a field that may not be null counts as absent.
                if value[key] is None and not child.get("nullable"):
                    if "default" in child:
                        filled[key] = copy.deepcopy(child["default"])
                else:
                    filled[key] = with_defaults(value[key], child)
            elif "default" in child:
                filled[key] = copy.deepcopy(child["default"])
        rest = schema.get("additionalProperties")
        for key in value.keys() - properties.keys():
            filled[key] = with_defaults(value[key], rest if isinstance(rest, dict) else {})
        return filled
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


@functools.lru_cache(maxsize=1024)
def _core_problems(text: str, version: str) -> list[str]:
    import kubernetes_validate

    manifest = json.loads(text)
    # Its definitions, megabytes of JSON, would be read anew for every object.
    kubernetes_validate.utils.schema_contents = _schema_contents()
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [_problem(error)]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"apiVersion {manifest.get('apiVersion')} has no kind {manifest.get('kind')} in Kubernetes {version}"]
    return []


@functools.cache
def _schema_contents() -> Callable[[str, str], Any]:
    from kubernetes_validate import utils

    return functools.cache(utils.schema_contents)


@functools.lru_cache(maxsize=1024)
def _custom_problems(text: str, crds: Path) -> list[str]:
    manifest = json.loads(text)
    raw, validator = _custom_schema(crds, manifest["kind"], manifest["apiVersion"].rpartition("/")[2])
    unknown = sorted(manifest.get("metadata", {}).keys() - METADATA_KEYS)
    errors = validator.iter_errors(with_defaults(manifest, raw))
    return [*(f"metadata.{key}: unknown field" for key in unknown), *map(_problem, errors)]


def _problem(error: jsonschema.ValidationError) -> str:
    path = ".".join(str(part) for part in error.absolute_path)
    # A refused pod spec can be pages long; the last sentence is the one that says what is wrong.
    message = error.message if len(error.message) < 200 else "…" + error.message[-200:]
    return f"{path or '(top)'}: {message}"


@functools.lru_cache
def _custom_schema(crds: Path, kind: str, version: str) -> tuple[dict[str, Any], jsonschema.Draft202012Validator]:
    definition = yaml.load((crds / f"ray.io_{KUBERAY_KINDS[kind]}.yaml").read_text(), Loader)
    versions = {entry["name"]: entry["schema"]["openAPIV3Schema"] for entry in definition["spec"]["versions"]}
    raw = versions[version]
    return raw, jsonschema.Draft202012Validator(_strict(raw))


def _strict(schema: Any) -> Any:
    """OpenAPI as Kubernetes writes it, as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    properties = schema.get("properties")
    strict = {
        key: _strict(value)
        for key, value in schema.items()
        if key not in ("properties", "default", "format", "description") and not key.startswith("x-kubernetes-")
    }
    if isinstance(properties, dict):
        strict["properties"] = {name: _strict(child) for name, child in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in strict:
        strict["type"] = [strict["type"], "null"]
    strict.pop("nullable", None)
    return strict
