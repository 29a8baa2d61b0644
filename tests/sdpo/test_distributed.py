"""Stages under DDP, ZeRO and FSDP2: the weights of separate runs on one process, and the same after resuming."""

import pytest
from safetensors.torch import load_file

from ..step_dpo.test_distributed import EXPECTED, launch, read_report
from ..training import assert_same_weights, logged
from .separate_runs import separate_runs, two_stages

# accelerate shards no 4-bit weights under FSDP2
CELLS = {backend: ["full", "scores", "lora", "qlora"][: 3 if backend == "fsdp2" else 4] for backend in EXPECTED}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Separate runs of DPOTrainer on one process, once for all back ends: losses, gammas and where the weights are."""
    runs = {}

    def run(model, mode):
        if mode not in runs:
            folder = tmp_path_factory.mktemp(mode)
            trainers = separate_runs(model, folder, mode, two_stages(10, 14))
            runs[mode] = [loss for trainer in trainers for loss in logged(trainer, "loss")], folder / "2"
        return runs[mode]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("backend", CELLS)
def test_two_processes_equal_separate_runs(backend, oracle, chat_model, tmp_path):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    launch("stages.py", backend, chat_model, tmp_path, *CELLS[backend])
    for mode in CELLS[backend]:
        report = read_report(tmp_path / mode, backend)
        peak, largest = report["swap"]
        assert peak <= largest
        losses, expected = oracle(chat_model, mode)
        # QLoRA trains its adapter in bfloat16, whose rounding differs with the number of processes
        tolerance = 1e-3 if mode == "qlora" else 1e-5
        assert report["loss"] == pytest.approx(losses, abs=tolerance), mode
        file = "adapter_model.safetensors" if "lora" in mode else "model.safetensors"
        trained = load_file(tmp_path / mode / file)
        if mode != "qlora":
            assert_same_weights(trained, load_file(expected / file), rtol=1e-5, atol=1e-6)
        assert_same_weights(load_file(tmp_path / mode / "resumed" / file), trained, rtol=0, atol=0)
