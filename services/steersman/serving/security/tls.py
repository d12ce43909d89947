"""TLS of a server: its own certificate, and the authority that its callers' certificates come from.

Certificates are read again for new connections once their files have changed, so that a rotation needs no restart. A
file that is missing or half-written at that moment changes nothing: the last good certificate serves on.
"""

import logging
import ssl
import threading
from pathlib import Path
from typing import Any, Final

import grpc
from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

_PEM: Final = b"-----BEGIN "


class TlsSettings(BaseModel):
    """Files in PEM form."""

    model_config = ConfigDict(extra="forbid")

    certificate: Path = Field(description="The server's certificate, with those between it and the authority.")
    private_key: Path = Field(description="Its key.")
    client_ca: Path | None = Field(
        default=None, description="Authority of the callers' certificates; callers without one are then refused."
    )


class ServerCertificates:
    """The files of `TlsSettings`, as they are now."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises ValueError naming the setting whose file cannot be used."""
        self._settings = settings
        self._lock = threading.Lock()
        self._pems = self._read()
        _check(settings)

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server. New connections get the newest certificate."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._pems),
            self._changed,
            require_client_authentication=self._settings.client_ca is not None,
        )

    def _changed(self) -> Any:
        """The new configuration, None while it is the one before. Called by gRPC before each handshake."""
        try:
            pems = self._read()
        except ValueError as error:
            logger.error("the certificate stays as it was: %s", error)
            return None
        with self._lock:
            if pems == self._pems:
                return None
            try:
                _check(self._settings)
            except ValueError as error:
                logger.error("the certificate stays as it was: %s", error)
                return None
            self._pems = pems
        logger.info("certificate read again", extra={"file": str(self._settings.certificate)})
        return _configuration(pems)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        settings = self._settings
        client_ca = _read_pem("tls.client_ca", settings.client_ca) if settings.client_ca is not None else None
        certificate = _read_pem("tls.certificate", settings.certificate)
        return _read_pem("tls.private_key", settings.private_key), certificate, client_ca


def reloading_context(settings: TlsSettings) -> ssl.SSLContext:
    """For an HTTP server whose new connections get the newest certificate. Raises as `ssl_context` does."""
    first = newest = ssl_context(settings)
    files = [path for path in (settings.certificate, settings.private_key, settings.client_ca) if path is not None]
    contents = [path.read_bytes() for path in files]

    def renew(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        nonlocal newest, contents
        try:
            found = [path.read_bytes() for path in files]
            if found != contents:
                newest, contents = ssl_context(settings), found
        except (OSError, ValueError) as error:
            logger.error("the certificate stays as it was: %s", error)
        connection.context = newest

    first.sni_callback = renew  # type: ignore[assignment]
    return first


def ssl_context(settings: TlsSettings) -> ssl.SSLContext:
    """For an HTTP server. Raises ValueError naming the setting whose file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.private_key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls.certificate: {settings.certificate} and tls.private_key do not fit: {error}") from None
    if settings.client_ca is not None:
        try:
            context.load_verify_locations(settings.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"tls.client_ca: cannot use {settings.client_ca}: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def certificate_names(auth_context: Any) -> list[str]:
    """Names of a caller's verified certificate: those of its subject, the common name last. Empty without one."""
    names = auth_context.get("x509_subject_alternative_name", ()), auth_context.get("x509_common_name", ())
    return [bytes(name).decode(errors="replace") for part in names for name in part]


def _configuration(pems: tuple[bytes, bytes, bytes | None]) -> Any:
    key, certificate, client_ca = pems
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)


def _check(settings: TlsSettings) -> None:
    """gRPC would refuse every handshake without a word about why; OpenSSL says it."""
    ssl_context(settings)


def _read_pem(field: str, path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{field}: cannot read {path}: {error.strerror}") from None
    if _PEM not in found:
        raise ValueError(f"{field}: {path} holds no PEM")
    return found
