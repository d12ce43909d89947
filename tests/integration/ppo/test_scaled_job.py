"""A PPO job in a cluster that scales: real services, found by the EndpointSlices of an API server in the test."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from api_server import ApiServer
from slice_objects import endpoint, endpoint_slice
from tiny_job import NUM_PROMPTS, NUM_SAMPLES, save_model, settings, tokenizer_of

from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port
from steersman.trainer.stages.ppo import run_ppo
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.run import Run, read_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 8
WAIT_S = 240.0
REPLICA = Path(__file__).parents[1] / "weights" / "replica_program.py"
SCORER = "def score(items):\n    return [float(item.response.split().count('w7')) / 12.0 for item in items]\n"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


class Cluster:
    """Services as processes, and what the API server says of them."""

    def __init__(self, folder: Path, api: ApiServer) -> None:
        self.model = folder / "model"
        self.gates = folder / "gates"
        self.gates.mkdir()
        save_model(self.model)
        (folder / "count.py").write_text(SCORER)
        scorers = {"count": {"function": f"{folder / 'count.py'}:score", "tokenizer": str(tokenizer_of(self.model))}}
        model = ["--model", str(self.model), "--dtype", "float32"]
        replica = [str(REPLICA), *model, "--kv-cache-mib", "32", "--max-num-seqs", "32"]
        commands = {
            "policy-0": replica,
            "policy-1": replica,
            "reference-0": ["-m", "steersman.reference", *model],
            "reward-0": ["-m", "steersman.reward", "--scorers", json.dumps(scorers)],
            "reward-1": ["-m", "steersman.reward", "--scorers", json.dumps(scorers)],
        }
        self._ports = {pod: free_port() for pod in commands}
        self._api = api
        self.processes = Supervisor(
            [self._spec(pod, command) for pod, command in commands.items()], start_timeout=WAIT_S
        )

    def show(self, pod: str, **conditions: bool) -> None:
        """Puts a pod into a slice of its Service."""
        ports = [("grpc", self._ports[pod])]
        service = pod.partition("-")[0]
        self._api.put(endpoint_slice(pod, [endpoint("127.0.0.1", **conditions)], ports=ports, service=service))

    def hide(self, pod: str) -> None:
        """Takes it out again."""
        self._api.delete(pod)

    def signal(self, pod: str, number: int) -> None:
        """Sends a signal to a pod's process, and waits for its end."""
        os.kill(self.processes[pod].pid, number)
        self.processes[pod].wait(WAIT_S)

    def restart(self, pod: str) -> None:
        """Starts it again where it was; returns when it serves, the weights of start-up."""
        self.processes[pod].start()
        self.processes[pod].wait_ready(WAIT_S)

    def _spec(self, pod: str, command: list[str]) -> ServiceSpec:
        # One of the replicas can be stopped in the middle of its work.
        gates = {"STEERSMAN_TEST_GATES": str(self.gates if pod == "policy-0" else self.gates / "none")}
        port = str(self._ports[pod])
        return ServiceSpec(
            name=pod,
            command=(sys.executable, *command, "--port", port, "--metrics-port", "0"),
            address=f"127.0.0.1:{port}",
            environment=ENVIRONMENT | gates,
        )


class Scaling:
    """What happens to the cluster while the job runs, and when."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.said: list[str] = []
        self.done: list[str] = []

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        cluster = self._cluster
        if step == 1:
            cluster.show("policy-1")
            cluster.show("reward-1")
            self.done.append("up")
        elif step == 3:
            (cluster.gates / "generate.shut").touch()
        elif step == 5:
            # A rolling restart: the new pod is ready before the old one terminates.
            cluster.restart("policy-0")
            cluster.show("policy-0")
            cluster.show("policy-1", terminating=True)
            cluster.signal("policy-1", signal.SIGTERM)
            cluster.hide("policy-1")
            self.done.append("rolled")

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        cluster = self._cluster
        self.said.append(message)
        if "killed" not in self.done and (cluster.gates / "generate.entered").exists():
            # It has prompts, and has answered none. The API server learns of it later.
            cluster.signal("policy-0", signal.SIGKILL)
            cluster.signal("reward-0", signal.SIGKILL)
            (cluster.gates / "generate.shut").unlink()
            cluster.hide("policy-0")
            cluster.hide("reward-0")
            self.done.append("killed")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with ApiServer() as api:
        (tmp_path / "config").write_text(json.dumps(api.kubeconfig()), encoding="utf-8")
        made = Cluster(tmp_path, api)
        with made.processes:
            for pod in ("policy-0", "reference-0", "reward-0"):
                made.show(pod)
            yield made


def test_a_job_goes_through_scaling_a_death_and_a_rolling_restart(cluster: Cluster, tmp_path: Path) -> None:
    services = {"policies": ["k8s:///policy"], "reference": "k8s:///reference", "reward": "k8s:///reward"}
    job = PpoConfig.model_validate(settings(cluster.model, tmp_path, services, total_steps=STEPS, max_staleness=1))
    scaling = Scaling(cluster)
    with Run(tmp_path / "run", run_id="demo", listener=scaling) as run:
        result = run_ppo(job, run)

    assert (result.steps, result.stopped, scaling.done) == (STEPS, False, ["up", "killed", "rolled"])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # None lost, none doubled.
    assert [row["episode"] for row in rows] == [NUM_PROMPTS * NUM_SAMPLES * step for step in range(1, STEPS + 1)]
    assert sum(row["rollout/dropped"] for row in rows) == 0
    # Weights before prompts: no replica drew a sample by the weights of its start-up, or by others too old.
    assert sum(row["rollout/stale_redrawn"] for row in rows) == 0
    # What the dead one had was drawn again.
    assert sum(row["rollout/resent"] for row in rows) >= NUM_SAMPLES
    assert rows[-1]["push/replicas_behind"] == 0
