import gc
import os
import signal

import pytest
import torch
from hypothesis import settings

from .fake_vllm import install, left_processes
from .tiny import CHATML, byte_level_tokenizer, save_tiny_model

# The matrices are so small that one thread is fastest. Subprocesses inherit the environment variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars clutter the output of failed tests
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and so would the commands under test
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Use fixed examples in CI, where a random failure would block unrelated changes
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    # Each training run calls gc.collect(), which takes a third of its time if it scans the imported modules
    gc.freeze()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Path of a tiny model whose tokenizer has a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("chat-model"), byte_level_tokenizer(CHATML))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    """Path of a tiny model whose tokenizer has no chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("plain-model"), byte_level_tokenizer())


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Folder with the records of a fake `vllm`, which is on PATH. No process may be left after the test."""
    monkeypatch.setenv("PATH", str(install(tmp_path)), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_VLLM_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield tmp_path
    left = left_processes(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not list(tmp_path.rglob("*.pid"))
