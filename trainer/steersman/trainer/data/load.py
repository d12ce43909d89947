"""Files to lists of records, with the bad rows refused or counted."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from steersman.trainer.data.forms import FormOptions, detect_form, infer_preference_base, parse_row
from steersman.trainer.data.records import Comparison, Demonstration, Prompt, Record
from steersman.trainer.data.rows import BadRow, DataError, Row, read_rows
from steersman.trainer.data.settings import DataSettings, Form

_log = logging.getLogger(__name__)
_SHOWN_BAD_ROWS = 5
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What reading came to. ``num_bad_rows`` were left out; ``bad_rows`` are the first few of them."""

    num_records: int
    num_bad_rows: int
    bad_rows: tuple[BadRow, ...]
    forms: dict[str, Form]

    def metrics(self) -> dict[str, float]:
        """The counts, as they are logged."""
        return {"data/num_records": float(self.num_records), "data/num_bad_rows": float(self.num_bad_rows)}


def load_comparisons(settings: DataSettings) -> tuple[list[Comparison], LoadReport]:
    """The comparisons in the files. A row of a form without a ranking is bad. DataError if none is left."""
    return _load(settings, _as_comparison)


def load_demonstrations(settings: DataSettings) -> tuple[list[Demonstration], LoadReport]:
    """The demonstrations in the files; of a comparison, its best response. DataError if none is left."""
    return _load(settings, _as_demonstration)


def load_prompts(settings: DataSettings) -> tuple[list[Prompt], LoadReport]:
    """The prompts in the files, whatever else their rows hold. DataError if none is left."""
    return _load(settings, lambda record: Prompt(prompt=record.prompt, origin=record.origin))


def _load(settings: DataSettings, convert: Callable[[Record], R]) -> tuple[list[R], LoadReport]:
    records: list[R] = []
    bad: list[BadRow] = []
    num_bad = 0
    forms: dict[str, Form] = {}
    for item in _records(settings, forms):
        try:
            if isinstance(item, BadRow):
                raise item
            records.append(convert(item))
        except BadRow as error:
            if settings.on_bad_row == "fail":
                raise
            num_bad += 1
            if len(bad) < _SHOWN_BAD_ROWS:
                bad.append(error)
                _log.warning("left out: %s", error)
        if len(records) == settings.max_records:
            break
    if not records:
        why = f"; the first bad row: {bad[0]}" if bad else ""
        raise DataError(f"no usable row in {', '.join(settings.files)}{why}")
    report = LoadReport(num_records=len(records), num_bad_rows=num_bad, bad_rows=tuple(bad), forms=forms)
    return records, report


def _records(settings: DataSettings, forms: dict[str, Form]) -> Iterator[Record | BadRow]:
    for file in settings.files:
        form: Form | None = None if settings.form == "auto" else settings.form
        options: FormOptions | None = None
        for row in read_rows(file):
            if isinstance(row, BadRow):
                yield row
                continue
            if form is None:
                form = detect_form(row.fields)
            if form is None:
                names = ", ".join(sorted(row.fields)[:10]) or "none"
                yield BadRow(row.origin, f"its fields fit no known form (it has {names})")
                continue
            if options is None:
                forms[file] = form
                options = _options(file, form, settings)
            try:
                yield parse_row(row, form, options)
            except BadRow as error:
                yield error


def _options(file: str, form: Form, settings: DataSettings) -> FormOptions:
    base: int | None = settings.preference_base
    if form == "candidates" and base is None:
        # A pass of its own over the file: one row cannot say from what its choice counts.
        base = infer_preference_base(row for row in read_rows(file) if isinstance(row, Row))
    return FormOptions(preference_base=base)


def _as_comparison(record: Record) -> Comparison:
    if not isinstance(record, Comparison):
        raise BadRow(record.origin, "holds no comparison, must have at least two ranked responses")
    return record


def _as_demonstration(record: Record) -> Demonstration:
    if isinstance(record, Comparison):
        return Demonstration(prompt=record.prompt, completion=record.best, origin=record.origin)
    if not isinstance(record, Demonstration):
        raise BadRow(record.origin, "holds no response, must have a completion")
    return record
