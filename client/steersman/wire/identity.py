"""Who answered and with which weights, as plain dataclasses that handlers may use."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, order=True)
class WeightVersion:
    """One set of weights: the run that made it and the number of optimiser updates since that run began.

    Weights loaded at start-up have an empty run and step 0. A run id that ends in a dot and a number from 1 on names an
    attempt of a job: what "demo.2" makes replaces what "demo.1" made, whatever its step, and never the other way round.
    """

    run_id: str = ""
    step: int = 0

    @property
    def job(self) -> str:
        """What the attempts of a job have in common: "demo." of "demo.2"; the run id where it numbers no attempt."""
        return self._lineage()[0]

    @property
    def attempt(self) -> int:
        """2 of "demo.2"; 0 where the run id numbers no attempt."""
        return self._lineage()[1]

    def is_stale_against(self, other: "WeightVersion") -> bool:
        """True if `other` is of the same job and newer: of a later attempt, or of the same and a later step."""
        return self.job == other.job and (self.attempt, self.step) < (other.attempt, other.step)

    def _lineage(self) -> tuple[str, int]:
        job, dot, number = self.run_id.rpartition(".")
        # One way to write a number only: "demo.02" is no attempt, else it could not be told from "demo.2".
        is_attempt = bool(dot) and number.isascii() and number.isdecimal() and not number.startswith("0")
        return (job + dot, int(number)) if is_attempt else (self.run_id, 0)

    def __str__(self) -> str:
        return f"{self.run_id}@{self.step}" if self.run_id else "initial"

    @classmethod
    def parse(cls, text: str) -> "WeightVersion":
        """Reads what `str` wrote. ValueError for anything else."""
        if text == "initial":
            return cls()
        run_id, separator, step = text.rpartition("@")
        if not separator or not run_id or not step.isdecimal():
            raise ValueError(f"weight version is {text!r}, allowed: 'initial' or 'RUN_ID@STEP'")
        return cls(run_id=run_id, step=int(step))


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a sample came from `version`."""

    version: WeightVersion
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model behind a service. `dtype` is a torch name such as "bfloat16"."""

    name: str
    revision: str = ""
    weight_version: WeightVersion = field(default_factory=WeightVersion)
    vocab_size: int = 0
    max_sequence_tokens: int = 0
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
