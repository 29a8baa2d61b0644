"""
References of sDPO, and copying the policy into them in place.

There is one class for each kind of reference that [`~trl.DPOTrainer`] supports: a separate model, a frozen adapter on
the same base model, and precomputed log-probabilities. Copying needs no second copy of a model and gathers at most one
parameter at a time. (Saving a stage's model gathers all of it, and resuming within a stage loads it on every process.)
"""

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model

if TYPE_CHECKING:
    from trl import DPOTrainer

POLICY, REFERENCE = "default", "ref"  # adapter names in DPOTrainer


class ModelReference:
    """
    A separate reference model, for full fine-tuning.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer with a `ref_model`.

    Raises:
        ValueError: If policy and reference have different architectures.
    """

    kind = "model"

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.trainer = trainer
        self.args: Any = trainer.args
        policy, reference = (_shapes(model) for model in self._models())
        if policy != reference:
            name = next(name for name in {**policy, **reference} if policy.get(name) != reference.get(name))
            raise ValueError(
                f"`ref_model` has a different architecture from the model, so the policy cannot be copied into it: "
                f"{name!r} has the shape {policy.get(name)} in the model and {reference.get(name)} in `ref_model`. "
                "Pass a `ref_model` of the same architecture, or none."
            )

    def _models(self) -> tuple[nn.Module, nn.Module]:
        unwrap: Any = partial(self.trainer.accelerator.unwrap_model, keep_torch_compile=False)
        return unwrap(self.trainer.model), unwrap(self.trainer.ref_model)

    def become_policy(self) -> None:
        """Copy the weights of the policy into the reference."""
        copy_weights(*self._models())

    def restore(self, folder: Path) -> None:
        """Load the weights of a saved model into the reference."""
        reference = self._models()[1]
        options: dict[str, Any] = {"dtype": reference.dtype, "device_map": None}
        if self.args.trust_remote_code:
            options["trust_remote_code"] = True
        copy_weights(create_model_from_path(str(folder), **options), reference)


class AdapterReference:
    """
    A frozen adapter `"ref"` on the base model of the policy, for LoRA and QLoRA.

    [`~trl.DPOTrainer`] uses an adapter of that name as the reference. It is added here if the model does not have one.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer whose model is a [`~peft.PeftModel`].

    Raises:
        ValueError: If the model cannot hold a second adapter that is equal to the policy's.
    """

    kind = "adapter"

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        args: Any = trainer.args
        if list(self.model.active_adapters) != [POLICY]:
            raise ValueError(
                f"The active adapters are {list(self.model.active_adapters)}, but DPOTrainer trains the adapter named "
                f"{POLICY!r}. Load the adapter with `adapter_name={POLICY!r}`."
            )
        config = self.model.peft_config[POLICY]
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"The adapter trains biases of the base model (bias={config.bias!r}), which policy and reference "
                "share, so the reference would change during training. Set `bias='none'`, or use "
                "`precompute_ref_log_probs=True`, which needs no reference adapter."
            )
        if REFERENCE not in self.model.peft_config:
            self._add(config)
        elif changes_base(config):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base model whenever an adapter is added, "
                "and DPOTrainer has added one as the reference. Merge the adapter into the base model and train a new "
                "one, or pass `peft_config` instead of a PeftModel."
            )
        for policy, reference in self._pairs():
            # For QLoRA, PEFT creates the new adapter in another dtype than the policy's
            reference.data = reference.data.to(policy.dtype)
            copy_tensor(policy, reference)
            reference.requires_grad_(False)
        if args.disable_dropout:
            disable_dropout_in_model(self.model)

    def _add(self, config: Any) -> None:
        config = copy.deepcopy(config)
        if changes_base(config):
            config.init_lora_weights = False  # the weights are overwritten by the policy's
        try:
            self.model.add_adapter(REFERENCE, config)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"PEFT cannot add a second adapter of type {type(config).__name__} as the reference: {error} Use "
                "`precompute_ref_log_probs=True`, which needs no reference adapter."
            ) from error

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return the parameters of the policy adapter with their counterparts in the reference adapter."""
        parameters = dict(self.model.named_parameters())
        pairs = []
        for name, policy in parameters.items():
            parts = name.split(".")
            if POLICY in parts:
                counterpart = parameters.get(".".join(REFERENCE if part == POLICY else part for part in parts))
                if counterpart is None:
                    raise ValueError(
                        f"The adapter weight {name!r} has no counterpart in the reference adapter. Use "
                        "`precompute_ref_log_probs=True`, which needs no reference adapter."
                    )
                pairs.append((policy, counterpart))
        return pairs

    def become_policy(self) -> None:
        """Copy the weights of the policy adapter into the reference adapter."""
        reshard(self.model)
        for policy, reference in self._pairs():
            copy_tensor(policy, reference)

    def restore(self, folder: Path) -> None:
        """Load a saved adapter into the reference adapter. Must be called before the parameters are sharded."""
        # PEFT would otherwise load the adapter in float32, which for QLoRA is not the policy's dtype
        self.model.load_adapter(str(folder), REFERENCE, is_trainable=False, autocast_adapter_dtype=False)
        self.model.set_adapter(POLICY)


class ScoredReference:
    """
    Precomputed log-probabilities instead of a reference model, for `precompute_ref_log_probs=True`.

    At the start of a stage, policy and reference have the same weights, so the policy scores the rows of the stage.
    """

    kind = "scores"

    def become_policy(self) -> None:
        """Do nothing. The scores of the next stage are computed when it starts."""

    def restore(self, folder: Path) -> None:
        """Do nothing. The scores of the stage are read from disk."""


def changes_base(config: Any) -> bool:
    """Return whether PEFT changes the base model when it adds this adapter (PiSSA, OLoRA, CorDA, LoftQ, ...)."""
    initialization = getattr(config, "init_lora_weights", True)
    return isinstance(initialization, str) and initialization.lower() not in ("gaussian", "orthogonal", "eva")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and buffers of a model, one by one, into a model of the same architecture."""
    reshard(source)
    reshard(target)
    for tensors in ("named_parameters", "named_buffers"):
        sources = dict(getattr(source, tensors)())
        for name, tensor in getattr(target, tensors)():
            copy_tensor(sources[name], tensor)


def reshard(model: nn.Module) -> None:
    """Free parameters that FSDP2 has gathered for a forward pass and not yet resharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def copy_tensor(source: torch.Tensor, target: torch.Tensor) -> None:
    """
    Copy a tensor in place. Source and target may be sharded by ZeRO-3 or FSDP2.

    If both are sharded in the same way, each process copies its shard. Otherwise this tensor alone is gathered or
    sharded.

    Args:
        source (`torch.Tensor`):
            Tensor to copy from.
        target (`torch.Tensor`):
            Tensor of the same shape to copy into. It keeps its dtype and sharding.
    """
    if hasattr(target, "ds_tensor"):
        _copy_zero3(source, target)
    elif isinstance(target, DTensor):
        if isinstance(source, DTensor):
            if source.placements != target.placements:
                source = source.redistribute(target.device_mesh, target.placements)
        else:
            source = distribute_tensor(source.to(target.dtype), target.device_mesh, target.placements)
        target.to_local().copy_(source.to_local())
    else:
        target.copy_(source)


def _copy_zero3(source: Any, target: Any) -> None:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    same_shards = hasattr(source, "ds_tensor") and source.ds_tensor.shape == target.ds_tensor.shape
    if same_shards:
        target.ds_tensor.data.copy_(source.ds_tensor.data)
    # ZeRO-3 keeps small parameters gathered as well, so both copies must be updated
    if target.ds_status == ZeroParamStatus.AVAILABLE:
        with deepspeed.zero.GatheredParameters([source], enabled=hasattr(source, "ds_tensor")):
            target.data.copy_(source.data)
    elif not same_shards:
        with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0):
            target.data.copy_(source.data)
