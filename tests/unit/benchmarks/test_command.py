"""The command, with benchmarks that take no time."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import __main__ as command
from benchmarks import registry
from benchmarks.context import Benchmark, Context, Measured
from benchmarks.figures import Target

Run = Callable[[Context], Measured]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts benchmarks of these functions in place of the real ones; each measures the figure `<name>_figure`."""

    def install_all(**runs: Run) -> None:
        benchmarks = []
        for name, run in runs.items():
            module = types.ModuleType(f"fake_benchmark_{name}")
            module.run = run  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            targets = {f"{name}_figure": Target(what=name, at_least=1.0)}
            benchmarks.append(Benchmark(name=name, module=module.__name__, targets=targets))
        monkeypatch.setattr(registry, "BENCHMARKS", tuple(benchmarks))

    return install_all


def measures(name: str, value: float) -> Run:
    return lambda context: Measured(figures={f"{name}_figure": value}, detail={"quick run": context.quick})


def fails(context: Context) -> Measured:
    raise RuntimeError("out of order")


def test_prints_a_row_and_writes_file_and_table(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(one=measures("one", 1.25), two=measures("two", 0.5))
    assert command.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "one_figure: 1.25\ntwo_figure: 0.5\n"
    (file,) = tmp_path.glob("*-one.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {"name", "date", "machine", "figures"} <= set(content)
    assert content["figures"] == {"one_figure": 1.25}
    assert content["detail"] == {"quick run": False}
    assert file.name == f"{content['date']}-one.json"
    assert "| `two_figure` | two | ≥ 1 | 0.5 | **no** |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_runs_only_what_is_named(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(one=fails, two=measures("two", 2.0))
    assert command.main(["two", "--quick", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "two_figure: 2\n"


def test_a_failure_neither_stops_the_others_nor_becomes_a_figure(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(one=fails, two=measures("two", 2.0))
    assert command.main(["--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "two_figure: 2\n"
    assert "out of order" in printed.err
    assert [path.name.split("-")[-1] for path in tmp_path.glob("*.json")] == ["two.json"]


def test_a_benchmark_that_owes_a_figure_has_failed(install: Callable[..., None], tmp_path: Path) -> None:
    install(one=lambda _: Measured(figures={}))
    assert command.main(["--output", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused_with_the_known_ones(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(one=fails)
    assert command.main(["three", "--output", str(tmp_path)]) == 2
    assert "'three'" in (printed := capsys.readouterr().err)
    assert "one" in printed


def test_working_folders_are_kept_only_when_asked_for(install: Callable[..., None], tmp_path: Path) -> None:
    seen: list[Path] = []

    def run(context: Context) -> Measured:
        seen.append(context.directory)
        (context.directory / "model").touch()
        return Measured(figures={"one_figure": 1.0})

    install(one=run)
    command.main(["--output", str(tmp_path / "results")])
    command.main(["--output", str(tmp_path / "results"), "--keep", str(tmp_path / "kept")])
    assert [path.exists() for path in seen] == [False, True]
    assert seen[1].parent == tmp_path / "kept"


def test_every_listed_benchmark_is_there() -> None:
    for benchmark in registry.BENCHMARKS:
        path = Path(command.__file__).parent / f"{benchmark.module.rpartition('.')[2]}.py"
        assert path.is_file(), f"{benchmark.name} names {benchmark.module}"
        assert benchmark.targets
