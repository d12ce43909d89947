"""`steersman token`: a token for a caller, and its entry in the list of callers."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Final

import yaml

from steersman.cli import console
from steersman.wire.roles import Role

_TOKEN_BYTES: Final = 32


def entry(name: str, roles: Sequence[Role], token: str) -> str:
    """The YAML of one caller, as an item of the list `callers` in the file that `access_file` names."""
    fields = {
        "name": name,
        "token_sha256": hashlib.sha256(token.encode()).hexdigest(),
        "roles": [str(role) for role in dict.fromkeys(roles)],
    }
    return yaml.safe_dump([fields], sort_keys=False, allow_unicode=True)


def run(name: str, roles: Sequence[Role]) -> None:
    """Prints a new token to stdout, this once, and its entry to stderr."""
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    console.err().out(entry(name, roles, token), end="")
    console.write(token + "\n")
