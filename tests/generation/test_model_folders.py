"""Fingerprints of model folders."""

import pytest

from stepdpo_trl.data.files import CHUNK
from stepdpo_trl.generation.model_folders import adapter_base, fingerprint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(CHUNK * 300))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "README.md").write_text("a model")
    return tmp_path


def test_the_fingerprint_follows_the_files_that_change_completions(folder):
    names = [fingerprint([str(folder), None])]
    (folder / "README.md").write_text("the same model")
    assert fingerprint([str(folder)]) == names[0]
    (folder / "chat_template.jinja").write_text("{{ message  }}")
    names.append(fingerprint([str(folder)]))
    (folder / "model.safetensors").write_bytes(b"1" * CHUNK * 300)
    names.append(fingerprint([str(folder)]))
    (folder / "chat_template.jinja").rename(folder / "chat.jinja")
    names.append(fingerprint([str(folder)]))
    assert len(set(names)) == 4


def test_hub_ids_have_no_fingerprint(folder):
    assert fingerprint(["Qwen/Qwen2-7B", None]) is None
    assert adapter_base("Qwen/Qwen2-7B") is None
    assert adapter_base(str(folder)) is None
