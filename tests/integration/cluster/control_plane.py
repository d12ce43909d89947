"""A control plane without nodes: etcd, kube-apiserver and kube-controller-manager on loopback, for a session of tests.

RBAC and the admission plugins that are on by default are on. There is no scheduler and no kubelet: tests bind pods to
nodes that are not there, and say what a kubelet would say of them.
"""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import trustme
import urllib3
import yaml
from kubernetes import client

from steersman.cli import tether
from steersman.cli.supervisor import free_port

ASSETS: Final = "KUBEBUILDER_ASSETS"
SERVER: Final = ("etcd", "kube-apiserver", "kubectl")
CONTROLLERS: Final = "kube-controller-manager"
WAIT_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.05
# What jobs, Services and rights need; others would only take time.
_CONTROLLERS: Final = (
    "clusterrole-aggregation-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "resourcequota-controller",
    "serviceaccount-controller",
    "ttl-after-finished-controller",
)
_ADMIN: Final = "administrator-of-the-test"
_ISSUER: Final = "https://kubernetes.default.svc"

Object = dict[str, Any]
Value = TypeVar("Value")


def find(*names: str) -> dict[str, str] | str:
    """Where these programs are, or why they cannot be used here."""
    folders = os.pathsep.join(filter(None, (os.environ.get(ASSETS), os.environ.get("PATH"))))
    found = {name: shutil.which(name, path=folders) for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        hint = "setup-envtest makes one, without the controller manager"
        return f"{', '.join(missing)} not found: set {ASSETS} to a folder that has them ({hint}), or PATH"
    return {name: str(path) for name, path in found.items()}


def eventually(look: Callable[[], Value | None], what: str) -> Value:
    """What `look` returns once that is neither None nor False. Fails after a long while."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (seen := look()) is None or seen is False:
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_SECONDS:g} s"
        time.sleep(_LOOK_SECONDS)
    return seen


class Refused(Exception):
    """An answer of the API server that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """The API server by bare HTTP, as one user."""

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self._url = url
        self._http = urllib3.PoolManager(ca_certs=str(authority), retries=False, timeout=60.0)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def ask(self, verb: str, path: str, body: Object | None = None, *, content: str = "application/json") -> Object:
        """The answer. Raises Refused, or urllib3's errors if there is none."""
        headers = self._headers | {"Content-Type": content}
        data = None if body is None else json.dumps(body).encode()
        response = self._http.request(verb, self._url + path, body=data, headers=headers)
        if response.status >= 300:
            try:
                raise Refused(response.status, response.json()["message"])
            except ValueError:
                raise Refused(response.status, response.data.decode(errors="replace")) from None
        return dict(response.json())

    def get(self, path: str) -> Object | None:
        """An object, None if it is not there; nor is it while the API server begins to serve its kind (429)."""
        try:
            return self.ask("GET", path)
        except Refused as refused:
            if refused.status in (404, 429):
                return None
            raise

    def merge(self, path: str, changes: Object) -> Object:
        """A JSON merge patch."""
        return self.ask("PATCH", path, changes, content="application/merge-patch+json")


class ControlPlane:
    """Use as a context manager. `admin` may do everything."""

    def __init__(self, folder: Path) -> None:
        programs = find(*SERVER)
        assert isinstance(programs, dict), programs
        self._programs = programs
        self._folder = folder
        self._etcd_port, self._port = free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.authority = folder / "ca.crt"
        self._write_secrets()
        self.url = f"https://127.0.0.1:{self._port}"
        self.admin = Api(self.url, self.authority, _ADMIN)

    def __enter__(self) -> "ControlPlane":
        try:
            self._start_etcd()
            self.start_api_server()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing of it is kept.
        for name in reversed(list(self._processes)):
            self._end(name)

    def start_api_server(self) -> None:
        """Returns once it is ready."""
        at = self._folder
        self._start(
            "kube-apiserver",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--cert-dir={at}",
            f"--tls-cert-file={at / 'server.crt'}",
            f"--tls-private-key-file={at / 'server.key'}",
            f"--token-auth-file={at / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={_ISSUER}",
            f"--service-account-key-file={at / 'accounts.key'}",
            f"--service-account-signing-key-file={at / 'accounts.key'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            # No pod reaches it, and the Service `kubernetes` does not take a loopback address.
            "--endpoint-reconciler-type=none",
        )
        self._wait("kube-apiserver", self._is_ready)

    def stop_api_server(self) -> None:
        """Its clients see their connections end."""
        self._end("kube-apiserver")

    def start_controllers(self) -> None:
        """If they do not run yet. Skips the test if they are not here."""
        if CONTROLLERS in self._processes:
            return
        found = find(CONTROLLERS)
        if isinstance(found, str):
            pytest.skip(found)
        self._programs |= found
        kubeconfig = self._folder / "controllers.yaml"
        kubeconfig.write_text(yaml.safe_dump(self.kubeconfig(_ADMIN)))
        self._start(
            CONTROLLERS,
            f"--kubeconfig={kubeconfig}",
            f"--controllers={','.join(_CONTROLLERS)}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        )
        # The first thing that shows that they work.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self._wait(CONTROLLERS, lambda: self.admin.get(account) is not None)

    def kubeconfig(self, token: str, namespace: str = "default") -> Object:
        """What leads a client here."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.authority)}}
            ],
            "users": [{"name": "test", "user": {"token": token}}],
        }

    def client(self) -> client.ApiClient:
        """The official client, as administrator."""
        settings = client.Configuration(host=self.url, api_key={"authorization": f"Bearer {_ADMIN}"})
        settings.ssl_ca_cert = str(self.authority)
        return client.ApiClient(settings)

    def kubectl(self, *arguments: str, documents: list[Object] | None = None) -> subprocess.CompletedProcess[str]:
        """The command as administrator; `documents` come from its input."""
        kubeconfig = self._folder / "admin.yaml"
        if not kubeconfig.exists():
            kubeconfig.write_text(yaml.safe_dump(self.kubeconfig(_ADMIN)))
        command = [self._programs["kubectl"], f"--kubeconfig={kubeconfig}", *arguments]
        given = None if documents is None else yaml.safe_dump_all(documents)
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)

    def token(self, namespace: str, account: str) -> str:
        """A token of a ServiceAccount, as a pod gets it."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return str(self.admin.ask("POST", path, body)["status"]["token"])

    def make(self, namespace: str, *objects: Object) -> None:
        """Makes objects in a namespace."""
        for one in objects:
            self.admin.ask("POST", path_of(one["kind"], namespace), one)

    def define(self, group: str, version: str, kind: str) -> None:
        """Has the API server keep a kind that is not Kubernetes' own. Nothing makes anything of its objects."""
        asked = definition(group, version, kind)
        self.admin.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", asked)
        path = f"/apis/{group}/{version}/{asked['spec']['names']['plural']}"
        eventually(lambda: self.admin.get(path) is not None, f"{kind} is served")

    def wait_for_right(self, namespace: str, account: str, group: str, resource: str, verb: str) -> None:
        """Returns once an account has a right: a Role that was just made does not count yet."""
        name, _, part = resource.partition("/")
        attributes = {"namespace": namespace, "group": group, "resource": name, "subresource": part, "verb": verb}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{namespace}:{account}",
                "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}"],
                "resourceAttributes": attributes,
            },
        }
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        eventually(
            lambda: self.admin.ask("POST", path, review)["status"]["allowed"], f"{account} may {verb} {resource}"
        )

    @contextmanager
    def namespace(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        """A namespace; it is deleted at the end, and nobody waits for that."""
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}}
        self.admin.ask("POST", "/api/v1/namespaces", body)
        try:
            yield name
        finally:
            with contextlib.suppress(Refused):  # a test may have deleted it
                self.admin.ask("DELETE", f"/api/v1/namespaces/{name}")

    def _start_etcd(self) -> None:
        address = f"http://127.0.0.1:{self._etcd_port}"
        self._start(
            "etcd",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={address}",
            f"--advertise-client-urls={address}",
            "--listen-peer-urls=http://127.0.0.1:0",
            "--unsafe-no-fsync",
        )

        def answers() -> bool:
            try:
                return urllib3.request("GET", f"{address}/health", retries=False, timeout=5.0).status == 200
            except urllib3.exceptions.HTTPError:
                return False

        self._wait("etcd", answers)

    def _is_ready(self) -> bool:
        try:
            self.admin.ask("GET", "/version")
            ready = self.admin._http.request("GET", f"{self.url}/readyz", headers=self.admin._headers)
        except (Refused, urllib3.exceptions.HTTPError):
            return False
        return bool(ready.status == 200)

    def _write_secrets(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.authority)
        identity = authority.issue_cert("127.0.0.1", "localhost")
        identity.cert_chain_pems[0].write_to_path(self._folder / "server.crt")
        identity.private_key_pem.write_to_path(self._folder / "server.key")
        authority.issue_cert("accounts.test").private_key_pem.write_to_path(self._folder / "accounts.key")
        with (self._folder / "tokens.csv").open("w", newline="") as file:
            csv.writer(file).writerow([_ADMIN, "admin", "1", "system:masters"])

    def _start(self, name: str, *flags: str) -> None:
        log = self._folder / f"{name}.log"
        with log.open("ab") as file:
            self._processes[name] = subprocess.Popen(
                [sys.executable, tether.__file__, str(os.getpid()), self._programs[name], *flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self._folder,
            )

    def _wait(self, name: str, look: Callable[[], bool]) -> None:
        def checked() -> bool:
            log = (self._folder / f"{name}.log").read_text(errors="replace")
            assert self._processes[name].poll() is None, f"{name} has ended: {log[-2000:]}"
            return look()

        eventually(checked, f"{name} answers")

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait(60)


# Where objects of a kind are, below a namespace or beside all of them.
_PLACES: Final = {
    "Job": "/apis/batch/v1/{0}/jobs",
    "LimitRange": "/api/v1/{0}/limitranges",
    "Pod": "/api/v1/{0}/pods",
    "ResourceQuota": "/api/v1/{0}/resourcequotas",
    "Role": "/apis/rbac.authorization.k8s.io/v1/{0}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/{0}/rolebindings",
    "Service": "/api/v1/{0}/services",
    "ServiceAccount": "/api/v1/{0}/serviceaccounts",
    "ValidatingAdmissionPolicy": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """Of objects of a kind, or of one."""
    place = _PLACES[kind].format(f"namespaces/{namespace}")
    return f"{place}/{name}" if name else place


def definition(group: str, version: str, kind: str) -> Object:
    """Of a kind that takes every field."""
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}],
        },
    }
