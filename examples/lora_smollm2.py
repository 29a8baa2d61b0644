"""
Train a small model with Step-DPO and LoRA on one GPU, or more slowly on a CPU.

    python examples/lora_smollm2.py

This trains HuggingFaceTB/SmolLM2-135M-Instruct on xinlai/Math-Step-DPO-10K. To use local files instead, pass a folder
with a GGUF file (`--gguf_file`, needs the extra `gguf`) and a file with step pairs:

    python examples/lora_smollm2.py --model_name_or_path FOLDER --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf \
        --dataset pairs.jsonl
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from stepdpo_trl import StepDPOConfig, StepDPOTrainer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIRS = "xinlai/Math-Step-DPO-10K"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=MODEL, help="model id or folder (default: %(default)s)")
    parser.add_argument("--gguf_file", help="name of the GGUF file in the model folder")
    parser.add_argument(
        "--dataset", default=PAIRS, help="dataset id, or a .jsonl or .parquet file (default: %(default)s)"
    )
    parser.add_argument(
        "--test_size", type=int, default=13, help="number of pairs held out for evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir", default="outputs/smollm2-step-dpo", help="folder for the adapter (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.4, help="beta of the DPO loss (default: %(default)s)")
    parser.add_argument("--num_train_epochs", type=float, default=1, help="number of epochs (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=-1, help="number of optimizer steps; overrides the epochs")
    return parser.parse_args()


def load_model(name: str, gguf_file: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from the Hub or a folder. GGUF weights are dequantized for training."""
    options = {}
    if gguf_file:
        options = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **options)
    return model, AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)


def load_pairs(dataset: str) -> Dataset:
    """Load step pairs from the Hub or a file."""
    if Path(dataset).is_file():
        kind = "parquet" if dataset.endswith(".parquet") else "json"
        return load_dataset(kind, data_files=dataset, split="train")
    return load_dataset(dataset, split="train")


def main() -> None:
    """Train the adapter, evaluate it on held-out pairs before and after, and save it."""
    args = parse_args()
    model, tokenizer = load_model(args.model_name_or_path, args.gguf_file)
    pairs = load_pairs(args.dataset).train_test_split(test_size=args.test_size, seed=0)
    trainer = StepDPOTrainer(
        model,
        args=StepDPOConfig(
            args.output_dir,
            prompt_suffix="step-dpo",
            beta=args.beta,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            precompute_ref_log_probs=True,
            activation_checkpointing=False,  # a model of this size does not need it
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        print(f"held-out {key:20} {before[f'eval_{key}']:9.4f} -> {after[f'eval_{key}']:9.4f}")
    print(f"The adapter was saved to {args.output_dir!r}.")


if __name__ == "__main__":
    main()
