import pytest
from pydantic import ValidationError

from steersman.trainer.stages.credentials import read_credentials
from steersman.trainer.stages.ppo_config import CredentialSettings


def test_files_become_credentials(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "token").write_text("secret\n")
    found = read_credentials(
        CredentialSettings(
            ca_file=str(tmp_path / "ca"),
            cert_file=str(tmp_path / "cert"),
            key_file=str(tmp_path / "key"),
            token_file=str(tmp_path / "token"),
            server_name="policy.example",
        )
    )
    assert found is not None
    assert (found.root_certificates, found.certificate_chain, found.private_key) == (b"ca", b"cert", b"key")
    assert (found.token, found.server_name, found.tls) == ("secret", "policy.example", True)
    assert "secret" not in repr(found)
    assert read_credentials(None) is None


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"services.credentials.token_file: cannot read"):
        read_credentials(CredentialSettings(token_file=str(tmp_path / "none")))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=r"services.credentials.ca_file: .* is empty"):
        read_credentials(CredentialSettings(ca_file=str(tmp_path / "empty")))
    with pytest.raises(ValidationError, match="belong together"):
        CredentialSettings(cert_file="a")
