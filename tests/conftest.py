import gc
import os

import pytest
import torch
from hypothesis import settings

from .tiny import CHATML, byte_level_tokenizer, save_tiny_model

# Tiny matrices: a second thread costs more than it computes. Subprocesses take it from the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars are not what a failed test is read for
torch.set_num_threads(1)

# The same examples each time where a failure would block others; new ones elsewhere
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # each training run calls gc.collect(), a third of its time if it scans the imported modules too


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Path of a tiny model whose tokenizer has a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("chat-model"), byte_level_tokenizer(CHATML))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    """Path of a tiny model whose tokenizer has none."""
    return save_tiny_model(tmp_path_factory.mktemp("plain-model"), byte_level_tokenizer())
