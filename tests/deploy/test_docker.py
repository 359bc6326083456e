"""Images, dashboards and manifests, without a container engine or a cluster.

Each is checked by its own tool, and against the code, so that names, ports and times stay the same in both.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families

from concord.model import bundle
from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.errors import CODES
from concord.service.inference.jobs import StopReason
from concord.service.inference.reload import State
from concord.service.inference.served_model import GRACE_SECONDS
from concord.service.settings import PREFIX, Settings
from tests.support.server import ROOT, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.docker

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/concord.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
OVERLAYS = ("cpu", "gpu")
OTHER_METRICS = {"up", "ALERTS", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"}
"""Those of Prometheus itself and of NVIDIA's exporter."""
GPU_PANELS = {"GPU memory", "Fixed batch sizes"}


def tool(name: str) -> str:
    """Return the path of a program: next to Python, where pip installs it, or on the PATH. Skip the test if there is none."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        if os.environ.get("CONCORD_TEST_EVERYTHING"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed, and pip does not provide it")
    return path


def run(*command: str) -> str:
    """Run a program in the folder docker/, and return its output."""
    result = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The services of compose.yaml, as Docker's client reads them."""
    out = run(
        tool("docker-compose"), "--file", "compose.yaml", "--profile", "cpu", "--profile", "gpu", "config", "--format=json"
    )
    services: dict[str, Any] = json.loads(out)["services"]
    return services


def test_compose_addition_in_the_readme_sets_keys_and_a_bundle(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (DOCKER / "README.md").read_text(), re.DOTALL)
    assert block
    (tmp_path / "addition.yaml").write_text(block[1])
    files = ("--file", "compose.yaml", "--file", str(tmp_path / "addition.yaml"))
    out = run(tool("docker-compose"), *files, "--profile", "cpu", "config", "--format=json")
    service = json.loads(out)["services"]["cpu"]
    settings = settings_of(service["environment"])
    (volume,) = service["volumes"]
    assert volume["read_only"]
    for path in (settings.api_keys_file, Path(settings.bundle)):
        assert path
        assert path.is_relative_to(volume["target"])


def rendered(overlay: str) -> list[dict[str, Any]]:
    """Return the manifests that kustomize makes."""
    return list(yaml.safe_load_all(run(tool("kubectl"), "kustomize", f"kubernetes/{overlay}")))


def load_manifests(name: str) -> list[dict[str, Any]]:
    """Return the manifests of a file."""
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text()))


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "1") for variable in container["env"]}


def settings_of(values: dict[str, str]) -> Settings:
    """Return the settings of environment variables. Raises if the service would not accept one of them."""
    assert all(name.startswith(PREFIX) for name in values)
    return Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in values.items()})


def longest_stop_seconds(settings: Settings) -> float:
    """Return the longest time that the service may take to stop."""
    return (settings.drain_delay_ms + settings.grace_ms) / 1000 + GRACE_SECONDS


def test_dockerfile_passes_hadolint() -> None:
    run(tool("hadolint"), "Dockerfile")


def test_image_settings_are_valid_for_the_service() -> None:
    values = dict(re.findall(rf"\b({PREFIX}[A-Z_]+)=(\S+)", DOCKERFILE))
    settings = settings_of(values)
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE
    assert settings.host == "0.0.0.0"
    assert settings.device == "cuda", "the gpu image must not fall back to the CPU"


def test_image_health_check_reports_the_service() -> None:
    instruction = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)
    assert instruction
    command = [sys.executable, *json.loads(instruction[1])[1:]]
    with running() as service:
        variables = os.environ | {
            "CONCORD_PORT": str(service.port),
            "http_proxy": "http://127.0.0.1:1",
        }  # as container engines set it
        assert subprocess.run(command, env=variables, check=False, timeout=60).returncode == 0
    assert subprocess.run(command, env=variables, check=False, timeout=60, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("name", ["build", "cpu", "gpu", "training"])
def test_requirements_are_locked_with_hashes(name: str) -> None:
    """Exact versions, each with its hashes and without a URL. Only the training image has torch."""
    lock = (DOCKER / f"requirements-{name}.txt").read_text()
    packages = [line for line in lock.splitlines() if line[:1] not in {"#", " ", ""}]
    assert packages
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ]+ \\", line) for line in packages)
    assert len(re.findall(r"^\S+==[^ ]+ \\\n +--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)) == len(packages)
    assert "://" not in lock
    assert ("\ntorch==" in lock) == (name == "training")
    assert f"requirements-{name}.txt" in DOCKERFILE


def test_locked_versions_satisfy_pyproject() -> None:
    """After a change of pyproject.toml, a package is missing or has a forbidden version until ``make lock`` runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    serving = extras["audio"] + extras["otel"]
    requirements = {
        "cpu": extras["cpu"] + serving,
        "gpu": extras["gpu"] + serving,
        "training": extras["cpu"] + extras["audio"] + extras["train"],
    }
    for name, extra in requirements.items():
        locked = dict(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", (DOCKER / f"requirements-{name}.txt").read_text(), re.MULTILINE))
        for line in project["dependencies"] + extra:
            requirement = Requirement(line)
            assert requirement.specifier.contains(locked.get(requirement.name.lower(), "0")), f"make lock: {name}: {line}"


def test_compose_services_have_settings_ports_and_times_of_the_service(compose: dict[str, Any]) -> None:
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yaml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]
    for name in OVERLAYS:
        service = compose[name]
        settings = settings_of(service["environment"])
        grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
        assert grace
        assert int(grace[1]) >= longest_stop_seconds(settings)
        assert [port["target"] for port in service["ports"]] == [settings.port], "the operators' port is published"
        assert service["ports"][0]["host_ip"] == "127.0.0.1"
        assert scraped == scraped | {"names": service["networks"]["default"]["aliases"], "port": settings.admin_port}
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["build"]["target"] == name
    published = [port for service in compose.values() for port in service.get("ports", ())]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_pass_kubernetes_validate(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(rendered(overlay)))
    run(tool("kubernetes-validate"), "--strict", "--quiet", str(tmp_path / "all.yaml"))


def test_monitoring_manifests_have_the_alerts_and_select_the_metrics_service() -> None:
    specs = {manifest["kind"]: manifest["spec"] for manifest in rendered("monitoring")}
    assert specs["PrometheusRule"] == yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())
    (metrics,) = (manifest for manifest in rendered("cpu") if manifest["metadata"]["name"] == "concord-metrics")
    monitor = specs["ServiceMonitor"]
    assert monitor["selector"]["matchLabels"].items() <= metrics["metadata"]["labels"].items()
    assert metrics["metadata"]["labels"][monitor["jobLabel"]] == "concord", "alerts and dashboard query this job"
    assert [end["port"] for end in monitor["endpoints"]] == [port["name"] for port in metrics["spec"]["ports"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_select_concord_only(overlay: str) -> None:
    labels = {"app.kubernetes.io/name": "concord", "app.kubernetes.io/part-of": "concord"}
    for manifest in rendered(overlay):
        spec = manifest["spec"]
        selector = spec.get("podSelector") or spec.get("selector")
        if manifest["kind"] == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"]["name"] == "concord"
        else:
            assert selector.get("matchLabels", selector) == labels, manifest["kind"]


def test_pod_has_probes_ports_and_times_of_the_service() -> None:
    """Its security context is as strict as possible."""
    (deployment,) = load_manifests("base/deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = settings_of(environment(container))
    assert pod["terminationGracePeriodSeconds"] >= longest_stop_seconds(settings)
    readiness = container["readinessProbe"]
    assert settings.drain_delay_ms / 1000 > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "http": settings.port,
        "metrics": settings.admin_port,
    }
    paths = create([Runtime.load(bundle.builtin("digits"))], Settings()).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
        assert container[probe]["httpGet"]["port"] == "http"
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > settings.heartbeat_ms / 1000
    assert pod["enableServiceLinks"] is False, "Kubernetes would set CONCORD_PORT to tcp://..."
    user = re.search(r"USER (\d+):(\d+)", DOCKERFILE)
    assert user
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_autoscaler_uses_the_metric_of_the_adapter() -> None:
    (autoscaler,) = load_manifests("base/autoscaler.yaml")
    (values,) = load_manifests("monitoring/adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    assert autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metrics_in(rule["seriesQuery"]) == {"concord_queue_wait_seconds_bucket"}


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The names of the samples in /metrics, by family."""
    app = create([Runtime.load(bundle.builtin("digits"))], Settings())
    text = app.state.metrics.expose().decode()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {
        family.name: {family.name + suffix for suffix in suffixes[family.type]}
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }


def metrics_in(expression: str) -> set[str]:
    """Return the names of metrics in a query, without labels, functions, keywords and durations."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) *\([^)]*\)|\"[^\"]*\"", " ", expression)
    return {
        name
        for name in re.findall(r"[A-Za-z_:][\w:]*(?! *\()\b", bare)
        if name not in {"or", "and", "unless", "on", "ignoring"}
    }


def autoscaler_query() -> str:
    """Return the adapter's query for one pod."""
    (values,) = load_manifests("monitoring/adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    query: str = rule["metricsQuery"]
    for name, value in (
        ("Series", "concord_queue_wait_seconds_bucket"),
        ("LabelMatchers", 'namespace="default",pod="a"'),
        ("GroupBy", "pod"),
    ):
        query = query.replace(f"<<.{name}>>", value)
    return query


def panel_queries() -> list[tuple[str, str]]:
    """Return title and query of each panel of the dashboard."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_and_alerts_use_existing_metrics(exposed: dict[str, set[str]]) -> None:
    existing = set().union(*exposed.values()) | OTHER_METRICS
    for name, expression in [*panel_queries(), *((rule["alert"], rule["expr"]) for rule in ALERTS)]:
        used = metrics_in(expression)
        assert used, name
        assert used <= existing, name


def test_dashboard_and_alerts_use_existing_label_values() -> None:
    known = {
        "alertname": {rule["alert"] for rule in ALERTS},
        "alertstate": {"firing"},
        "job": {"concord"},
        "reason": {*CODES, *get_args(StopReason)},
        "route": set(create([Runtime.load(bundle.builtin("digits"))], Settings()).openapi()["paths"]),
        "state": set(get_args(State)),
        "status": {str(status) for status, _ in CODES.values()},
    }
    expressions = [expression for _, expression in panel_queries()] + [rule["expr"] for rule in ALERTS]
    for label, operator, text in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', " ".join(expressions)):
        for pattern in text.split("|") if "~" in operator else [re.escape(text)]:
            assert any(re.fullmatch(pattern, value) for value in known[label]), f"{label}: {pattern}"


def test_dashboard_shows_every_metric_of_the_service(exposed: dict[str, set[str]]) -> None:
    shown = set().union(*(metrics_in(expression) for _, expression in panel_queries()))
    hidden = {name for name, samples in exposed.items() if name.startswith("concord_") and not samples & shown}
    assert not hidden


def test_dashboard_panels_use_the_datasource_and_do_not_overlap() -> None:
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    occupied = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == sources[0]["uid"]
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & occupied, panel["title"]
        occupied |= cells


def test_promtool_accepts_the_configuration_and_the_alert_tests() -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "prometheus/prometheus.yaml")
    run(promtool, "test", "rules", "prometheus/alerts-test.yaml")


def test_every_alert_has_tests_with_and_without_firing() -> None:
    tests = yaml.safe_load((DOCKER / "prometheus/alerts-test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


@pytest.mark.slow
def test_dashboard_panels_show_data_of_a_service_under_load(tmp_path: Path) -> None:
    """A real Prometheus scrapes a real service."""
    program = tool("prometheus")
    empty = {expression for title, expression in panel_queries() if title not in GPU_PANELS} | {autoscaler_query()}
    with running() as service, run_prometheus(program, service.address, tmp_path) as query:

        def every_panel_has_data() -> bool:
            send_mixed_requests(service.client)
            with_data = {text for text in empty if any(map(_is_number, query(text.replace("$__rate_interval", "10s"))))}
            empty.difference_update(with_data)
            return not empty

        wait_for(every_panel_has_data, seconds=120, message="panels without data", interval=0.5)


def _is_number(result: dict[str, Any]) -> bool:
    return str(result["value"][1]) not in {"NaN", "+Inf", "-Inf"}


def send_mixed_requests(client: httpx.Client) -> None:
    """Send requests to both endpoints, with refinement, and one that is rejected."""
    client.post("/embed", json={"inputs": [{"word": "seven"}, {"word": "one"}]})
    client.post("/embed", json={"inputs": [{"word": "two"}], "refine": {"steps": 3}})
    client.post("/cross-generate", json={"inputs": [{"word": "three"}]})
    client.post("/embed", json={"inputs": [{"photo": "not an image"}]})


@contextlib.contextmanager
def run_prometheus(program: str, address: str, folder: Path) -> Iterator[Any]:
    """Run a Prometheus that scrapes ``address`` every second. Yields a function that returns the results of a query."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scrape = {"job_name": "concord", "static_configs": [{"targets": [address], "labels": {"namespace": "default", "pod": "a"}}]}
    configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    command = [
        program,
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def query(text: str) -> list[dict[str, Any]]:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text}, trust_env=False)
        except httpx.ConnectError:  # it is starting
            return []
        return list(response.json()["data"]["result"]) if response.is_success else []

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield query
        finally:
            process.terminate()
