"""
Attention over a [`~stepdpo_trl.shared_prefix.tree.Pack`]: a chain's queries see the keys of its row, up to their own place.

Three ways, all exact: FlashAttention where the model uses it, PyTorch's variable-length kernel on CUDA otherwise, and
where neither can (CPU, float32, soft-capping), the model's own attention function for one chain after the other.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .tree import Pack, build_tree

logger = logging.getLogger(__name__)


class PrefixAttention:
    """
    An attention function of transformers that also takes a [`~stepdpo_trl.shared_prefix.tree.Pack`].

    Args:
        name (`str`): Its name, `"sdpa"`, `"eager"`, `"flash_attention_2"` ...
        attention (`Callable`): The function itself.
    """

    def __init__(self, name: str, attention: Callable[..., Any]) -> None:
        self.name = name
        self.attention = attention

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        prefix_pack: Pack | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend, as `attention` does, of tensors of shape `(batch, heads, tokens, head_dim)`."""
        attention = self.attention
        if prefix_pack is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        keys, values = (states.index_select(2, prefix_pack.keys) for states in (key, value))
        if "flash" in self.name:
            kwargs.pop("position_ids", None)  # which would be taken for several sequences
            offsets = {"cu_seq_lens_q": prefix_pack.query_offsets, "cu_seq_lens_k": prefix_pack.key_offsets}
            most = {"max_length_q": prefix_pack.longest[0], "max_length_k": prefix_pack.longest[1]}
            return attention(module, query, keys, values, None, *args, **kwargs, **offsets, **most)
        if self.name == "sdpa" and _takes_varlen(query, **kwargs):
            return _varlen(query, keys, values, prefix_pack, **kwargs), None

        window = kwargs.get("sliding_window")

        def of_chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # SDPA is causal by itself where the chain is the whole row
            whole = self.name == "sdpa" and q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
            return attention(module, q, k, v, None if whole else _causal_mask(q, k, window), *args, **kwargs)[0]

        return _chain_by_chain(of_chain, query, keys, values, prefix_pack), None


def _chain_by_chain(
    attention: Callable[..., torch.Tensor], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pack: Pack
) -> torch.Tensor:
    """One call of `attention(query, key, value)` for each chain. Shape `(1, tokens, heads, head_dim)`."""
    queries, lengths = zip(*pack.lengths, strict=True)
    chains = zip(query.split(queries, 2), keys.split(lengths, 2), values.split(lengths, 2), strict=True)
    return torch.cat([attention(*chain) for chain in chains], dim=1)


def _causal_mask(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """What to add to scores of shape `(1, 1, queries, keys)`: the last query has the place of the last key."""
    places = torch.arange(key.shape[2], device=query.device)
    distance = places[-query.shape[2] :, None] - places
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]


def _takes_varlen(query: torch.Tensor, dropout: float = 0.0, softcap: float | None = None, **_: Any) -> bool:
    """Whether PyTorch's variable-length kernel can compute it."""
    dtype = _autocast_dtype(query)
    return (
        query.is_cuda
        and dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and softcap is None
        and _varlen_is_exact(query.device, dtype, query.shape[-1])
    )


def _varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pack: Pack,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """One call for all chains. Shape `(1, tokens, heads, head_dim)`."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = _autocast_dtype(query)
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, keys, values))
    offsets = pack.query_offsets, pack.key_offsets
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return varlen_attn(q, k, v, *offsets, *pack.longest, scale=scaling, window_size=window, enable_gqa=True)[None]  # type: ignore


def _autocast_dtype(query: torch.Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


@functools.cache
def _varlen_is_exact(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """
    Whether this PyTorch has a kernel for the device that puts the last query to the last key, in windows and in the
    backward too.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return False
    # This runs in the first forward, of a reference maybe, and in a checkpoint that must not count what is kept here
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), own_hooks:
        try:
            exact = all(_same_with_varlen(device, dtype, head_dim, window) for window in (None, 4))
            reason = "gives something else than masked attention"
        except RuntimeError as error:
            exact, reason = False, f"does not run: {error}"
    if not exact:
        logger.warning(
            f"PyTorch's variable-length attention {reason} (on {device}, {dtype}, head_dim={head_dim}). Masked "
            "attention is used, which is slower; `attn_implementation='flash_attention_2'` is not concerned."
        )
    return exact


def _same_with_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> bool:
    (pack,) = build_tree([[*range(12)], [*range(9), 20, 21, 22, 23]], [[1] * 12, [1] * 13]).to(device).packs
    generator = torch.Generator(device).manual_seed(0)
    states = [
        torch.randn(
            1, heads, pack.tokens, head_dim, generator=generator, device=device, dtype=dtype, requires_grad=True
        )
        for heads in (4, 2, 2)
    ]
    query, keys, values = states[0], *(state.index_select(2, pack.keys) for state in states[1:])

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, _causal_mask(q, k, window), enable_gqa=True).transpose(1, 2)

    results = []
    for output in (
        _varlen(query, keys, values, pack, None, window),
        _chain_by_chain(masked, query, keys, values, pack),
    ):
        results.append([output, *torch.autograd.grad(output.float().square().sum(), states, retain_graph=True)])
    return all(torch.allclose(one, other, atol=5e-2, rtol=5e-2) for one, other in zip(*results, strict=True))
