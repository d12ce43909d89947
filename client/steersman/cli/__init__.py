"""The `steersman` command, and the supervisor of local service processes. Needs the `cli` extra, never torch."""

import os

# gRPC core logs every lost connection as a line of its own; what matters is said by the errors.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
