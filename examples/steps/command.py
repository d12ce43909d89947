"""The command line of the pipeline: arguments, the run folder, interruption, the report."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from examples.steps.config import ConfigError, load_config
from examples.steps.console import Console
from examples.steps.pipeline import Pipeline
from examples.steps.stack import JobFailed, Stack
from steersman.cli.supervisor import StartError
from steersman.client import SteersmanError

ROOT = Path(__file__).resolve().parents[2]


def new_directory(wanted: Path) -> Path:
    """The folder, or its name with a number if it exists: a run never overwrites another."""
    number = 1
    directory = wanted
    while True:
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
            directory = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return directory


def write_report(directory: Path) -> Path:
    """Makes report.html of the folder."""
    report = directory / "report.html"
    command = [sys.executable, "-m", "steersman.trainer.report", str(directory), "-o", str(report)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a pipeline; returns the exit status."""
    parser = argparse.ArgumentParser(description="Align a small model from scratch, and report.")
    parser.add_argument("config", type=Path, help="file of the pipeline, such as examples/demo.yaml")
    parser.add_argument("--data", type=Path, help="file of comparisons, where the pipeline takes one")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/NAME, or a numbered one beside it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.set, data=arguments.data)
    except ConfigError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _interrupt)
    directory = new_directory((arguments.output or ROOT / "runs" / config.name).resolve())
    console = Console()
    console.say(f"{config.title}; everything goes to {directory}")
    try:
        with Stack(console, directory / "logs") as stack:
            try:
                Pipeline(config, directory, console, stack).run()
            except (JobFailed, SteersmanError):
                for line in stack.ended():
                    console.say(line)
                raise
    except KeyboardInterrupt:
        console.say("interrupted; services and jobs are stopped")
        return 130
    except (StartError, JobFailed, SteersmanError, ValueError) as error:
        console.say(f"failed: {error}")
        return 1
    report = write_report(directory)
    console.say(f"done; the report is {report}")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
