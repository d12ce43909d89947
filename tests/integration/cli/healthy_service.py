"""A tiny program that speaks grpc.health.v1, for the tests of the supervisor: `python healthy_service.py ADDRESS MODE`.

Modes: `serve` ends on SIGTERM; `stubborn` ignores SIGTERM; `never` never says SERVING; `die` writes a line and exits 3;
`leaky` starts a helper that it leaves behind; `parent` starts this program as `serve` under a supervisor, prints that
child's pid, and waits.
"""

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def serve(address: str, mode: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if mode == "stubborn" else stop.set())
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    status = health_pb2.HealthCheckResponse
    servicer.set("", status.NOT_SERVING if mode == "never" else status.SERVING)
    server.add_insecure_port(address)
    server.start()
    sys.stdout.write(f"listening on {address}\n")
    sys.stdout.flush()
    while not stop.wait(0.05):
        pass
    server.stop(0).wait()
    sys.stdout.write("ended in order\n")


def supervise(address: str) -> None:
    from steersman.cli.supervisor import ServiceSpec, Supervisor

    spec = ServiceSpec(name="child", command=(sys.executable, __file__, address, "serve"), address=address)
    with Supervisor([spec], start_timeout=30) as supervisor:
        sys.stdout.write(f"{supervisor['child'].pid}\n")
        sys.stdout.flush()
        supervisor.wait()


if __name__ == "__main__":
    where, how = sys.argv[1:]
    if how == "die":
        sys.stderr.write("model: is /nowhere, allowed: a folder\n")
        sys.exit(3)
    if how == "leaky":
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stdout.write(f"helper {helper.pid}\n")
        sys.stdout.flush()
    if how == "parent":
        supervise(where)
    else:
        serve(where, how)
