"""One run in stages gives the weights of separate runs."""

import pytest

from .sdpo import MODES, separate_runs, staged_run, trained_weights
from .training import assert_same_weights


@pytest.mark.parametrize("mode", MODES)
def test_equals_separate_runs(mode, chat_model, tmp_path):
    *_, oracle = separate_runs(chat_model, tmp_path / "separate", mode)
    staged = staged_run(chat_model, tmp_path / "staged", mode)
    staged.train()
    assert_same_weights(trained_weights(staged), trained_weights(oracle), rtol=0, atol=0)
