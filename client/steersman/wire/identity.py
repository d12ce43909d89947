"""Who answered and with which weights, as plain dataclasses that handlers may use."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, order=True)
class WeightVersion:
    """One set of weights: the run that made it and the number of optimiser updates since that run began.

    Weights loaded at start-up have an empty run and step 0.
    """

    run_id: str = ""
    step: int = 0

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
