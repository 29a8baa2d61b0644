"""sDPO on two processes under DDP, ZeRO and FSDP2, compared with separate runs on one process."""

import pytest
from safetensors.torch import load_file

from ..distributed.stages import ROWS
from ..step_dpo.test_distributed import EXPECTED, launch_strategy, read_report
from ..training import assert_same_weights, logged
from .separate_runs import separate_runs, two_stages

# accelerate does not shard 4-bit weights under FSDP2
CELLS = {strategy: ["full", "scores", "lora", "qlora"][: 3 if strategy == "fsdp2" else 4] for strategy in EXPECTED}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Separate runs of DPOTrainer on one process, shared by all strategies: their losses and the final folder."""
    runs = {}

    def run(model, mode):
        if mode not in runs:
            folder = tmp_path_factory.mktemp(mode)
            trainers = separate_runs(model, folder, mode, two_stages(*ROWS))
            runs[mode] = [loss for trainer in trainers for loss in logged(trainer, "loss")], folder / "2"
        return runs[mode]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", CELLS)
def test_two_processes_equal_separate_runs(strategy, oracle, chat_model, tmp_path):
    launch_strategy("stages.py", strategy, chat_model, tmp_path, *CELLS[strategy])
    for mode in CELLS[strategy]:
        report = read_report(tmp_path / mode, strategy)
        peak, largest = report["swap"]
        assert peak <= largest
        losses, expected = oracle(chat_model, mode)
        # QLoRA trains its adapter in bfloat16, whose rounding depends on the number of processes
        tolerance = 1e-3 if mode == "qlora" else 1e-5
        assert report["loss"] == pytest.approx(losses, abs=tolerance), mode
        file = "adapter_model.safetensors" if "lora" in mode else "model.safetensors"
        trained = load_file(tmp_path / mode / file)
        if mode != "qlora":
            assert_same_weights(trained, load_file(expected / file), rtol=1e-5, atol=1e-6)
        assert_same_weights(load_file(tmp_path / mode / "resumed" / file), trained, rtol=0, atol=0)
