"""Every rendered object against the schemas of several versions of Kubernetes."""

import copy

import kubernetes_validate
import pytest
from overlays import Overlay

VERSIONS = ("1.29", "1.32", "1.34", "1.37")
# Of operators, whose schemas are not Kubernetes' own.
CUSTOM = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "Issuer": "cert-manager.io/v1",
    "Certificate": "cert-manager.io/v1",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_take_every_object(overlay: Overlay, version: str) -> None:
    for one in overlay.objects:
        if one["kind"] in CUSTOM:
            assert one["apiVersion"] == CUSTOM[one["kind"]]
        else:
            kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_object_would_be_seen(overlay: Overlay) -> None:
    wrong = copy.deepcopy(overlay.of("Deployment")["policy"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_no_object_is_there_twice(overlay: Overlay) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in overlay.objects]
    assert len(set(names)) == len(names)


def test_all_is_in_one_namespace(overlay: Overlay) -> None:
    assert list(overlay.of("Namespace")) == ["steersman"]
    cluster_wide = {"Namespace", "PriorityClass"}
    found = {one["metadata"].get("namespace") for one in overlay.objects if one["kind"] not in cluster_wide}
    assert found == {"steersman"}
    for binding in overlay.of("RoleBinding").values():
        assert [subject["namespace"] for subject in binding["subjects"]] == ["steersman"]
