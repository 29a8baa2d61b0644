"""Tests for copying the policy into the reference, and for the memory this needs."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepdpo_trl.sdpo.reference import copy_weights
from stepdpo_trl.sdpo.restart import clear_optimizer_state

from .separate_runs import staged_run


class Allocations(TorchDispatchMode):
    """Measures the memory, in bytes, of the tensors allocated within the context."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in before | self.known:
                    self.known.add(storage._cdata)
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, storage, size):
        self.known.discard(storage)
        self.held -= size


def measure_swap(trainer):
    """Return the peak memory that copying the policy allocates, and the size of the largest parameter, in bytes."""
    with Allocations() as allocations:
        trainer.reference.become_policy()
    sizes = (getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trainer.model.parameters())
    return allocations.peak, max(sizes)


def test_allocations_are_measured():
    tensor = torch.zeros(1000)
    with Allocations() as allocations:
        tensor.clone()
        assert allocations.peak == 4000
        twice = [tensor.clone(), tensor.clone()]
        assert allocations.peak == 8000
    del twice


@pytest.mark.parametrize("mode", ["full", "lora", "scores"])
def test_copying_allocates_at_most_one_parameter(mode, chat_model, tmp_path):
    trainer = staged_run(chat_model, tmp_path, mode)
    peak, largest = measure_swap(trainer)
    assert peak <= largest


def test_buffers_and_other_dtypes_are_copied():
    source = torch.nn.BatchNorm1d(3)
    source.running_mean += 7
    target = torch.nn.BatchNorm1d(3).bfloat16()
    address = target.weight.data_ptr()
    with torch.no_grad():
        source.weight += 0.5
    copy_weights(source, target)
    assert target.running_mean.tolist() == [7, 7, 7]
    assert target.weight.tolist() == [1.5, 1.5, 1.5]
    assert (target.weight.data_ptr(), target.weight.dtype) == (address, torch.bfloat16)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.SGD])
def test_cleared_optimizer_equals_a_new_one(optimizer):
    options = {"lr": 0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {})}
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [optimizer([parameter], **options) for parameter in parameters]
    gradients = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.1, -1.0])]
    parameters[0].grad = gradients[0]
    optimizers[0].step()
    clear_optimizer_state(optimizers[0])
    parameters[0].data.fill_(1)
    for parameter, each in zip(parameters, optimizers, strict=True):
        parameter.grad = gradients[1].clone()
        each.step()
    assert torch.equal(*parameters)
