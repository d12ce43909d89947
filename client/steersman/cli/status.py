"""`steersman status`: what runs where, and with which weights."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from steersman.client.channel import ChannelSettings, Credentials
from steersman.client.health import HealthClient, ServingStatus
from steersman.client.policy import PolicyClient
from steersman.client.reference import ReferenceClient
from steersman.client.reward import RewardClient
from steersman.client.trainer import TrainerClient
from steersman.client.types import JobState
from steersman.wire.errors import SteersmanError
from steersman.wire.identity import ModelInfo

# A service that is away should be said at once, not after retries.
_SETTINGS: Final = ChannelSettings(retry_attempts=1)
_COLOURS: Final = {"SERVING": "green", "NOT_SERVING": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One service at one address. `detail` says what is special about it, or what is wrong."""

    service: str
    address: str
    health: str
    model: str = ""
    weight_version: str = ""
    detail: str = ""

    @property
    def is_serving(self) -> bool:
        """True if its health says SERVING."""
        return self.health == ServingStatus.SERVING.name


def _model(info: ModelInfo) -> dict[str, str]:
    detail = f"{info.dtype}, {info.max_sequence_tokens} tokens" if info.max_sequence_tokens else info.dtype
    return {"model": info.name, "weight_version": str(info.weight_version), "detail": detail}


def _detail(service: str, address: str, credentials: Credentials | None, timeout: float) -> dict[str, str]:
    """What the service says of itself."""
    options: dict[str, Any] = {"credentials": credentials, "timeout": timeout, "settings": _SETTINGS}
    if service == "policy":
        with PolicyClient(address, **options) as policy:
            return _model(policy.model(timeout=timeout))
    if service == "reference":
        with ReferenceClient(address, **options) as reference:
            return _model(reference.model(timeout=timeout))
    if service == "reward":
        with RewardClient(address, **options) as reward:
            scorers = reward.scorers(timeout=timeout)
        default = next((scorer for scorer in scorers if scorer.is_default), None)
        found = _model(default.model) if default is not None and default.model is not None else {}
        names = ", ".join(f"{scorer.name} ({scorer.kind})" for scorer in scorers)
        return found | {"detail": f"scorers: {names}"}
    with TrainerClient(address, **options) as trainer:
        running = [job.id for job in trainer.list_jobs(states=[JobState.RUNNING], timeout=timeout)]
    return {"detail": f"{len(running)} jobs running" + (f": {', '.join(running[:3])}" if running else "")}


def look(service: str, address: str, credentials: Credentials | None, timeout: float) -> Row:
    """Health and identity of one service; an unreachable one is a row as well."""
    try:
        with HealthClient(address, credentials=credentials, timeout=timeout, settings=_SETTINGS) as health:
            status = health.check()
    except SteersmanError as error:
        return Row(service=service, address=address, health=error.code.name, detail="no answer")
    try:
        about = _detail(service, address, credentials, timeout)
    except SteersmanError as error:
        about = {"detail": str(error)}
    return Row(service=service, address=address, health=status.name, **about)


def look_at_all(targets: dict[str, str], credentials: Credentials | None, timeout: float) -> list[Row]:
    """One row for each address of each service, asked side by side. `a:1,b:2` are two addresses."""
    places = [(service, part.strip()) for service, target in targets.items() for part in target.split(",")]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(lambda place: look(place[0], place[1], credentials, timeout), places))


def table(rows: list[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, pad_edge=False)
    for name in ("SERVICE", "ADDRESS", "HEALTH", "MODEL", "WEIGHTS", "DETAIL"):
        shown.add_column(name, overflow="fold")
    for row in rows:
        colour = _COLOURS.get(row.health, "red")
        health = f"[{colour}]{row.health}[/]"
        plain = (Text(cell) for cell in (row.model, row.weight_version, row.detail))
        shown.add_row(row.service, Text(row.address), health, *plain)
    return shown


def as_dicts(rows: list[Row]) -> list[dict[str, str]]:
    """The rows for machines."""
    return [asdict(row) for row in rows]
