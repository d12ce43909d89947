"""`python -m steersman.serving.health_check [HOST:PORT]`: asks the health port of the server in this container.

Exit status 0 if it serves, 1 if it does not or nobody answers. For whatever runs a command to see whether a container
is well (Docker, Compose, systemd); kubelets ask the port themselves.
"""

import sys
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEFAULT_ADDRESS: Final = "127.0.0.1:8081"
_TIMEOUT: Final = 5.0


def check(address: str) -> str:
    """What the server says of itself (SERVING, NOT_SERVING), or the status of a call that failed."""
    # No proxy of the environment may stand between.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: list[str]) -> int:
    """Prints what was found."""
    if len(arguments) > 1:
        sys.stderr.write("usage: python -m steersman.serving.health_check [HOST:PORT]\n")
        return 2
    found = check(*arguments or (DEFAULT_ADDRESS,))
    sys.stdout.write(f"{found}\n")
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
