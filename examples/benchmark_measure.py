"""Measurements for `benchmark_throughput.py`: throughput, computed tokens, memory and profiles of a trainer."""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback

CUDA = torch.cuda.is_available()
# Dense matrix products in bfloat16
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def synchronize() -> None:
    """Wait until the device has finished."""
    if CUDA:
        torch.cuda.synchronize()


def count_unique(batch: Sequence[dict[str, Any]]) -> int:
    """Count the tokens of a batch, with shared prefixes counted once. These are the nodes of its trie."""
    root: dict[int, Any] = {}
    nodes = 0
    for pair in batch:
        for name in ("chosen_ids", "rejected_ids"):
            node = root
            for token in [*pair["prompt_ids"], *pair[name]]:
                if token not in node:
                    node[token] = {}
                    nodes += 1
                node = node[token]
    return nodes


class Recorder:
    """Collator wrapper that records the pairs of each batch and the collation time."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[list[dict[str, Any]]] = []
        self.seconds: list[float] = []

    def __call__(self, pairs: list[dict[str, Any]]) -> Any:
        """Collate a batch."""
        start = time.perf_counter()
        batch = self.collator(pairs)
        self.seconds.append(time.perf_counter() - start)
        self.batches.append(pairs)
        return batch


class Stopwatch(TrainerCallback):
    """Callback that times the steps after the first one and stops training after `steps` timed steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.positions = 0
        self.start = self.seconds = 0.0
        self.memory_before = self.memory_peak = 0

    def count_positions(self, module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """Count the embedded positions of the policy, as a forward hook of its embeddings."""
        if torch.is_grad_enabled():
            self.positions += inputs[0].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock after the first step, and stop training after the last timed step."""
        if state.global_step not in (1, 1 + self.steps):
            return
        synchronize()
        if state.global_step == 1:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
                self.memory_before = torch.cuda.memory_allocated()
            self.positions = 0
            self.start = time.perf_counter()
            return
        self.seconds = time.perf_counter() - self.start
        self.memory_peak = torch.cuda.max_memory_allocated() if CUDA else 0
        control.should_training_stop = True


@dataclass(frozen=True)
class Turn:
    """
    Measurements of one turn.

    Args:
        pairs_per_second (`float`):
            Number of pairs trained on per second.
        positions (`int`):
            Number of positions in the forward passes of the policy.
        unique_tokens (`int`):
            Number of nodes in the tries of the batches.
        positions_per_unique (`float`):
            `positions` divided by `unique_tokens`.
        collator_share (`float`):
            Share of the time spent in the collator.
        peak_memory_gib (`float`, *optional*):
            Peak memory in GiB above weights and optimizer state. `None` on CPU.
        utilization (`float`, *optional*):
            Model FLOPs per second divided by the peak FLOPs of the device. `None` if the peak is unknown.
    """

    pairs_per_second: float
    positions: int
    unique_tokens: int
    positions_per_unique: float
    collator_share: float
    peak_memory_gib: float | None
    utilization: float | None


class Side:
    """
    One of the two trainers with its measurements.

    Args:
        trainer (`~trl.DPOTrainer`):
            The trainer. Its training data is replaced in every turn.
        steps (`int`):
            Number of timed steps in a turn.
        linear (`int`):
            Number of parameters that every token is multiplied by.
    """

    def __init__(self, trainer: Any, steps: int, linear: int) -> None:
        self.trainer = trainer
        self.linear = linear
        self.stopwatch = Stopwatch(steps)
        self.recorder = trainer.data_collator = Recorder(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.stopwatch)
        trainer.model.get_input_embeddings().register_forward_hook(self.stopwatch.count_positions)

    def train(self, pairs: Dataset) -> bool:
        """Train on tokenized pairs and return whether the memory was sufficient."""
        self.trainer.train_dataset = pairs
        self.recorder.batches.clear()
        self.recorder.seconds.clear()
        try:
            self.trainer.train()
            return True
        except torch.cuda.OutOfMemoryError:
            self.trainer.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return False

    def first_step(self, pairs: Dataset) -> dict[str, float] | None:
        """Train on one batch and return the logged values, or `None` if the device runs out of memory."""
        return self.trainer.state.log_history[0] if self.train(pairs) else None

    def measure(self, pairs: Dataset) -> Turn | None:
        """Train for one turn and return its measurements, or `None` if the device runs out of memory."""
        if not self.train(pairs):
            return None
        steps, seconds = self.stopwatch.steps, self.stopwatch.seconds
        batches = self.recorder.batches[1 : 1 + steps]
        unique = sum(map(count_unique, batches))
        return Turn(
            pairs_per_second=sum(map(len, batches)) / seconds,
            positions=self.stopwatch.positions,
            unique_tokens=unique,
            positions_per_unique=self.stopwatch.positions / unique,
            collator_share=self.collator_seconds() / seconds,
            peak_memory_gib=(self.stopwatch.memory_peak - self.stopwatch.memory_before) / 2**30 if CUDA else None,
            utilization=self._utilization(unique / seconds),
        )

    def collator_seconds(self) -> float:
        """Return the collation time in the timed part of the last turn. Batches are collated one step ahead."""
        return sum(self.recorder.seconds[2 : 2 + self.stopwatch.steps])

    def _utilization(self, tokens_per_second: float) -> float | None:
        args = self.trainer.args
        device = torch.cuda.get_device_name() if CUDA and args.bf16 else ""
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
        if peak is None:
            return None
        times = (4 if isinstance(self.trainer.model, PeftModel) else 6) + (0 if args.precompute_ref_log_probs else 2)
        return times * self.linear * tokens_per_second / peak


class Phases(TrainerCallback):
    """
    Callback that times the parts of a training step.

    It synchronizes the device around each part, which makes the steps slower.

    Args:
        side (`Side`):
            The trainer with its measurements. It cannot be used for other measurements afterwards.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.seconds: defaultdict[str, float] = defaultdict(float)
        trainer = side.trainer
        model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
        self._wrap(trainer, "compute_loss", "loss")
        for decoder in filter(None, (model, trainer.ref_model)):
            self._wrap(decoder.base_model, "forward", "trunk")
        self._wrap(trainer.accelerator, "backward", "backward")
        trainer.add_callback(self)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            measured = part if torch.is_grad_enabled() else "reference"  # only the reference has no gradients
            self._lap(measured, -1)
            result = function(*args, **kwargs)
            self._lap(measured, 1)
            return result

        setattr(owner, name, timed)

    def _lap(self, part: str, sign: int) -> None:
        synchronize()
        self.seconds[part] += sign * time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the optimizer."""
        self._lap("optimizer", -1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop timing the optimizer."""
        self._lap("optimizer", 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Discard the warmup step."""
        if state.global_step == 1:
            self.seconds.clear()

    def shares(self) -> dict[str, float]:
        """Return the share of each part in the time of the last turn."""
        parts, total = self.seconds, self.side.stopwatch.seconds
        named = {
            "making batches": self.side.collator_seconds(),
            "forward, reference's trunk": parts["reference"],
            "forward, trunk": parts["trunk"],
            "forward, heads and loss": parts["loss"] - parts["trunk"] - parts["reference"],
            "backward": parts["backward"],
            "optimizer": parts["optimizer"],
        }
        return {name: seconds / total for name, seconds in {**named, "rest": total - sum(named.values())}.items()}


def operator_shares(train: Callable[[], Any]) -> dict[str, float]:
    """Return the shares of attention and matrix products in the device time of forward and backward passes."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        train()
    shares: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # kernel times are attributed to the launching operator
            continue
        attention = any(word in event.key for word in ("attention", "attn"))
        kind = "attention" if attention else "matrix products" if event.key in PRODUCTS else "other operators"
        shares[kind] += event.self_device_time_total if CUDA else event.self_cpu_time_total
    return {kind: time / shares.total() for kind, time in shares.most_common()}
