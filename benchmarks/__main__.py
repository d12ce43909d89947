"""python -m benchmarks [NAMES...] [--quick] [--output DIR] [--keep DIR]"""

import argparse
import datetime
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.context import Benchmark, Context, Measured
from benchmarks.machine import describe_machine, load_average
from benchmarks.registry import BENCHMARKS, select
from benchmarks.results import Result, write_result, write_table

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs") / "benchmarks-quick"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns how many of them failed (a missed target is not a failure)."""
    options = _parse(argv)
    try:
        chosen = select(options.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    failures = 0
    for benchmark in chosen:
        with _directory(options.keep, benchmark.name) as directory:
            try:
                _run(benchmark, Context(quick=options.quick, directory=directory), output)
            except Exception:
                traceback.print_exc()
                print(f"{benchmark.name}: failed", file=sys.stderr)
                failures += 1
    return failures


def _run(benchmark: Benchmark, context: Context, output: Path) -> None:
    load, started = load_average(), time.monotonic()
    measured: Measured = importlib.import_module(benchmark.module).run(context)
    for name in benchmark.targets:
        print(f"{name}: {measured.figures[name]:.6g}", flush=True)
    result = Result(
        name=benchmark.name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        figures=measured.figures,
        targets=benchmark.targets,
        detail={
            "quick": context.quick,
            "seconds": round(time.monotonic() - started, 1),
            "load_average_before": load,
            "detail": dict(measured.detail),
        },
    )
    write_result(output, result)
    write_table(output)


@contextmanager
def _directory(keep: Path | None, name: str) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"steersman-benchmark-{name}-") as directory:
            yield Path(directory)
        return
    kept = (keep / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    kept.mkdir(parents=True)
    yield kept


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures what Steersman must reach.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(each.name for each in BENCHMARKS))
    parser.add_argument(
        "--quick", action="store_true", help="shortest run through every part; the numbers mean nothing"
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder for JSON and table (default benchmarks/results; {QUICK_RESULTS} if quick)"
    )
    parser.add_argument("--keep", type=Path, help="keep models, logs and run folders here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
