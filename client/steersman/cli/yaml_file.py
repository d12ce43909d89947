"""YAML as people write it, from the files that commands are given."""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from steersman.cli.console import InputError


class _Loader(yaml.SafeLoader):
    """1e-5 and 1.5e3 are numbers, which YAML 1.1 takes for text."""


_EXPONENT: Final = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # noqa: S506  (it is a SafeLoader)


def read(path: Path) -> Any:
    """The value of a file. InputError, in one line, for what cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InputError(f"{path}{place}: is not valid YAML: {problem}") from None
