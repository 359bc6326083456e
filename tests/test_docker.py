"""Images, dashboards and manifests, as far as they can be checked without an engine or a cluster: each by its own tool, and all
against the code, so that no name, port or time drifts."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families

from model import bundle
from model.runtime import Runtime
from service.app import create
from service.bundles import State
from service.errors import CODES
from service.serving import GRACE_SECONDS
from service.settings import PREFIX, Settings
from service.work import Stopped
from tests.server import ROOT, running

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/concord.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
OVERLAYS = ("cpu", "gpu")
FOREIGN = {"up", "ALERTS", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"}
"""Prometheus' own, and NVIDIA's exporter's."""
NEEDS_A_GPU = {"GPU memory"}


def tool(name: str) -> str:
    """Path of a program: beside Python, where pip puts it, or on the PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        if os.environ.get("CONCORD_TEST_EVERYTHING"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed, and pip has none")
    return found


def run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """As Docker's own client reads it."""
    out = run(
        tool("docker-compose"), "--file", "compose.yaml", "--profile", "cpu", "--profile", "gpu", "config", "--format=json"
    )
    services: dict[str, Any] = json.loads(out)["services"]
    return services


def test_what_the_readme_adds_to_compose_gives_keys_and_a_bundle(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    (tmp_path / "mine.yaml").write_text(found[1])
    files = ("--file", "compose.yaml", "--file", str(tmp_path / "mine.yaml"))
    out = run(tool("docker-compose"), *files, "--profile", "cpu", "config", "--format=json")
    service = json.loads(out)["services"]["cpu"]
    settings = settings_of(service["environment"])
    (volume,) = service["volumes"]
    assert volume["read_only"]
    for path in (settings.api_keys_file, Path(settings.bundle)):
        assert path
        assert path.is_relative_to(volume["target"])


def manifests(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run(tool("kubectl"), "kustomize", f"kubernetes/{overlay}")))


def written(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text()))


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "1") for one in container["env"]}


def settings_of(values: dict[str, str]) -> Settings:
    """Fails on a name or value that the service would not take."""
    assert all(name.startswith(PREFIX) for name in values)
    return Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in values.items()})


def end_seconds(settings: Settings) -> float:
    """How long the service may take to end, at the longest."""
    return (settings.drain_delay_ms + settings.grace_ms) / 1000 + GRACE_SECONDS


def test_the_dockerfile_is_clean() -> None:
    run(tool("hadolint"), "Dockerfile")


def test_the_images_settings_are_the_services() -> None:
    values = dict(re.findall(rf"\b({PREFIX}[A-Z_]+)=(\S+)", DOCKERFILE))
    settings = settings_of(values)
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE
    assert settings.host == "0.0.0.0"
    assert settings.device == "cuda", "the gpu image never falls back unasked"


def test_the_images_health_check_asks_the_service() -> None:
    found = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)
    assert found
    command = [sys.executable, *json.loads(found[1])[1:]]
    with running() as service:
        variables = os.environ | {"CONCORD_PORT": str(service.port), "http_proxy": "http://127.0.0.1:1"}  # as engines set it
        assert subprocess.run(command, env=variables, check=False, timeout=30).returncode == 0
    assert subprocess.run(command, env=variables, check=False, timeout=30, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("name", ["build", "cpu", "gpu", "training"])
def test_what_is_installed_is_locked(name: str) -> None:
    """Exact versions, each with its hashes, from no place in particular; what serves needs no torch."""
    lock = (DOCKER / f"requirements-{name}.txt").read_text()
    packages = [line for line in lock.splitlines() if line[:1] not in {"#", " ", ""}]
    assert packages
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ]+ \\", line) for line in packages)
    assert len(re.findall(r"^\S+==[^ ]+ \\\n +--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)) == len(packages)
    assert "://" not in lock
    assert ("\ntorch==" in lock) == (name == "training")
    assert f"requirements-{name}.txt" in DOCKERFILE


def test_locks_hold_what_the_project_asks_for() -> None:
    """pyproject.toml changed and nobody ran make lock: then a package is missing, or has a version that it does not allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    otel = extras["otel"]
    wanted = {"cpu": extras["cpu"] + otel, "gpu": extras["gpu"] + otel, "training": extras["cpu"] + extras["train"]}
    for name, more in wanted.items():
        locked = dict(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", (DOCKER / f"requirements-{name}.txt").read_text(), re.MULTILINE))
        for line in project["dependencies"] + more:
            requirement = Requirement(line)
            assert requirement.specifier.contains(locked.get(requirement.name.lower(), "0")), f"make lock: {name}: {line}"


def test_compose_gives_the_service_what_it_needs(compose: dict[str, Any]) -> None:
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yaml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]
    for name in OVERLAYS:
        service = compose[name]
        settings = settings_of(service["environment"])
        grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
        assert grace
        assert int(grace[1]) >= end_seconds(settings)
        assert [port["target"] for port in service["ports"]] == [settings.port], "metrics are not published"
        assert service["ports"][0]["host_ip"] == "127.0.0.1"
        assert scraped == scraped | {"names": service["networks"]["default"]["aliases"], "port": settings.admin_port}
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["build"]["target"] == name
    published = [port for service in compose.values() for port in service.get("ports", ())]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(manifests(overlay)))
    run(tool("kubernetes-validate"), "--strict", "--quiet", str(tmp_path / "all.yaml"))


def test_the_operators_prometheus_gets_the_same_alerts_from_the_service_of_metrics() -> None:
    made = {manifest["kind"]: manifest["spec"] for manifest in manifests("monitoring")}
    assert made["PrometheusRule"] == yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())
    (metrics,) = (one for one in manifests("cpu") if one["metadata"]["name"] == "concord-metrics")
    monitor = made["ServiceMonitor"]
    assert monitor["selector"]["matchLabels"].items() <= metrics["metadata"]["labels"].items()
    assert metrics["metadata"]["labels"][monitor["jobLabel"]] == "concord", "the job that alerts and dashboard ask for"
    assert [end["port"] for end in monitor["endpoints"]] == [port["name"] for port in metrics["spec"]["ports"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_select_concord_and_nothing_else(overlay: str) -> None:
    labels = {"app.kubernetes.io/name": "concord", "app.kubernetes.io/part-of": "concord"}
    for manifest in manifests(overlay):
        spec = manifest["spec"]
        selector = spec.get("podSelector") or spec.get("selector")
        if manifest["kind"] == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"]["name"] == "concord"
        else:
            assert selector.get("matchLabels", selector) == labels, manifest["kind"]


def test_pods_live_as_the_service_does() -> None:
    """Probes, ports, names and times are the code's; the rest is as strict as it can be."""
    (deployment,) = written("base/deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = settings_of(environment(container))
    assert pod["terminationGracePeriodSeconds"] >= end_seconds(settings)
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
    assert pod["enableServiceLinks"] is False, "CONCORD_PORT would be tcp://..."
    user = re.search(r"USER (\d+):(\d+)", DOCKERFILE)
    assert user
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_follows_the_metric_that_the_adapter_makes() -> None:
    (autoscaler,) = written("base/autoscaler.yaml")
    (values,) = written("monitoring/adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    assert autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metrics_in(rule["seriesQuery"]) == {"concord_queue_wait_seconds_bucket"}


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """What an app says in /metrics: the names of samples, by family."""
    app = create([Runtime.load(bundle.builtin("digits"))], Settings())
    text = app.state.bundles.metrics.expose().decode()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {
        family.name: {family.name + suffix for suffix in suffixes[family.type]}
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }


def metrics_in(expression: str) -> set[str]:
    """Names of metrics in a query: no label, function, keyword or duration."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) *\([^)]*\)|\"[^\"]*\"", " ", expression)
    return {
        name
        for name in re.findall(r"[A-Za-z_:][\w:]*(?! *\()\b", bare)
        if name not in {"or", "and", "unless", "on", "ignoring"}
    }


def the_autoscalers_query() -> str:
    """As the adapter asks it for one pod."""
    (values,) = written("monitoring/adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    query: str = rule["metricsQuery"]
    for name, value in (
        ("Series", "concord_queue_wait_seconds_bucket"),
        ("LabelMatchers", 'namespace="default",pod="a"'),
        ("GroupBy", "pod"),
    ):
        query = query.replace(f"<<.{name}>>", value)
    return query


def queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(exposed: dict[str, set[str]]) -> None:
    there = set().union(*exposed.values()) | FOREIGN
    for name, expression in [*queries(), *((rule["alert"], rule["expr"]) for rule in ALERTS)]:
        asked = metrics_in(expression)
        assert asked, name
        assert asked <= there, name


def test_dashboard_and_alerts_ask_for_labels_that_there_are() -> None:
    known = {
        "alertname": {rule["alert"] for rule in ALERTS},
        "alertstate": {"firing"},
        "job": {"concord"},
        "reason": {*CODES, *get_args(Stopped)},
        "route": set(create([Runtime.load(bundle.builtin("digits"))], Settings()).openapi()["paths"]),
        "state": set(get_args(State)),
        "status": {str(status) for status, _ in CODES.values()},
    }
    expressions = [expression for _, expression in queries()] + [rule["expr"] for rule in ALERTS]
    for label, operator, asked in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', " ".join(expressions)):
        for pattern in asked.split("|") if "~" in operator else [re.escape(asked)]:
            assert any(re.fullmatch(pattern, value) for value in known[label]), f"{label}: {pattern}"


def test_the_dashboard_shows_every_metric_of_ours(exposed: dict[str, set[str]]) -> None:
    shown = set().union(*(metrics_in(expression) for _, expression in queries()))
    hidden = {name for name, samples in exposed.items() if name.startswith("concord_") and not samples & shown}
    assert not hidden


def test_the_dashboard_finds_its_prometheus_and_fits_its_grid() -> None:
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    taken = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == sources[0]["uid"]
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_takes_its_configuration_and_every_alert_fires() -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "prometheus/prometheus.yaml")
    run(promtool, "test", "rules", "prometheus/alerts-test.yaml")


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load((DOCKER / "prometheus/alerts-test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_every_panel_shows_data_of_a_service_at_work(tmp_path: Path) -> None:
    """A real Prometheus scrapes a real service."""
    program = tool("prometheus")
    with running() as service, prometheus(program, service.address, tmp_path) as ask:
        deadline = time.monotonic() + 60
        empty = {expression for title, expression in queries() if title not in NEEDS_A_GPU} | {the_autoscalers_query()}
        while empty and time.monotonic() < deadline:
            work(service.client)
            empty -= {one for one in empty if any(map(_is_number, ask(one.replace("$__rate_interval", "10s"))))}
            time.sleep(0.5)
        assert not empty


def _is_number(result: dict[str, Any]) -> bool:
    return str(result["value"][1]) not in {"NaN", "+Inf", "-Inf"}


def work(client: httpx.Client) -> None:
    """Requests of every kind: both endpoints, subsets, refinement, and one that is refused."""
    client.post("/embed", json={"inputs": [{"word": "seven"}, {"word": "one"}]})
    client.post("/embed", json={"inputs": [{"word": "two"}], "refine": {"steps": 3}})
    client.post("/cross-generate", json={"inputs": [{"word": "three"}]})
    client.post("/embed", json={"inputs": [{"photo": "no picture"}]})


@contextlib.contextmanager
def prometheus(program: str, address: str, folder: Path) -> Iterator[Any]:
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

    def ask(query: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, trust_env=False)
        except httpx.ConnectError:  # it is starting
            return []
        return list(answer.json()["data"]["result"]) if answer.is_success else []

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield ask
        finally:
            process.terminate()
