"""
Train SOLAR 10.7B with sDPO in two stages, OpenOrca and UltraFeedback (solar_10_7b_sdpo.yaml, arXiv 2403.19270).

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \\
        recipes/solar_10_7b_sdpo.py [--option value ...]

Command-line options override the file. Pass `--config FILE` to run another recipe. The file lists the datasets. This
script converts them to the same columns, because all stages must have the same columns.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from stepdpo_trl.cli.train import main

MESSAGES = [{"role": Value("string"), "content": Value("string")}]
COLUMNS = Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})


def orca_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of `Intel/orca_dpo_pairs`, which has plain texts and a system prompt that may be empty."""
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return {
        "prompt": [*system, {"role": "user", "content": row["question"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def ultrafeedback_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of `allenai/ultrafeedback_binarized_cleaned`, whose conversations differ in the last message."""
    return {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}


def convert(dataset: Dataset) -> Dataset:
    """Convert either dataset to conversational preference pairs."""
    pair = orca_pair if "question" in dataset.column_names else ultrafeedback_pair
    return dataset.map(pair, remove_columns=dataset.column_names, features=COLUMNS)


if __name__ == "__main__":
    main(config=Path(__file__).with_suffix(".yaml"), convert=convert)
