"""Servers load what their pods give them, so that a setting with a new name is noticed here and not in a cluster."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from overlays import K8S, SETTINGS, Overlay

from steersman.reward.settings import RewardSettings
from steersman.serving.security.access import AccessList
from steersman.serving.settings import SettingsError
from steersman.wire.roles import Role


@pytest.mark.parametrize("name", SETTINGS)
def test_servers_load_their_settings(overlay: Overlay, name: str, tmp_path, monkeypatch) -> None:
    settings = overlay.settings(name, tmp_path, monkeypatch)
    assert settings.host == "0.0.0.0"
    assert settings.log_format == "json"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_does_not_exist_would_be_noticed(name: str, tmp_path: Path) -> None:
    values = yaml.safe_load((K8S / "base" / name / "settings.yaml").read_text())
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values | {"grace_second": 1}))
    with pytest.raises(SettingsError, match="grace_second: no such setting"):
        SETTINGS[name].load(["--config", str(tmp_path / "settings.yaml"), "--insecure"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_base_alone_does_not_start(name: str, monkeypatch) -> None:
    if name == "trainer":
        monkeypatch.setenv("STEERSMAN_KUBERNETES__IMAGE", "steersman/trainer:0.1.0")
    with pytest.raises(SettingsError, match="reachable from outside"):
        SETTINGS[name].load(["--config", str(K8S / "base" / name / "settings.yaml")])


def test_models_are_read_where_they_are_mounted(overlay: Overlay, tmp_path, monkeypatch) -> None:
    mounts = {one["mountPath"] for one in overlay.server("reward")["volumeMounts"]}
    reward = overlay.settings("reward", tmp_path, monkeypatch)
    assert isinstance(reward, RewardSettings)
    assert {str(root) for root in reward.models.roots} <= mounts


def test_callers_are_known_by_certificates_that_are_issued(overlay: Overlay, tmp_path: Path) -> None:
    certificates = overlay.of("Certificate")
    if not certificates:
        pytest.skip("this overlay has no callers")
    file = tmp_path / "callers.yaml"
    file.write_text(overlay.of("ConfigMap")["callers"]["data"]["callers.yaml"])
    access = AccessList(file)
    roles = {}
    for name, certificate in certificates.items():
        names = certificate["spec"].get("dnsNames", ())
        if (caller := access.find(None, names)) is not None:
            assert "client auth" in certificate["spec"]["usages"], name
            roles[name] = caller.roles
    # Prometheus and the servers may ask what anybody who is known may not even ask.
    assert roles == {
        "training-job": {Role.GENERATE, Role.LOGPROBS, Role.SCORE, Role.PUSH_WEIGHTS},
        "policy": {Role.PUSH_WEIGHTS},
        "operator": {Role.GENERATE, Role.LOGPROBS, Role.SCORE, Role.MANAGE_MODELS, Role.MANAGE_JOBS},
    }
    assert len(yaml.safe_load(file.read_text())["callers"]) == len(roles)


def test_servers_have_the_name_that_callers_by_address_expect(overlay: Overlay) -> None:
    for name, pod in overlay.pods().items():
        for volume in pod["spec"]["volumes"]:
            if "secret" not in volume:
                continue
            (certificate,) = [
                one
                for one in overlay.of("Certificate").values()
                if one["spec"]["secretName"] == volume["secret"]["secretName"]
            ]
            # The last one is for callers behind kubectl port-forward.
            names = {"steersman", name, f"{name}.steersman", f"{name}.steersman.svc", "localhost"}
            assert names <= set(certificate["spec"]["dnsNames"])
            assert "server auth" in certificate["spec"]["usages"]


@pytest.mark.slow
def test_models_of_the_trial_are_made_once_and_are_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    program = [sys.executable, str(K8S / "overlays" / "dev" / "tiny_models.py"), str(tmp_path)]
    # Both at once, as pods would.
    started = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(one.communicate(timeout=120)[0].strip().partition(": ")[2] for one in started)
    assert said == ["everything is there", "made policy, reward and prompts.jsonl"]
    assert all(one.returncode == 0 for one in started)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = tokenizer("question 7? ").input_ids
    assert tokenizer.decode(ids) == "question 7? "
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert policy.config.vocab_size == len(tokenizer)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").config.num_labels == 1
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 256
