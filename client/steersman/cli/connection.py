"""Where the services are and how to reach them: options that all commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from steersman.client.channel import Credentials

DEFAULT_ADDRESSES: Final = {
    "policy": "127.0.0.1:50051",
    "reference": "127.0.0.1:50052",
    "reward": "127.0.0.1:50053",
    "trainer": "127.0.0.1:50054",
}
_ADDRESS_HELP: Final = "host:port, dns:///name:port, or several a:1,b:2."


def _address(service: str, *flags: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        *flags, envvar=f"STEERSMAN_{service.upper()}_ADDRESS", help=f"The {service} service: {_ADDRESS_HELP}"
    )
    return option


PolicyAddress = Annotated[str, _address("policy", "--address", "-a")]
ReferenceAddress = Annotated[str, _address("reference", "--address", "-a")]
RewardAddress = Annotated[str, _address("reward", "--address", "-a")]
TrainerAddress = Annotated[str, _address("trainer", "--address", "-a")]
Timeout = Annotated[float | None, typer.Option(min=0.001, help="Seconds for the whole call. Default: the client's.")]


@dataclass(frozen=True, kw_only=True)
class Security:
    """The TLS options in front of the command."""

    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token: str | None = None

    def credentials(self) -> Credentials | None:
        """Credentials for a client; None: in the clear. Raises typer.BadParameter for what does not fit together."""
        if not (self.tls or self.ca_file or self.cert_file or self.key_file):
            if self.token:
                raise typer.BadParameter("a token travels only over TLS: add --tls")
            return None
        try:
            return Credentials(
                root_certificates=_read(self.ca_file),
                certificate_chain=_read(self.cert_file),
                private_key=_read(self.key_file),
                token=self.token,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None else None


def credentials_of(context: typer.Context) -> Credentials | None:
    """The credentials that the options in front of the command ask for."""
    security = context.find_root().obj
    return security.credentials() if isinstance(security, Security) else None
