"""What `deploy/` says agrees with the program: flags, routes, metric names, ports; the install script installs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.serve import make_parser
from pagoda.engine.metrics import Counters, EngineStats
from pagoda.serve.exposition import exposition

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PARSER = make_parser("pagoda serve")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def test_commands_are_ones_that_the_parser_takes() -> None:
    compose = documents(DEPLOY / "compose.yaml")[0]
    deployment = documents(DEPLOY / "kubernetes" / "pagoda.yaml")[1]
    image = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    for words in (compose["services"]["pagoda"]["command"], container["args"], json.loads(image[1])):
        assert PARSER.parse_args(PARSER.spelled(words)).server_name == "0.0.0.0"


def test_the_manifests_fit_together() -> None:
    claim, deployment, service = documents(DEPLOY / "kubernetes" / "pagoda.yaml")
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    container = pod["spec"]["containers"][0]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    assert str(ports["http"]) in container["args"]
    for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    drain = int(container["args"][container["args"].index("--drain-seconds") + 1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain + 5 + 2


def test_the_manifests_are_what_kubernetes_takes() -> None:
    """Against the official schemas, which allow no unknown field; a misspelt probe is told."""
    oracle = pytest.importorskip("kubernetes_validate")
    ray = documents(DEPLOY / "kuberay" / "pagoda.yaml")[0]["spec"]["rayClusterConfig"]
    pods = [group["template"] for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"])]
    head = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}}
    manifests = documents(DEPLOY / "kubernetes" / "pagoda.yaml")
    for manifest in [*manifests, *({**head, "template": pod} for pod in pods)]:
        for version in ("1.29", oracle.latest_version()):
            oracle.validate(manifest, version, strict=True)
    container = manifests[1]["spec"]["template"]["spec"]["containers"][0]
    container["livenessprobe"] = container.pop("livenessProbe")
    with pytest.raises(oracle.ValidationError, match="livenessprobe"):
        oracle.validate(manifests[1], oracle.latest_version(), strict=True)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    page = exposition(EngineStats(0, 0, 0, 1, 0, 0, Counters()), 'm"1')
    names = set(re.findall(r"^(\S+?)\{", page, re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    asked = {n for p in dashboard["panels"] for t in p["targets"] for n in re.findall(r"pagoda:\w+", t["expr"])}
    assert len(asked) > 10 and asked <= names
    source = documents(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")[0]["datasources"][0]
    assert {p["datasource"]["uid"] for p in dashboard["panels"]} == {source["uid"]}


@pytest.mark.slow
def test_the_install_script_makes_a_working_installation(tmp_path: Path) -> None:
    """In an environment of its own, which finds the dependencies where this one has them."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    for old in site.glob("setuptools*"):  # Python's own is older than ours
        shutil.rmtree(old)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"PIP_ARGS": "--no-deps --no-build-isolation --no-index"}
    made = subprocess.run([DEPLOY / "install.sh", "cuda", python], capture_output=True, text=True, env=clean)
    assert made.returncode == 0, made.stderr
    code = "import pagoda; print(pagoda.__file__); print(pagoda.pipeline('mini')('Who are you?').text)"
    told = subprocess.check_output([python, "-c", code], text=True, env=clean, cwd=tmp_path)
    assert told.startswith(str(site)) and "Pagoda" in told
    assert subprocess.run([DEPLOY / "install.sh", "tpu", sys.executable], capture_output=True).returncode == 2
