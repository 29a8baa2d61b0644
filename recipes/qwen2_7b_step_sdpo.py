"""
Train Qwen2-7B-Instruct with Step-DPO on Math-Step-DPO-10K in two sDPO stages (qwen2_7b_step_sdpo.yaml).

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \\
        recipes/qwen2_7b_step_sdpo.py [--option value ...]

Command-line options override the file. Pass `--config FILE` to run another recipe.
"""

from pathlib import Path
from statistics import median

from datasets import Dataset

from stepdpo_trl.cli.train import main


def early_errors_first(dataset: Dataset) -> Dataset:
    """
    Split the pairs into two stages of about equal size: early errors first, late errors second.

    The paper orders data sources by the reward accuracy of the initial model, which requires a forward pass over the
    data. The length of the prefix needs no model, and a late error requires a longer chain of correct steps before it.

    Args:
        dataset (`Dataset`):
            The step pairs.

    Returns:
        `Dataset`: The step pairs with an additional `stage` column, 1 or 2.
    """
    lengths = [len(steps or "") for steps in dataset[:]["initial_reason_steps"]]
    middle = median(lengths)
    return dataset.add_column("stage", [1 if length <= middle else 2 for length in lengths])


if __name__ == "__main__":
    main(config=Path(__file__).with_suffix(".yaml"), convert=early_errors_first)
