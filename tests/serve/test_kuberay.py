"""The KubeRay manifest, field by field as its schema has them, and the application that it names."""

from pathlib import Path
from typing import Any

import pytest

from pagoda.config import EngineConfig, ServeConfig

yaml = pytest.importorskip("yaml")
MANIFEST = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "kuberay" / "pagoda.yaml").read_text())
CLUSTER = MANIFEST["spec"]["rayClusterConfig"]


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """The container of a pod template."""
    assert set(pod) == {"spec"}
    spec = pod["spec"]
    assert set(spec) <= {"containers", "volumes", "terminationGracePeriodSeconds"}
    [container] = spec["containers"]
    assert set(container) <= {"name", "image", "ports", "resources", "volumeMounts", "env"}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    volumes = {v["name"]: set(v) - {"name"} for v in spec.get("volumes", [])}
    assert all(len(kind) == 1 and kind <= {"persistentVolumeClaim", "emptyDir"} for kind in volumes.values())
    assert {m["name"] for m in container.get("volumeMounts", [])} == set(volumes)
    return container


def test_fields_are_those_of_the_schema() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("ray.io/v1", "RayService")
    assert set(MANIFEST) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(MANIFEST["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert isinstance(MANIFEST["spec"]["serveConfigV2"], str)
    assert set(CLUSTER) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert CLUSTER["authOptions"] == {"mode": "token"}
    head = CLUSTER["headGroupSpec"]
    assert set(head) == {"rayStartParams", "template"}
    ports = {p["name"]: p["containerPort"] for p in check_pod(head["template"])["ports"]}
    assert {"dashboard": 8265, "serve": 8000}.items() <= ports.items()
    for group in CLUSTER["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        check_pod(group["template"])
        params = [*group["rayStartParams"].values(), *head["rayStartParams"].values()]
        assert all(isinstance(v, str) for v in params), "parameters of ray start are texts"


def test_the_application_fits_the_cluster() -> None:
    [application] = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])["applications"]
    arguments = application["args"]
    engine, config = EngineConfig.from_mapping(arguments["engine"]), ServeConfig.from_mapping(arguments["serve"])
    [group] = CLUSTER["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert arguments["num_gpus"] == engine.tp <= gpus, "a replica stands on one machine"
    assert len(arguments["models"]) * config.replicas * engine.tp <= group["replicas"] * gpus
    assert config.max_replicas and config.max_replicas * engine.tp <= group["maxReplicas"] * gpus
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.drain_seconds + 5
    mounted = [m["mountPath"] for m in container["volumeMounts"]]
    assert all(any(path.startswith(m) for m in mounted) for path in arguments["models"].values())


def test_ray_takes_the_application() -> None:
    pytest.importorskip("ray")
    import importlib

    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(yaml.safe_load(MANIFEST["spec"]["serveConfigV2"]))
    [application] = parsed.applications
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application.args)
    assert built._bound_deployment.name == "door"
