"""
Train Qwen2-7B-Instruct with Step-DPO on Math-Step-DPO-10K, using the paper's settings (qwen2_7b.yaml).

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml recipes/qwen2_7b.py [--option value ...]

Command-line options override the file. Pass `--config FILE` to run another recipe.
"""

from pathlib import Path

from stepdpo_trl.cli.train import main

if __name__ == "__main__":
    main(config=Path(__file__).with_suffix(".yaml"))
