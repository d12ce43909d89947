"""The launcher with the token and the Role of the trainer service, against a real API server and its controllers."""

import yaml
from control_plane import ControlPlane, eventually, path_of
from launching import ONE, TWO, Runs, assert_holds, launch, until, waiting_for
from nodes import Nodes
from pod_cases import ENDINGS, PENDING

from steersman.cluster.objects import handle_of
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LogPart, WorkerStatus
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec


async def test_a_launch_makes_what_was_described(
    launcher: KubernetesLauncher, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    run = run_of()
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources(labels={"team": "a"}))
    described = yaml.safe_load(await launcher.describe(run, spec))
    handle = await launch(launcher, run)
    made = accounts.admin.ask("GET", path_of("Job", namespace, ONE))
    assert handle == handle_of(namespace, ONE, made["metadata"]["uid"], jobset=False)
    assert_holds(made, described)
    pod = nodes.pod(nodes.pod_of(ONE))
    assert_holds(pod["spec"], described["spec"]["template"]["spec"])
    assert pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == made["metadata"]["uid"]


async def test_a_launch_that_was_not_recorded_is_found_again(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    assert await launch(launcher, run_of()) == handle
    jobs = accounts.admin.ask("GET", path_of("Job", namespace))["items"]
    assert [one["metadata"]["name"] for one in jobs] == [ONE]


async def test_why_a_pod_does_not_run(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    assert "no node has been chosen" in await waiting_for(launcher, handle, pod)
    # Nothing has printed yet, says the API server.
    assert (await launcher.read_log(handle, run_of(), LogPart())).lines == []
    nodes.bind(pod)
    assert "its node prepares it" in (await launcher.status(handle)).waiting
    for status, words in PENDING:
        nodes.say(pod, status)
        waiting = (await launcher.status(handle)).waiting
        for word in [pod, *words]:
            assert word in waiting
    nodes.say(pod, {"phase": "Running"})
    assert await launcher.status(handle) == WorkerStatus(alive=True)


async def test_how_workers_end(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    cases = [({"exitCode": 0, "reason": "Completed"}, ["ended well"]), *ENDINGS]
    handles = [await launch(launcher, run_of(f"job{number}")) for number in range(len(cases))]
    for number, (terminated, _) in enumerate(cases):
        pod = nodes.pod_of(f"steersman-job{number}-1")
        nodes.run(pod)
        nodes.finish(pod, terminated)
    for handle, (_, words) in zip(handles, cases, strict=True):
        status = await until(launcher, handle, lambda now: not now.alive)
        for word in words:
            assert word in status.ending
    # What comes after the end is a Job of its own.
    again = await launch(launcher, run_of("job0"))
    assert again.split("/")[1] == "steersman-job0-2"


async def test_a_pod_that_was_put_out_has_a_successor(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handles = [await launch(launcher, run_of(name)) for name in ("told-to-end", "taken-away")]
    names = [handle.split("/")[1] for handle in handles]
    first = [nodes.pod_of(name) for name in names]
    for pod in first:
        nodes.run(pod)
    nodes.finish(first[0], {"exitCode": 143, "reason": "Error"})
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    nodes.finish(first[1], {"exitCode": 137, "reason": "Error"}, conditions=(disruption,))
    for handle, name, pod in zip(handles, names, first, strict=True):
        second = nodes.pod_of(name, but=pod)
        assert second in (await launcher.status(handle)).waiting
        nodes.run(second)
        assert await launcher.status(handle) == WorkerStatus(alive=True)


async def test_stop_ends_the_pod_in_peace_and_the_job_after_it(
    launcher: KubernetesLauncher, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    nodes.run(pod)
    await launcher.stop(handle)
    await launcher.stop(handle)
    eventually(lambda: nodes.pod(pod)["metadata"].get("deletionTimestamp"), "the pod is told to end")
    assert nodes.pod(pod)["metadata"]["deletionGracePeriodSeconds"] == 120
    # It writes its checkpoint.
    assert (await launcher.status(handle)).alive
    # A job that is told to end counts as over for the next launch.
    assert (await launch(launcher, run_of())).split("/")[1] == TWO
    nodes.end(pod)
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"{ONE} was deleted" in status.ending
    await launcher.stop(handle)
    await launcher.kill(handle)


async def test_kill_ends_the_job_and_its_pods_at_once(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    nodes.run(pod)
    await launcher.stop(handle)
    await launcher.kill(handle)
    eventually(lambda: nodes.pod(pod)["metadata"].get("deletionGracePeriodSeconds") == 1, "the grace is cut short")
    nodes.end(pod)
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"{ONE} was deleted" in status.ending


async def test_a_later_job_of_the_same_name_is_another(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    forged = f"{handle.rpartition('/')[0]}/another-uid"
    assert not (await launcher.status(forged)).alive
    await launcher.stop(forged)
    await launcher.kill(forged)
    held = accounts.admin.ask("GET", path_of("Job", namespace, ONE))
    assert "deletionTimestamp" not in held["metadata"]
    assert (await launcher.status(handle)).alive
