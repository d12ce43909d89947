"""`steersman report`: the trainer's report of a run, made in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from steersman.cli.console import EXIT_USAGE, CommandError, InputError

_MODULE: Final = "steersman.trainer.report"
_MISSING: Final = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def run(run_directory: Path, arguments: list[str]) -> None:
    """Writes the report and passes on what that says. InputError for no folder; CommandError if it
    fails, or if its packages are missing.
    """
    if not run_directory.is_dir():
        raise InputError(f"RUN_DIRECTORY is {run_directory}, allowed: the run folder of a job")
    command = [sys.executable, "-m", _MODULE, str(run_directory), *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return
    if done.returncode == EXIT_USAGE:
        raise InputError(done.stderr.strip().rpartition("\n")[2])
    missing = _MISSING.search(done.stderr)
    if missing is not None or f"No module named {_MODULE}" in done.stderr:
        what = f" ({missing.group(1)} is missing)" if missing is not None else ""
        raise CommandError(f"reports need the trainer's packages{what}: pip install 'steersman[trainer]'")
    raise CommandError(f"the report failed:\n{done.stderr.strip()}")
