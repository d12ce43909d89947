#!/usr/bin/env python3
"""Builds the images: `scripts/build_images.py [NAME ...] [-- OPTIONS OF THE BUILDER]`.

Without names all that run on CPU, and the command; `policy-gpu`, which is large, is built when it is named. They get
the version of pyproject.toml as tag, and the commit as a label. Needs docker, podman or buildah, and nothing else.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ("client", "policy-cpu", "reference", "reward", "trainer")
BUILDERS = {
    "docker": ["docker", "build"],
    "podman": ["podman", "build", "--layers"],
    "buildah": ["buildah", "build", "--layers"],
}


def main(argv: list[str]) -> int:
    """Builds one after the other; the first that fails ends it."""
    known = sorted(path.name.removesuffix(".Dockerfile") for path in (ROOT / "docker").glob("*.Dockerfile"))
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser(known).parse_args(argv[:end])
    if options.builder is None:
        print(f"none of {', '.join(BUILDERS)} is installed", file=sys.stderr)
        return 1
    given: list[str] = []
    for argument, value in (("BASE_IMAGE", options.base_image), ("TORCH_INDEX_URL", options.torch_index_url)):
        given += [f"--build-arg={argument}={value}"] if value else []
    for secret, file in (("pip", options.pip_config), ("ca", options.ca)):
        given += [f"--secret=id={secret},src={file.resolve()}"] if file else []
    for name in options.names or DEFAULT:
        image = f"{options.prefix}/{name}:{options.tag}"
        print(f"== {image}", flush=True)
        command = [
            *BUILDERS[options.builder],
            f"--file=docker/{name}.Dockerfile",
            f"--tag={image}",
            f"--build-arg=VERSION={version()}",
            f"--build-arg=REVISION={revision()}",
            *given,
            *argv[end + 1 :],
            ".",
        ]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            print(f"building {image} failed with exit status {status}", file=sys.stderr)
            return 1
    return 0


def parser(known: list[str]) -> argparse.ArgumentParser:
    """Of the options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("names", nargs="*", metavar="NAME", choices=[*known, []], help=", ".join(known))
    found.add_argument(
        "--builder",
        choices=BUILDERS,
        default=next((one for one in BUILDERS if shutil.which(one)), None),
        help="default: the first of these that is installed",
    )
    found.add_argument("--prefix", default="steersman", help="of the images' names, such as a registry's (%(default)s)")
    found.add_argument("--tag", default=version(), help="of the images (%(default)s)")
    found.add_argument("--base-image", help="instead of debian:bookworm-slim; one with apt and Python 3.11 or later")
    found.add_argument(
        "--torch-index-url",
        default=os.environ.get("TORCH_INDEX_URL"),
        help="index of CPU builds of torch, where the default index serves CUDA builds (TORCH_INDEX_URL)",
    )
    found.add_argument("--pip-config", type=Path, help="pip's configuration while building; stays out of the images")
    found.add_argument("--ca", type=Path, help="certificate authorities for it (`cert = /run/secrets/ca`)")
    return found


def version() -> str:
    """Of pyproject.toml."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def revision() -> str:
    """The commit, with `-dirty` where files differ from it; `unknown` outside a repository, or without git."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
