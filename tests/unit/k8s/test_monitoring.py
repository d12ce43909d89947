"""What dashboards and autoscalers ask of Prometheus is what the servers export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from overlays import K8S, Overlay
from prometheus_client import CollectorRegistry

from steersman.policy.metrics import PolicyMetrics
from steersman.serving.batch_metrics import BatchMetrics
from steersman.serving.metrics import Metrics
from steersman.trainer.jobs.handler import JobsHandler
from steersman.trainer.jobs.launcher import LocalLauncher
from steersman.trainer.jobs.service import TrainerServer
from steersman.trainer.jobs.validation import SettingsValidator

SERIES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
TRAINER = Path(__file__).resolve().parents[3] / "trainer" / "steersman" / "trainer"


def series(registry: CollectorRegistry) -> Iterator[str]:
    for family in registry.collect():
        yield from (family.name + ending for ending in SERIES[family.type])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every series of the four servers."""
    policy, batching, trainer = Metrics("policy"), Metrics("reward"), Metrics("trainer")
    PolicyMetrics(policy)
    BatchMetrics(batching)
    runs = tmp_path_factory.mktemp("runs")
    TrainerServer(JobsHandler(runs, launcher=LocalLauncher(), validator=SettingsValidator()), trainer)
    return {name for one in (policy, batching, trainer) for name in series(one.registry)}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((K8S / "components" / "monitoring" / "steersman.json").read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return asked + [one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"]


def test_the_dashboard_asks_for_what_is_exported(dashboard: dict[str, Any], exported: set[str]) -> None:
    asked = {name for one in expressions(dashboard) for name in re.findall(r"steersman_\w+", one)}
    assert len(asked) > 12
    assert asked <= exported


def test_the_dashboard_asks_for_metrics_that_jobs_have(dashboard: dict[str, Any]) -> None:
    asked = {name for one in expressions(dashboard) for name in re.findall(r'metric="([^"]+)"', one)}
    source = "".join(path.read_text() for path in (TRAINER / "stages").glob("*.py"))
    assert {"objective/scores", "objective/kl", "rollout/staleness_mean"} <= asked
    assert [name for name in asked if f'"{name}"' not in source] == []


def test_panels_stand_beside_each_other(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_autoscalers_ask_for_what_the_adapter_gives(overlay: Overlay, exported: set[str]) -> None:
    rules = yaml.safe_load((K8S / "components" / "autoscaling" / "prometheus-adapter.yaml").read_text())
    given = {rule["seriesQuery"].partition("{")[0] for rule in rules["rules"]["custom"]}
    assert given <= exported
    for scaler in overlay.of("HorizontalPodAutoscaler").values():
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= given
