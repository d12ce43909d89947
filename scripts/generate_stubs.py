"""Generates client/steersman/v1 from protos/.

Run it after every change of a .proto file (`make protos`). `--check` writes nothing and fails when the committed
stubs differ from what the protos say. The generator is pinned: stubs made by newer ones refuse protobuf 6.
"""

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "client"
PACKAGE = Path("steersman/v1")
INIT = '"""Generated stubs of the contract in protos/steersman/v1. Never edited by hand."""\n'


def generate(destination: Path) -> None:
    """Writes the stubs of every proto below `destination`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    well_known_types = files("grpc_tools") / "_proto"
    arguments = [f"-I{PROTOS}", f"-I{well_known_types}"]
    arguments += [f"--{kind}_out={destination}" for kind in ("python", "pyi")]
    if protoc.main(["protoc", *arguments, *sources]) != 0:
        raise SystemExit("protoc failed")
    services = [source for source in sources if "service " in (PROTOS / source).read_text()]
    if protoc.main(["protoc", *arguments[:2], f"--grpc_python_out={destination}", *services]) != 0:
        raise SystemExit("protoc failed")
    (destination / PACKAGE / "__init__.py").write_text(INIT)


def drift(expected: Path, actual: Path) -> list[str]:
    """Names of the files that differ between two folders of stubs, or exist in one only."""
    names = {path.name for folder in (expected, actual) for path in folder.glob("*.py*") if path.is_file()}
    _, mismatch, errors = filecmp.cmpfiles(expected, actual, sorted(names), shallow=False)
    return mismatch + errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(STUBS)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = drift(Path(folder) / PACKAGE, STUBS / PACKAGE)
    if stale:
        sys.exit(f"stubs are stale, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
