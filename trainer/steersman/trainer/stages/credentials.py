"""The credentials of a job, read from the files that its settings name."""

from pathlib import Path

from steersman.client import Credentials
from steersman.trainer.stages.ppo_config import CredentialSettings


def read_credentials(settings: CredentialSettings | None) -> Credentials | None:
    """What the job shows to services, None for services in the clear. ValueError names the file that cannot be used."""
    if settings is None:
        return None
    token = _read("token_file", settings.token_file)
    return Credentials(
        root_certificates=_read("ca_file", settings.ca_file),
        certificate_chain=_read("cert_file", settings.cert_file),
        private_key=_read("key_file", settings.key_file),
        token=token.decode().strip() if token is not None else None,
        server_name=settings.server_name,
    )


def _read(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"services.credentials.{name}: cannot read {path}: {error.strerror}") from None
    if not found.strip():
        raise ValueError(f"services.credentials.{name}: {path} is empty")
    return found
