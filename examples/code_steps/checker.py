"""
Checker of Python functions: runs their unit tests in a separate process with limits.

The environment variable ALLOW_CODE_EXECUTION=1, which `execute.py --allow-code-execution` sets, is required. README.md
says what the limits do not protect against.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

TIME_LIMIT = 4.0  # seconds
MEMORY_LIMIT = 512 * 2**20  # bytes
_BLOCK = re.compile(r"^```(?i:python[\d.]*|py3?)?[ \t]*\n(.*?)(?:^```|\Z)", re.S | re.M)

if os.environ.get("ALLOW_CODE_EXECUTION") != "1":
    raise RuntimeError(
        "this checker runs code that a model has written; read examples/code_steps/README.md, then use "
        "`python examples/code_steps/execute.py --allow-code-execution`"
    )

# Reads code, tests and a token from stdin, and prints the token after the last test. Code that exits early, or prints
# something itself, does not know the token
_RUNNER = """
import ctypes, json, os, resource, sys

given = json.loads(sys.stdin.read())
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.platform == "linux":  # a network namespace of its own, without any interface
    NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
    ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)
REFUSED = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "winreg.", "signal.pthread_kill")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


def refuse(event, arguments):
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes or (event.startswith(REFUSED) and event not in HARMLESS):
        raise PermissionError(f"{event} is not allowed")


output, sys.stdout = sys.stdout, None
sys.addaudithook(refuse)
space = {"__name__": "solution"}
exec(given["code"], space)
for test in given["tests"]:
    exec(test, space)
output.write(given["token"])
output.flush()
os._exit(0)
"""


def passes(problem: Mapping[str, Any], solution: str) -> bool | None:
    """
    Run the unit tests of a problem.

    Args:
        problem (`Mapping[str, Any]`):
            Row with `function`, the name of the function to define, and `tests`, a list of statements.
        solution (`str`):
            Text with the function in a code block.

    Returns:
        `bool` or `None`: Whether all tests pass. `None` without a code block that defines the function.
    """
    code = find_code(solution, problem["function"])
    return None if code is None else run_tests(code, problem["tests"])


def find_code(solution: str, function: str) -> str | None:
    """Return the first code block that defines a function."""
    blocks = [block[1] for block in _BLOCK.finditer(solution)]
    return next((block for block in blocks if re.search(rf"^def {function}\b", block, re.M)), None)


def run_tests(code: str, tests: list[str]) -> bool:
    """Return whether code passes tests within the limits."""
    token = secrets.token_hex(16)
    limits = {"seconds": int(TIME_LIMIT), "memory": MEMORY_LIMIT}
    given = json.dumps({"code": code, "tests": tests, "token": token, **limits})
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _RUNNER],
                input=given.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=TIME_LIMIT,
                cwd=folder,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout.decode(errors="replace") == token
