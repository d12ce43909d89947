"""`python -m steersman.trainer.report RUN_DIR [-o FILE]`: writes the report of a run or of a pipeline."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steersman.trainer.report.load import load
from steersman.trainer.report.page import render


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page whole or not at all; prints where it is, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m steersman.trainer.report", description="Write a report of a run.")
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="folder of a job, or of a pipeline")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the folder")
    arguments = parser.parse_args(argv)
    try:
        data = load(arguments.run_directory)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    output = arguments.output or arguments.run_directory / "report.html"
    partial = output.with_name(output.name + ".partial")
    partial.write_text(render(data), encoding="utf-8")
    partial.replace(output)
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
