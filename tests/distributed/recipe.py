"""Run a recipe on CPU under a distributed launcher and report what ran. Started by the tests."""

import json
import runpy
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from stepdpo_trl import StepDPOTrainer
from tests.distributed.train import leave, prepare_cpu
from tests.training import logged


def optimized_types(trainer) -> set[str]:
    """Return the dtypes of the tensors that the optimizer updates on this process."""
    if trainer.is_deepspeed_enabled:
        return {str(group.dtype) for group in trainer.model_wrapped.optimizer.fp32_partitioned_groups_flat}
    return {str(parameter.dtype) for group in trainer.optimizer.param_groups for parameter in group["params"]}


class ReportingTrainer(StepDPOTrainer):
    """Writes `report.json` after training."""

    def compute_loss(self, model, *args, **kwargs):
        with model.register_forward_hook(self.see_type):
            return super().compute_loss(model, *args, **kwargs)

    def see_type(self, module, inputs, output):
        """Record the dtype of the model's log-probabilities. Models of older TRL versions return logits."""
        self.type_seen = str(output.log_probs.dtype) if hasattr(output, "log_probs") else None

    def train(self, *args, **kwargs):
        super().train(*args, **kwargs)
        report = {
            "distributed_type": self.accelerator.distributed_type.value,
            "processes": self.accelerator.num_processes,
            "epochs": self.state.epoch,
            "precomputed": self.ref_model is None and "ref_chosen_logps" in self.train_dataset.column_names,
            "optimized_types": sorted(optimized_types(self)),
            "type_of_log_probs": self.type_seen,
            "loss": logged(self, "loss"),
        }
        if self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(exist_ok=True)
            (Path(self.args.output_dir) / "report.json").write_text(json.dumps(report))


def main() -> None:
    """Run `recipe.py STRATEGY RECIPE [--option VALUE ...]`."""
    strategy, recipe, *arguments = sys.argv[1:]
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    for name, value in prepare_cpu(strategy).items():
        arguments += [f"--{name}", str(value)]
    # The training script imports the trainer from here
    sys.modules["stepdpo_trl.step_dpo.trainer"].StepDPOTrainer = ReportingTrainer
    sys.argv = [recipe, *arguments]
    runpy.run_path(recipe, run_name="__main__")
    leave()


if __name__ == "__main__":
    main()
