"""
Processes of `vllm serve`: start, log, health and end.

A server leads a session of its own, so that Ctrl-C in a terminal does not reach it while answers are in flight. All
processes of vLLM belong to this session and end with it. While the server runs, a file next to its log names the
process and the process that has started it. If the latter was killed, the next one finds the server by this file. The
file exists before vLLM does: until then, the process waits for a line on its standard input.
"""

import json
import logging
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import psutil

from ..data.files import write_atomically
from .protocol import GenerationError
from .vllm_log import error_in, last_line

GRACE = 20.0  # seconds for a server to end after SIGTERM
_CLOCK = 2.0  # seconds by which two readings of the start time of a process may differ
_PORTS = range(20000, 32768)  # below the ports that Linux uses for outgoing connections
_WAIT_FOR_LINE = 'read -r line && exec "$@" < /dev/null'  # ends without a line if the process that starts it is killed

logger = logging.getLogger(__name__)


class VLLMServer:
    """
    A running `vllm serve`.

    Args:
        command (`Sequence[str]`):
            Command line that starts with `vllm`.
        gpus (`Sequence[str]`):
            GPUs that the server may use. Without any, the environment decides.
        port (`int`):
            Port in the command line.
        folder (`Path`):
            Folder for the log and the file that names the process.
    """

    def __init__(self, command: Sequence[str], gpus: Sequence[str], port: int, folder: Path) -> None:
        self.port = port
        folder.mkdir(parents=True, exist_ok=True)
        number = next(n for n in range(len(os.listdir(folder)) + 1) if not (folder / f"vllm-{n}.pid").exists())
        self.log, self._pid_file = folder / f"vllm-{number}.log", folder / f"vllm-{number}.pid"
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with self.log.open("ab") as log:
            shown = f"CUDA_VISIBLE_DEVICES={','.join(gpus)} " if gpus else ""
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shown}{shlex.join(command)}\n".encode())
            log.flush()
            self._start = log.tell()
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_FOR_LINE, "sh", find_vllm(), *command[1:]],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            self.started = psutil.Process(self.process.pid).create_time()
            owner = {"owner": os.getpid(), "owner_started": psutil.Process().create_time(), "host": platform.node()}
            record = {"server": self.process.pid, "started": self.started, **owner}
            write_atomically(self._pid_file, json.dumps(record) + "\n")
            assert self.process.stdin is not None
            with self.process.stdin as waiting:
                waiting.write(b"start\n")
        except BaseException:  # such as a full disk
            self.process.kill()
            self.process.wait()
            self._pid_file.unlink(missing_ok=True)
            raise

    @property
    def address(self) -> str:
        """Address of the OpenAI-compatible API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def is_ready(self) -> bool:
        """Return whether the server accepts requests."""
        try:
            # Without the proxies of the environment
            with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (OSError, HTTPException):
            return False

    def is_running(self) -> bool:
        """Return whether the server has not ended."""
        return _is_running(self.process.pid, self.started)

    def last_line(self) -> str:
        """Return the last line of the log."""
        return last_line(self.log, self._start)

    def failure(self) -> GenerationError:
        """Return the error for a server that has ended, with vLLM's own message."""
        status = self._status()
        ended = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            ended += ", possibly by the out-of-memory killer (see `dmesg`)"
        lines = error_in(self.log, self._start).splitlines()
        # The command line joins the lines of an error
        message = " ".join(line if line.endswith((".", "!", "?")) else f"{line}." for line in lines)
        said = f"Its last message: {message}" if message else "It wrote no message."
        return GenerationError(
            f"vLLM {ended}. {said} The log is {self.log}. Fix the cause, for example with --vllm-args, and rerun the "
            "same command to resume: completed answers are kept."
        )

    def _status(self) -> int:
        if self.process.returncode is None:
            # Not `wait`: as long as the process remains a zombie, no other one gets its id, which names the session
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self.process.returncode

    def close(self) -> None:
        """Forget the server, which has ended."""
        self.process.wait()
        self._pid_file.unlink(missing_ok=True)


def find_vllm() -> str:
    """
    Return the path of the command `vllm`.

    Raises:
        GenerationError: If it is not installed.
    """
    beside_python = os.path.dirname(sys.executable)
    found = shutil.which("vllm") or shutil.which("vllm", path=beside_python)
    if found is None:
        raise GenerationError(
            f"The inference backend 'vllm' needs the command vllm, which is neither on PATH nor in {beside_python}. "
            "Install it: pip install 'stepdpo_trl[vllm]'. If it is in another environment, add the folder of the "
            "command to PATH."
        )
    return found


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens on."""
    ports: list[int] = []
    for port in random.Random().sample(_PORTS, len(_PORTS)):
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise GenerationError(f"There are no {count} free ports from {_PORTS[0]} to {_PORTS[-1]}.")


def stop_servers(servers: Sequence[VLLMServer]) -> None:
    """
    Stop servers with all their processes, the ones that do not end in time by force.

    Args:
        servers (`Sequence[VLLMServer]`):
            The servers. They may have ended already.
    """
    _stop([(server.process.pid, server.started) for server in servers])
    for server in servers:
        server.close()


def stop_orphans(folder: Path) -> None:
    """
    Stop the servers that a killed process has left running.

    Args:
        folder (`Path`):
            Folder with the logs of the servers.
    """
    for file in sorted(folder.glob("vllm-*.pid")):
        try:
            host, owner, server = _read(file)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(
                f"Removing {file}, which is damaged ({type(error).__name__}: {error}). If an interrupted command has "
                "left a vLLM server running, stop it."
            )
            file.unlink(missing_ok=True)
            continue
        if host != platform.node():
            logger.warning(
                f"An interrupted command may have left a vLLM server running on {host} (process {server[0]}). Stop "
                "it there if it still runs."
            )
        elif _is_running(*owner):
            continue
        elif any(_members(*server)):
            logger.warning(
                f"Stopping a vLLM server (process {server[0]}) that an interrupted command has left running."
            )
            _stop([server])
        file.unlink(missing_ok=True)


def _read(file: Path) -> tuple[str, tuple[int, float], tuple[int, float]]:
    """Return host, owner and server in a file that names a process. A process is its id and start time."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    owner = int(record["owner"]), float(record["owner_started"])
    server = int(record["server"]), float(record["started"])
    if min(owner[0], server[0]) < 1:
        raise ValueError("the id of a process is not positive")
    return str(record["host"]), owner, server


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _is_running(pid: int, started: float) -> bool:
    """Return whether a process runs that started at this time. Another one may have got its id since."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _CLOCK and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _members(leader: int, started: float) -> Iterator[psutil.Process]:
    """Yield the processes in the session of a server. Without its leader, only those that are named after vLLM."""
    try:
        if abs(psutil.Process(leader).create_time() - started) >= _CLOCK:
            return  # the session has ended, and another process has got its id
        named = ""
    except psutil.NoSuchProcess:
        named = "vllm"
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != leader or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.create_time() > started - _CLOCK and named in " ".join(process.cmdline()).lower():
                yield process
        except (psutil.Error, OSError):
            continue


def _stop(sessions: Iterable[tuple[int, float]]) -> None:
    sessions = list(sessions)
    try:
        for leader, started in sessions:
            if _is_running(leader, started):
                os.kill(leader, signal.SIGTERM)
        _wait(lambda: any(_is_running(*session) for session in sessions))
    finally:  # a second Ctrl-C ends the wait
        for session in sessions:
            for process in _members(*session):
                process.kill()
        _wait(lambda: any(any(_members(*session)) for session in sessions))


def _wait(unfinished: Callable[[], bool]) -> None:
    end = time.monotonic() + GRACE
    while unfinished() and time.monotonic() < end:
        time.sleep(0.1)
