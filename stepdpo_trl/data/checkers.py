"""Checkers of solutions: by name, or functions of the user. Standard library only."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .messages import did_you_mean, similar_file

ANSWER_CHECKERS = ("math", "exact", "choice")  # compare the final answer with the column `answer`
FORMS = f"{', '.join(ANSWER_CHECKERS)}, FILE.py:FUNCTION or package.module:FUNCTION"

CheckFunction = Callable[[Mapping[str, Any], str], bool | None]


class CheckerError(ValueError):
    """Raised when a checker does not exist or does not do what a checker has to do."""


@dataclass(frozen=True)
class Checker:
    """
    How solutions are checked.

    Args:
        name (`str`):
            `"math"`, `"exact"`, `"choice"`, or file name or module and function, such as `"tests.py:passes"`.
        source (`str`, *optional*, defaults to `""`):
            Absolute path of the file, or the module. Empty for the checkers of this package.
        digest (`str`, *optional*, defaults to `""`):
            Hash of the source code.
    """

    name: str
    source: str = ""
    digest: str = ""

    @property
    def custom(self) -> bool:
        """Whether this is a function of the user, which receives whole rows and needs no `answer`."""
        return bool(self.source)

    @property
    def spelling(self) -> str:
        """The value of `--checker` that leads here from any folder."""
        return f"{self.source}:{self.name.rpartition(':')[2]}" if self.custom else self.name


MATH = Checker("math")


def resolve_checker(text: str) -> Checker:
    """
    Find a checker, and import it if it is a function of the user.

    Args:
        text (`str`):
            `"math"`, `"exact"`, `"choice"`, `"FILE.py:FUNCTION"` or `"package.module:FUNCTION"`.

    Returns:
        [`Checker`]: The checker.

    Raises:
        CheckerError: If there is no such checker, or the function cannot be used.
    """
    if text in ANSWER_CHECKERS:
        return Checker(text)
    source, colon, function = text.rpartition(":")
    if not colon and text.endswith(".py"):
        raise CheckerError(f"--checker {text!r} lacks the name of the function. Pass {text}:FUNCTION.")
    if not colon:
        nearest = get_close_matches(text.lower(), ANSWER_CHECKERS, n=1, cutoff=0)[0]
        raise CheckerError(f"--checker {text!r} is not known. Did you mean {nearest!r}? Use {FORMS}.")
    if not source or not function.isidentifier():
        raise CheckerError(f"--checker {text!r} is not of the form FILE.py:FUNCTION or package.module:FUNCTION.")
    if source.endswith(".py"):
        path = Path(source).absolute()
        if not path.is_file():
            raise CheckerError(f"--checker {text!r}: there is no file {source}.{similar_file(Path(source), '*.py')}")
        checker = Checker(f"{path.name}:{function}", str(path), _digest(path))
    else:
        checker = Checker(text, source)
    load_function(checker)
    file = getattr(sys.modules.get(source), "__file__", None)
    return checker if checker.digest or file is None else Checker(text, source, _digest(Path(file)))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@lru_cache
def load_function(checker: Checker) -> CheckFunction:
    """
    Import the function of a checker.

    Args:
        checker ([`Checker`]):
            A checker with a `source`.

    Returns:
        `Callable[[dict, str], bool | None]`: The function.

    Raises:
        CheckerError: If it cannot be imported, or takes other arguments.
    """
    name = checker.name.rpartition(":")[2]
    try:
        module = _import(checker.source)
    except (Exception, SystemExit) as error:
        raise CheckerError(
            f"--checker {checker.name!r}: {checker.source} cannot be imported "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())}). Fix it."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        hint = did_you_mean(name, [n for n, value in vars(module).items() if callable(value)])
        raise CheckerError(f"--checker {checker.name!r}: {checker.source} has no function {name!r}.{hint}")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise CheckerError(
            f"--checker {checker.name!r}: {name}{inspect.signature(function)} cannot be called with a problem and a "
            f"solution ({error}). Define it as {name}(problem: dict, solution: str) -> bool | None."
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    return function


def _import(source: str) -> ModuleType:
    if not source.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as for `python -m`
        return importlib.import_module(source)
    path = Path(source)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for modules beside it
    name = f"checker_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
