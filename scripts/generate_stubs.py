"""Generates the stubs of protos/: the contract into client/, protocols of others that a service answers beside it into
services/.

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
# Folders below protos/, and the source root that their stubs go to.
PACKAGES = {Path("steersman/v1"): ROOT / "client", Path("steersman/reward/compat"): ROOT / "services"}


def generate(package: Path, destination: Path) -> None:
    """Writes the stubs of the protos of one folder below `destination`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / package).glob("*.proto"))
    well_known_types = files("grpc_tools") / "_proto"
    arguments = [f"-I{PROTOS}", f"-I{well_known_types}"]
    arguments += [f"--{kind}_out={destination}" for kind in ("python", "pyi")]
    if protoc.main(["protoc", *arguments, *sources]) != 0:
        raise SystemExit("protoc failed")
    services = [source for source in sources if "service " in (PROTOS / source).read_text()]
    if protoc.main(["protoc", *arguments[:2], f"--grpc_python_out={destination}", *services]) != 0:
        raise SystemExit("protoc failed")
    init = f'"""Generated stubs of protos/{package}. Never edited by hand."""\n'
    (destination / package / "__init__.py").write_text(init)


def drift(expected: Path, actual: Path) -> list[str]:
    """Names of the files that differ between two folders of stubs, or exist in one only."""
    names = {path.name for folder in (expected, actual) for path in folder.glob("*.py*") if path.is_file()}
    _, mismatch, errors = filecmp.cmpfiles(expected, actual, sorted(names), shallow=False)
    return mismatch + errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for package, root in PACKAGES.items():
        if not check:
            generate(package, root)
            continue
        with tempfile.TemporaryDirectory() as folder:
            generate(package, Path(folder))
            stale += drift(Path(folder) / package, root / package)
    if stale:
        sys.exit(f"stubs are stale, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
