"""
Forward pass of a decoder over a [`~stepdpo_trl.shared_prefix.tree.PrefixTree`], which computes shared tokens once.

Only two functions of a model are wrapped. The forward of the backbone runs the packs of the tree instead of the padded
rows, and returns the hidden states that predict the labeled tokens in the shape of the rows. The attention function,
which Transformers looks up by name, attends from the new tokens of each row to the keys of the whole row. All other
modules (embeddings, norms, MLPs, experts, adapters, quantized layers) process each token independently and are not
changed.
"""

import functools
import sys
import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import PrefixAttention
from .tree import Pack, PrefixTree
from .vision import encode_images

# Arguments that describe the padded rows, or are set for each pack
_ROW_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def share_prefixes(model: PreTrainedModel) -> None:
    """
    Make a causal language model accept a `prefix_tree`.

    `model(**batch, prefix_tree=tree)` returns the logits or log-probabilities of `tree.input_ids`, each conditioned on
    all tokens before it in its row. Without the argument, the model is unchanged. Repeated calls have no effect.

    Args:
        model (`PreTrainedModel`):
            Model, without the wrapper of PEFT.
    """
    backbone: Any = model.base_model
    # Already wrapped, even if others have wrapped it again. After unpickling, both are the forward of the class
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


def text_decoder(backbone: Any) -> Any:
    """Return the language model of a vision-language model, or the model itself if it is a pure text decoder."""
    return getattr(backbone, "language_model", None) or getattr(backbone, "text_model", None) or backbone


def _wrap_attention(backbone: Any) -> None:
    """
    Wrap the attention function of a model.

    It keeps its name, because masks, kernels and generation depend on the name. Without a pack it is unchanged.
    """
    name = text_decoder(backbone).config._attn_implementation
    if name != "eager":
        attention = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(attention, PrefixAttention):
            AttentionInterface.register(name, PrefixAttention(name, attention))
        return
    # Each architecture defines its own in the file of its classes; FSDP's derived classes are defined elsewhere
    files = {sys.modules[cls.__module__] for module in backbone.modules() for cls in type(module).__mro__}
    for file in files:
        attention = getattr(file, "eager_attention_forward", None)
        if attention is not None and not isinstance(attention, PrefixAttention):
            file.eager_attention_forward = PrefixAttention(name, attention)  # type: ignore[attr-defined]


def _forward_tree(backbone: Any, tree: PrefixTree, **kwargs: Any) -> ModelOutput:
    """Run the packs of a tree instead of the padded rows that the arguments describe."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _ROW_ARGUMENTS and value is not None}
    features = encode_images(backbone, tree)
    output_class: Any = None

    def run(pack: Pack) -> tuple[torch.Tensor, ...]:
        nonlocal output_class
        images = {"mm_encoder_outputs": features.select(pack.images)} if features and pack.images else {}
        output = backbone.forward_without_tree(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=_placeholder_mask(pack),
            use_cache=False,
            prefix_pack=pack,
            **images,
            **kwargs,
        )
        output_class = type(output)
        return output.last_hidden_state[0], *(getattr(output, "router_logits", None) or ())

    # To keep the activations of one pack at a time, all packs but the last are recomputed in the backward. Not with
    # gradient checkpointing, which keeps little anyway and cannot be nested under ZeRO-3
    checkpointing = backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
    recomputed = len(tree.packs) - 1 if torch.is_grad_enabled() and not checkpointing else 0
    outputs = [checkpoint(run, pack, use_reentrant=False) for pack in tree.packs[:recomputed]]
    outputs += [run(pack) for pack in tree.packs[recomputed:]]
    hidden, *router_logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    real = slice(-tree.tokens, None)  # the tokens before belong to dummy packs, see `PrefixTree.padded`
    # Heads read attributes that depend on the architecture and version, so the class must be the backbone's
    output = output_class(last_hidden_state=_gather_predicting(tree, hidden[real], hidden[: -tree.tokens]))
    if router_logits:
        output.router_logits = tuple(logits[real] for logits in router_logits)
    return output


def _placeholder_mask(pack: Pack) -> torch.Tensor:
    """
    Return a 4D mask, which models pass to the attention function unchanged instead of creating one.

    `PrefixAttention` ignores it. Its shape is one too large, so that any other attention function raises an error.
    """
    return torch.zeros(1, device=pack.input_ids.device).expand(1, 1, pack.tokens + 1, pack.tokens + 1)


def _gather_predicting(tree: PrefixTree, hidden: torch.Tensor, dummies: torch.Tensor) -> torch.Tensor:
    """Return the hidden states that predict the labeled tokens, in shape `(rows, labels, hidden)`."""
    rows, labels = tree.sources.shape
    sources = tree.sources.flatten().to(hidden.device)  # a model split over devices ends on another one
    predicting = hidden.index_select(0, sources).view(rows, labels, -1)
    # The dummy packs need a backward too, because other processes wait for it
    return predicting + 0 * dummies.sum() if len(dummies) else predicting
