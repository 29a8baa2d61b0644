"""
Step-DPO of Qwen2-7B-Instruct on Math-Step-DPO-10K in two stages (qwen2_7b_step_sdpo.yaml).

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \\
        recipes/qwen2_7b_step_sdpo.py [--option value ...]

The options override the file; `--config FILE` takes another recipe's file instead.
"""

from pathlib import Path
from statistics import median

from datasets import Dataset

from stepdpo_trl.cli.train import main


def early_errors_first(dataset: Dataset) -> Dataset:
    """
    Two stages of about equal size: pairs whose error comes early in the solution, then those whose error comes late.

    The paper orders sources by how well the model tells their pairs apart, which takes a pass of that model over the
    data. How much of the solution precedes the error can be read off the row, and a later error needs a longer chain
    of steps to be got right first.
    """
    lengths = [len(steps or "") for steps in dataset[:]["initial_reason_steps"]]
    middle = median(lengths)
    return dataset.add_column("stage", [1 if length <= middle else 2 for length in lengths])


if __name__ == "__main__":
    main(config=Path(__file__).with_suffix(".yaml"), convert=early_errors_first)
