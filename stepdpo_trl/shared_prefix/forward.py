"""
A decoder's forward over a [`~stepdpo_trl.shared_prefix.tree.PrefixTree`]: each shared token is computed once.

Two places know of the tree. The backbone's forward runs its packs instead of the padded rows, and hands out the hidden
states that predict the labelled tokens, as if those were the rows. The attention function, which transformers looks up
by name, calls the model's own for each row that has new tokens, with the keys of the whole row. Everything between
them (embeddings, norms, MLPs, experts, adapters, quantized layers) sees tokens one by one and is left alone.
"""

import functools
import sys
import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import PrefixAttention
from .tree import Pack, PrefixTree

_OF_ROWS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def share_prefixes(model: PreTrainedModel) -> None:
    """
    Teach a causal language model to take a `prefix_tree`.

    With `model(**batch, prefix_tree=tree)` the hidden states, and so logits or log-probabilities, are those of
    `tree.input_ids` given all that stands before it in the rows. Without it, the model does what it did.

    Args:
        model (`PreTrainedModel`): The model, without the wrapper of PEFT. Twice does no harm.
    """
    backbone: Any = model.base_model
    # Whatever was wrapped around it since. A pickled copy has both attributes, but both are its class's forward
    if getattr(backbone, "forward_without_tree", backbone.forward) != backbone.forward:
        return
    _wrap_attention(backbone)
    backbone.forward_without_tree = backbone.forward

    @functools.wraps(type(backbone).forward)
    def forward(self: Any, *args: Any, prefix_tree: PrefixTree | None = None, **kwargs: Any) -> Any:
        if prefix_tree is None:
            return self.forward_without_tree(*args, **kwargs)
        return _forward_tree(self, prefix_tree, **kwargs)

    backbone.forward = types.MethodType(forward, backbone)


def _wrap_attention(backbone: Any) -> None:
    """
    Wrap the attention function under the name that the model has, so that all that asks for the name (masks, kernels,
    generation) gets the answer it had. Without a pack it is handed through.
    """
    name = backbone.config._attn_implementation
    if name != "eager":
        attention = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(attention, PrefixAttention):
            AttentionInterface.register(name, PrefixAttention(name, attention))
        return
    # Each architecture has its own, beside its classes (FSDP derives classes elsewhere)
    files = {sys.modules[cls.__module__] for module in backbone.modules() for cls in type(module).__mro__}
    for file in files:
        attention = getattr(file, "eager_attention_forward", None)
        if attention is not None and not isinstance(attention, PrefixAttention):
            file.eager_attention_forward = PrefixAttention(name, attention)  # type: ignore[attr-defined]


def _forward_tree(backbone: Any, tree: PrefixTree, **kwargs: Any) -> MoeModelOutputWithPast:
    """Run the packs of a tree, in place of the padded rows that the arguments describe."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_ROWS}

    def run(pack: Pack) -> tuple[torch.Tensor, ...]:
        output = backbone.forward_without_tree(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=_unfitting_mask(pack),
            use_cache=False,
            prefix_pack=pack,
            **kwargs,
        )
        return output.last_hidden_state[0], *(getattr(output, "router_logits", None) or ())

    # Only one pack's activations are kept at a time: those of the last are used first, the others are computed anew
    # when their turn comes. Layers that do so by themselves keep little (and ZeRO-3 cannot have one within the other)
    layers_do = backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
    anew = len(tree.packs) - 1 if torch.is_grad_enabled() and not layers_do else 0
    outputs = [checkpoint(run, pack, use_reentrant=False) for pack in tree.packs[:anew]]
    outputs += [run(pack) for pack in tree.packs[anew:]]
    hidden, *router_logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    own = slice(-tree.tokens, None)  # what stands before belongs to packs that stand in, see `PrefixTree.padded`
    routers: Any = tuple(logits[own] for logits in router_logits) or None
    return MoeModelOutputWithPast(
        last_hidden_state=_predicting(tree, hidden[own], hidden[: -tree.tokens]), router_logits=routers
    )


def _unfitting_mask(pack: Pack) -> torch.Tensor:
    """
    A mask of four dimensions, which models hand through instead of making one. The attention function, which knows the
    pack, does not look at it; should another one have been set meanwhile, it fails for the shape.
    """
    return torch.zeros(1, device=pack.input_ids.device).expand(1, 1, pack.tokens + 1, pack.tokens + 1)


def _predicting(tree: PrefixTree, hidden: torch.Tensor, stand_ins: torch.Tensor) -> torch.Tensor:
    """Hidden states of shape `(rows, steps, hidden)` that predict the labelled tokens, from those of all tokens."""
    rows, steps = tree.sources.shape
    sources = tree.sources.flatten().to(hidden.device)  # a model split over devices ends on another one
    predicting = hidden.index_select(0, sources).view(rows, steps, -1)
    # So that the backward of the stand-ins runs, as it does elsewhere
    return predicting + 0 * stand_ins.sum() if len(stand_ins) else predicting
