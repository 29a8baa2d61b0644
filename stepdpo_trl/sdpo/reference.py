"""
The reference of sDPO and how it becomes the policy, in place: no second copy of a model, none gathered whole.
(Saving the stage's model, as the Trainer does, gathers it; resuming within a stage loads one on every process.)

Three kinds, one for each way in which [`~trl.DPOTrainer`] keeps its reference: a model beside the policy, a frozen
adapter on the policy's own base, or scores that are computed before training.
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

POLICY, REFERENCE = "default", "ref"  # names of the adapters, as in DPOTrainer


class ModelReference:
    """A reference model: the policy's weights are copied into it, parameter by parameter, shard to shard."""

    kind = "model"

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.trainer = trainer
        self.args: Any = trainer.args
        policy, reference = (_shapes(model) for model in self._models())
        if policy != reference:
            name = next(name for name in {**policy, **reference} if policy.get(name) != reference.get(name))
            raise ValueError(
                f"The reference cannot become the policy: `ref_model` has another architecture ({name!r} has the "
                f"shape {policy.get(name)} in the model, {reference.get(name)} in the reference). Pass a `ref_model` "
                "of the same architecture, or none."
            )

    def _models(self) -> tuple[nn.Module, nn.Module]:
        unwrap: Any = partial(self.trainer.accelerator.unwrap_model, keep_torch_compile=False)
        return unwrap(self.trainer.model), unwrap(self.trainer.ref_model)

    def become_policy(self) -> None:
        """Copy the policy into the reference."""
        copy_weights(*self._models())

    def restore(self, folder: Path) -> None:
        """Copy a saved model into the reference."""
        reference = self._models()[1]
        options: dict[str, Any] = {"dtype": reference.dtype, "device_map": None}
        if self.args.trust_remote_code:
            options["trust_remote_code"] = True
        copy_weights(create_model_from_path(str(folder), **options), reference)


class AdapterReference:
    """A frozen adapter `"ref"` on the policy's base, which [`~trl.DPOTrainer`] takes for the reference where it is."""

    kind = "adapter"

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        args: Any = trainer.args
        if list(self.model.active_adapters) != [POLICY]:
            raise ValueError(
                f"The active adapter must be the one named {POLICY!r}, as for DPOTrainer, and is "
                f"{list(self.model.active_adapters)}. Load it with `adapter_name={POLICY!r}`."
            )
        config = self.model.peft_config[POLICY]
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"The adapter trains biases (bias={config.bias!r}). They belong to the base model, which policy and "
                "reference share, so no reference can be kept beside them. Set `bias='none'`, or "
                "`precompute_ref_log_probs=True`, which keeps none."
            )
        if REFERENCE not in self.model.peft_config:
            self._add(config)
        elif changes_base(config):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base model when an adapter is added, and "
                "DPOTrainer has added one as the reference. Merge the adapter into the base model and train a new "
                "one, or pass `peft_config` rather than a PeftModel."
            )
        for policy, reference in self._pairs():
            # A copy with the policy's dtype, which for QLoRA is not the one that PEFT gives a new adapter
            reference.data = reference.data.to(policy.dtype)
            copy_tensor(policy, reference)
            reference.requires_grad_(False)
        if args.disable_dropout:
            disable_dropout_in_model(self.model)

    def _add(self, config: Any) -> None:
        config = copy.deepcopy(config)
        if changes_base(config):
            config.init_lora_weights = False  # its weights are copied from the policy's in any case
        try:
            self.model.add_adapter(REFERENCE, config)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"PEFT adds no second adapter of this kind ({type(config).__name__}) as the reference: {error} Set "
                "`precompute_ref_log_probs=True`, which needs none."
            ) from error

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        parameters = dict(self.model.named_parameters())
        pairs = []
        for name, policy in parameters.items():
            parts = name.split(".")
            if POLICY in parts:
                counterpart = parameters.get(".".join(REFERENCE if part == POLICY else part for part in parts))
                if counterpart is None:
                    raise ValueError(
                        f"The adapter's weight {name!r} has no counterpart in a second adapter, so no reference can "
                        "be kept beside it. Set `precompute_ref_log_probs=True`, which needs none."
                    )
                pairs.append((policy, counterpart))
        return pairs

    def become_policy(self) -> None:
        """Copy the trained adapter into the frozen one."""
        reshard(self.model)
        for policy, reference in self._pairs():
            copy_tensor(policy, reference)

    def restore(self, folder: Path) -> None:
        """Load a saved adapter into the frozen one. Before training, when no parameter is sharded yet."""
        # PEFT would load it in float32, which for QLoRA is not the policy's
        self.model.load_adapter(str(folder), REFERENCE, is_trainable=False, autocast_adapter_dtype=False)
        self.model.set_adapter(POLICY)


class ScoredReference:
    """No reference model: at a stage's start policy and reference are the same weights, so the policy scores it."""

    kind = "scores"

    def become_policy(self) -> None:
        """Nothing: the scores of the next stage are computed at its start."""

    def restore(self, folder: Path) -> None:
        """Nothing: the scores of the stage are on disk."""


def changes_base(config: Any) -> bool:
    """Whether PEFT subtracts a new adapter of this kind from the base model (PiSSA, OLoRA, CorDA, LoftQ ...)."""
    initialization = getattr(config, "init_lora_weights", True)
    return isinstance(initialization, str) and initialization.lower() not in ("gaussian", "orthogonal", "eva")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of one model into another of the same architecture, one by one."""
    reshard(source)
    reshard(target)
    for tensors in ("named_parameters", "named_buffers"):
        sources = dict(getattr(source, tensors)())
        for name, tensor in getattr(target, tensors)():
            copy_tensor(sources[name], tensor)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered for a forward and may have kept: the shards are the model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def copy_tensor(source: torch.Tensor, target: torch.Tensor) -> None:
    """
    Copy a tensor in place, whether whole or sharded by ZeRO-3 or FSDP2.

    Where both sides are sharded alike each process copies its shard. At most this one tensor is gathered or cut.
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

    alike = hasattr(source, "ds_tensor") and source.ds_tensor.shape == target.ds_tensor.shape
    if alike:
        target.ds_tensor.data.copy_(source.ds_tensor.data)
    # Small parameters are also kept whole, and a source that is sharded otherwise must be whole for a moment
    if target.ds_status == ZeroParamStatus.AVAILABLE:
        with deepspeed.zero.GatheredParameters([source], enabled=hasattr(source, "ds_tensor")):
            target.data.copy_(source.data)
    elif not alike:
        with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0):
            target.data.copy_(source.data)
