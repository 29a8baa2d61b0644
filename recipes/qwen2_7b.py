"""
Step-DPO of Qwen2-7B-Instruct on Math-Step-DPO-10K with the paper's settings (qwen2_7b.yaml).

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml recipes/qwen2_7b.py [--option value ...]

The options override the file; `--config FILE` takes another recipe's file instead.
"""

from pathlib import Path

from stepdpo_trl.cli.train import main

if __name__ == "__main__":
    main(config=Path(__file__).with_suffix(".yaml"))
