"""Pieces of the supervisor that need no process."""

import socket

import pytest

from steersman.cli.supervisor import free_port, port_in_use


def test_a_free_port_is_kept_from_everybody_but_a_server_that_is_told() -> None:
    host, port = "127.0.0.1", free_port()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((host, port))
    assert not port_in_use(host, port)
    with socket.create_server((host, port)) as server:  # sets SO_REUSEADDR
        with socket.create_connection((host, port), timeout=10):
            server.accept()[0].close()
        assert port_in_use(host, port)
