"""
Run scripts in forks of one warm process, which imports torch, TRL and DeepSpeed once per test session.

Tests call `run_script` and `launch`. Run as a script, this file is the warm process.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}


@cache
def _server() -> subprocess.Popen[str]:
    """Start the warm process. It ends when pytest does, since its standard input is closed then."""
    command = [sys.executable, str(Path(__file__))]
    return subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_script(
    script: str | Path, *arguments: object, accelerate: list[str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """
    Run a script as `__main__` in a fork of the warm process.

    Args:
        script (`str` or `Path`):
            Path of the script.
        *arguments (`object`):
            Its command line.
        accelerate (`list[str]`, *optional*):
            Options of `accelerate launch`. If set, accelerate launches the script in its processes.
        timeout (`float`, *optional*, defaults to `300`):
            Seconds after which the script and all its processes are killed.

    Returns:
        `subprocess.CompletedProcess`: Return code and output, as from `subprocess.run`.
    """
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        request = {"argv": argv, "accelerate": accelerate, "timeout": timeout, "folder": folder}
        request |= {"environment": _environment(), "cwd": os.getcwd()}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        if not reply:
            raise RuntimeError(f"{Path(__file__).name} exited with code {server.wait()}. Its errors are above.")
        returncode = int(reply)
        output, errors = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    if returncode == -signal.SIGKILL:
        errors += f"\n{script} was killed. Its timeout is {timeout} seconds."
    return subprocess.CompletedProcess(argv, returncode, output, errors)


def launch(config: Path, script: Path, *arguments: object, options: tuple[str, ...] = ()) -> None:
    """Run a script in the processes of an accelerate configuration and check that all of them succeed."""
    done = run_script(script, *arguments, accelerate=["--config_file", str(config), *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _fork(work: Callable[[], object]) -> int:
    """Call `work` in a child process and return its id. Skips interpreter teardown, in which Gloo may abort."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_as_main(argv: list[str]) -> None:
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)  # as the interpreter does
    runpy.run_path(argv[0], run_name="__main__")


def _fork_workers(args) -> None:
    """Replace `torch.distributed.run.run`: fork the workers of one machine, with its environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = int(args.nproc_per_node)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count)
    )

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        _run_as_main([args.training_script, *args.training_script_args])

    workers = {_fork(lambda rank=rank: work(rank)) for rank in range(count)}
    while workers:
        pid, status = os.wait()
        workers.discard(pid)
        if os.waitstatus_to_exitcode(status):
            for worker in workers:  # they would wait for the failed one
                os.kill(worker, signal.SIGKILL)
            raise SystemExit(1)


def _run_one(args) -> None:
    """Replace `simple_launcher`: run the script in this process, with its environment variables."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    os.environ.update(prepare_simple_launcher_cmd_env(args)[1])
    _run_as_main([args.training_script, *args.training_script_args])


def _serve_one(request: dict) -> None:
    """Serve a request in this process, a fork of the warm one."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if request["accelerate"] is None:
        _run_as_main(request["argv"])
        return
    import torch.distributed.run
    from accelerate.commands import launch

    torch.distributed.run.run = _fork_workers
    launch.simple_launcher = _run_one
    os.chdir(FOLDER)  # accelerate configurations refer to their DeepSpeed files by name
    args = launch.launch_command_parser().parse_args([*request["accelerate"], *request["argv"]])
    launch.launch_command(args)


def _wait(pid: int, timeout: float) -> int:
    """Return the exit code of a child. Kill its process group after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> None:
    """Import the libraries, then serve requests until standard input is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import importlib.util

    import datasets  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("deepspeed"):
        import deepspeed  # noqa: F401

    import tests.distributed.stages  # noqa: F401
    from stepdpo_trl.quickstart import MODEL_PATH

    (
        AutoTokenizer.from_pretrained(MODEL_PATH),
        AutoModelForCausalLM.from_pretrained(MODEL_PATH),
    )  # fills transformers' caches

    gc.collect()
    gc.freeze()  # keeps the imported modules out of the forks' garbage collections
    for line in sys.stdin:
        request = json.loads(line)
        pid = _fork(lambda request=request: _serve_one(request))
        print(_wait(pid, request["timeout"]), file=replies, flush=True)


if __name__ == "__main__":
    main()
