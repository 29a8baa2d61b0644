"""
Attention over a [`~stepdpo_trl.shared_prefix.tree.Pack`].

The queries of a chain attend to the keys of its row, up to their own position. There are three exact implementations:
FlashAttention if the model is loaded with it, otherwise PyTorch's variable-length kernel on CUDA, and if neither
applies (CPU, float32, soft-capping), the model's attention function, called for each chain.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Set
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .tree import Pack, build_tree

logger = logging.getLogger(__name__)


class PrefixAttention:
    """
    Wrapper of a Transformers attention function that also accepts a [`~stepdpo_trl.shared_prefix.tree.Pack`].

    Args:
        name (`str`):
            Name of the attention implementation, such as `"sdpa"`, `"eager"` or `"flash_attention_2"`.
        attention (`Callable`):
            Attention function.
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
        """
        Compute attention, over the chains of a pack if there is one.

        Args:
            module (`torch.nn.Module`):
                Attention layer.
            query, key, value (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`):
                Queries, keys and values. With a pack, `batch` is 1.
            attention_mask (`torch.Tensor` or `None`):
                Mask, which is ignored with a pack.
            prefix_pack (`Pack`, *optional*):
                Pack that the tokens belong to. If `None`, the wrapped function is called unchanged.

        Returns:
            `tuple`: Output of shape `(batch, tokens, heads, head_dim)`, and the attention weights or `None`.
        """
        attention = self.attention
        if prefix_pack is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        keys, values = (states.index_select(2, prefix_pack.keys) for states in (key, value))
        if "flash" in self.name:
            kwargs.pop("position_ids", None)  # positions that restart would be read as separate sequences
            offsets = {"cu_seq_lens_q": prefix_pack.query_offsets, "cu_seq_lens_k": prefix_pack.key_offsets}
            longest = {"max_length_q": prefix_pack.longest[0], "max_length_k": prefix_pack.longest[1]}
            return attention(module, query, keys, values, None, *args, **kwargs, **offsets, **longest)
        blocks = prefix_pack.blocks
        if self.name == "sdpa" and blocks is None and _supports_varlen(query, **kwargs):
            return _varlen(query, keys, values, prefix_pack, **kwargs), None

        window = kwargs.get("sliding_window")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
            # A chain that is a whole row needs no mask, because SDPA is then causal by default
            whole = self.name == "sdpa" and q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
            mask = None if whole and b is None else _causal_mask(q, k, window, b)
            return attention(module, q, k, v, mask, *args, **kwargs)[0]

        return _chain_by_chain(attend, query, keys, values, prefix_pack, blocks), None


def _chain_by_chain(
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pack: Pack,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Call `attention(query, key, value, ...)` for each chain and return shape `(1, tokens, heads, head_dim)`."""
    queries, lengths = zip(*pack.lengths, strict=True)
    states = [query.split(queries, 2), keys.split(lengths, 2), values.split(lengths, 2)]
    if blocks is not None:
        states.append(blocks[pack.keys].split(lengths))
    return torch.cat([attention(*chain) for chain in zip(*states, strict=True)], dim=1)


def _causal_mask(
    query: torch.Tensor, key: torch.Tensor, window: int | None, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return an additive mask of shape `(1, 1, queries, keys)` that aligns the last query with the last key.

    Given the blocks of the keys, queries also attend to later keys of their block.
    """
    positions = torch.arange(key.shape[2], device=query.device)
    distance = positions[-query.shape[2] :, None] - positions
    visible = distance >= 0
    if blocks is not None:
        own = blocks[-query.shape[2] :, None]
        visible = visible | ((own == blocks) & (own >= 0))
    if window is not None:
        visible = visible & (distance < window)
    mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(~visible, torch.finfo(query.dtype).min)[None, None]


def _supports_varlen(query: torch.Tensor, dropout: float = 0.0, softcap: float | None = None, **_: Any) -> bool:
    """Return whether PyTorch's variable-length kernel supports these inputs."""
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
    """Compute all chains in one call and return shape `(1, tokens, heads, head_dim)`."""
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
    """Return whether the kernel aligns the last query with the last key, also with windows and in the backward."""
    arguments: Set[str] = set()
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        arguments = inspect.signature(varlen_attn).parameters.keys()
    if not {"window_size", "enable_gqa", "scale"} <= arguments:
        logger.warning(
            f"PyTorch {torch.__version__} has no variable-length attention with grouped heads and windows, so masked "
            "attention is used, which is slower. Install torch>=2.12, or use "
            "`attn_implementation='flash_attention_2'`."
        )
        return False
    # This runs within the first forward pass, where gradients can be disabled and checkpointing hooks active
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), own_hooks:
        try:
            exact = all(_varlen_matches_masked(device, dtype, head_dim, window) for window in (None, 4))
            reason = "differs from masked attention"
        except RuntimeError as error:
            exact, reason = False, f"does not run: {error}"
    if not exact:
        logger.warning(
            f"PyTorch's variable-length attention {reason} (device {device}, {dtype}, head_dim={head_dim}). Masked "
            "attention is used instead, which is slower. `attn_implementation='flash_attention_2'` is not affected."
        )
    return exact


def _varlen_matches_masked(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> bool:
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
