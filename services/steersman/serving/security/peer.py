"""The credentials that a server itself shows when it calls another."""

from pathlib import Path
from typing import Self

import grpc
from pydantic import BaseModel, ConfigDict, Field, model_validator


class PeerCredentials(BaseModel):
    """Files, read for every new connection. TLS in any case."""

    model_config = ConfigDict(extra="forbid")

    ca: Path | None = Field(default=None, description="PEM of the authority to trust; none is the system's.")
    certificate: Path | None = Field(default=None, description="PEM of its own certificate, for mutual TLS.")
    private_key: Path | None = Field(default=None, description="PEM of its key.")
    token: Path | None = Field(default=None, description="File with a bearer token, and nothing else.")
    server_name: str | None = Field(
        default=None, description="Name in the others' certificates, where it is not the one in their addresses."
    )

    @model_validator(mode="after")
    def _whole_identity(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together, allowed: both or neither")
        return self

    def to_grpc(self) -> grpc.ChannelCredentials:
        """For a channel. Raises ValueError for a file that cannot be read."""
        channel = grpc.ssl_channel_credentials(
            root_certificates=_read("ca", self.ca),
            private_key=_read("private_key", self.private_key),
            certificate_chain=_read("certificate", self.certificate),
        )
        token = _read("token", self.token)
        if token is None:
            return channel
        return grpc.composite_channel_credentials(channel, grpc.access_token_call_credentials(token.decode().strip()))


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None
