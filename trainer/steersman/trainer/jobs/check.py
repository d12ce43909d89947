"""Checks the settings of a job for programs that do not import the trainer: `python -m steersman.trainer.jobs.check`.

Reads `{"kind": ..., "config": ...}` from stdin, writes `[[field, description], ...]` to stdout, and exits with 0.
"""

import json
import sys

from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES
from steersman.trainer.jobs.validation import find_violations


def main() -> int:
    """Checks. Returns the exit status."""
    asked = json.load(sys.stdin)
    violations = find_violations(STAGES, JobKind(asked["kind"]), asked["config"])
    json.dump([[violation.field, violation.description] for violation in violations], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
