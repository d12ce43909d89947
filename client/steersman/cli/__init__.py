"""The `steersman` command, and the supervisor of local service processes. Needs the `cli` extra, never torch."""
