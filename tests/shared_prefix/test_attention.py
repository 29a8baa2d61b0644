"""Decoders on a tree against the same decoders on separate sequences."""

import copy
import functools
import inspect
import pickle
import random

import pytest
import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from stepdpo_trl.shared_prefix import attention
from stepdpo_trl.shared_prefix.forward import share_prefixes
from stepdpo_trl.shared_prefix.support import CHECKED_MODEL_TYPES
from stepdpo_trl.shared_prefix.tree import build_tree

from .architectures import SHARED, VOCABULARY, tiny_decoder

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0])  # of the rows, in what is differentiated


def rows_and_labels():
    """Two problems that begin alike, two answers to each, longer than the windows of the models."""
    draw = random.Random(0)
    first = [draw.randrange(3, VOCABULARY) for _ in range(9)]
    second = first[:6] + [draw.randrange(3, VOCABULARY) for _ in range(7)]
    rows, labelled = [], []
    for prompt, length in ((first, 4), (second, 2), (first, 6), (second, 8)):
        rows.append(prompt + [draw.randrange(3, VOCABULARY) for _ in range(length)])
        labelled.append([0] * len(prompt) + [1] * length)
    return rows, labelled


def token_logps(logits, input_ids):
    return logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]


def separate(model):
    """Log-probabilities of the labelled tokens of each row, one row at a time, and the router's balance."""
    logps = []
    for row, mask in zip(*rows_and_labels(), strict=True):
        ids = torch.tensor([row])
        logps.append(token_logps(model(input_ids=ids).logits, ids)[0][torch.tensor(mask[1:]).bool()])
    return logps


def shared(model, max_tokens=None):
    tree = build_tree(*rows_and_labels(), max_tokens)
    output = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree)
    logps = token_logps(output.logits, tree.input_ids)
    return [row[mask.bool()] for row, mask in zip(logps, tree.completion_mask[:, 1:], strict=True)]


def gradients(model, logps):
    model.zero_grad()
    sum(weight * row.sum() for weight, row in zip(WEIGHTS, logps, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, max_tokens=None):
    expected = separate(model)
    expected_gradients = gradients(model, expected)
    found = shared(model, max_tokens)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for name, gradient in gradients(model, found).items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("max_tokens", [None, 24], ids=["whole", "packs"])
@pytest.mark.parametrize("name", SHARED)
def test_equals_separate_sequences(name, max_tokens, checkpointing):
    model = tiny_decoder(name)
    share_prefixes(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    assert_equal(model, max_tokens)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_eager_attention(name):
    model = tiny_decoder(name, attn_implementation="eager")
    share_prefixes(model)
    assert_equal(model)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo3", "qwen2 with windows"])
def test_windows_are_in_use(name):
    """Else their equality would show nothing."""
    model, wide = tiny_decoder(name), tiny_decoder(name, sliding_window=64)
    wide.load_state_dict(model.state_dict())
    assert max((a - b).abs().max() for a, b in zip(separate(model), separate(wide), strict=True)) > 0.01


def test_every_model_type_that_is_called_checked_is_checked():
    assert {name.split()[0] for name in SHARED} == set(CHECKED_MODEL_TYPES)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_load_balance_of_experts(name):
    """The balance loss weighs each token by the rows that it stands for, as separate rows do."""
    model = tiny_decoder(name)
    share_prefixes(model)
    rows, labelled = rows_and_labels()
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    for tree in (build_tree(rows, labelled), build_tree(rows, labelled, 24), build_tree(rows, labelled).padded(3)):
        output = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree, output_router_logits=True)
        torch.testing.assert_close(output.aux_loss, expected, rtol=1e-5, atol=0)


def test_without_a_tree_nothing_changes():
    model = tiny_decoder("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids).logits
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    share_prefixes(model)
    taught = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: taught(*args, **kwargs)  # as profilers do
    share_prefixes(model)  # twice does no harm
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
    assert torch.equal(tiny_decoder("llama")(input_ids=ids).logits, before)  # nor for other models


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_another_attention_function_fails_loudly(name, monkeypatch):
    """One that is set afterwards does not know the tree, and must not attend to all of it."""
    model = tiny_decoder("llama", attn_implementation="sdpa" if name == "eager" else "eager")
    share_prefixes(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", plain(modeling_llama.eager_attention_forward))
    model.set_attn_implementation(name)
    with pytest.raises(RuntimeError, match="size"):
        shared(model)


def plain(attention):
    return getattr(attention, "attention", attention)


def test_eager_attention_of_others_is_theirs():
    """Each architecture has its own, some of them under another name; what is registered would go before it."""
    share_prefixes(tiny_decoder("gemma2"))
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None
    assert modeling_phi3.eager_attention_forward is plain(modeling_phi3.eager_attention_forward)


def test_copies():
    """A copy runs its own weights, and can be shared again where it came without."""
    model = tiny_decoder("llama")
    share_prefixes(model)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.1)
    assert_equal(duplicate)
    loaded = pickle.loads(pickle.dumps(model))
    share_prefixes(loaded)
    assert_equal(loaded)


def test_one_pack_at_a_time_is_kept(monkeypatch):
    """The tensors kept for the backward are those of one pack, not of all."""
    model = tiny_decoder("llama")
    share_prefixes(model)
    kept = {}
    for most in (None, 24):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            shared(model, most)
        kept[most] = sum(sizes)
    assert kept[24] < 0.75 * kept[None]


# ------------------------------------------------------------------------------------------------ kernels


def varlen_oracle(query, key, value, query_offsets, key_offsets, max_q, max_k, *, scale, window_size, enable_gqa):
    """What PyTorch's kernel promises, score by score. Tensors of shape `(tokens, heads, head_dim)`."""
    assert enable_gqa
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    left, right = window_size
    outputs = []
    for q0, q1, k0, k1 in zip(query_offsets, query_offsets[1:], key_offsets, key_offsets[1:], strict=False):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        for i in range(q1 - q0):
            place = (k1 - k0) - (q1 - q0) + i
            first = k0 if left < 0 else k0 + max(0, place - left)
            seen = slice(first, k0 + place + right + 1)
            scores = torch.einsum("hd,khd->hk", query[q0 + i], key[seen]) * scale
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo3", "qwen3_moe"])
def test_variable_length_kernel(name, monkeypatch):
    """That a kernel is given what it needs, here on CPU with one that is slow and plain."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_oracle)
    monkeypatch.setattr(attention, "_takes_varlen", lambda query, **kwargs: True)
    model = tiny_decoder(name)
    share_prefixes(model)
    assert_equal(model)


def flash_oracle(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """A FlashAttention function of transformers, which takes offsets beside the tensors."""
    assert attention_mask is None
    assert "position_ids" not in kwargs
    states = (states[0].transpose(0, 1) for states in (query, key, value))
    offsets = (kwargs[f"cu_seq_lens_{which}"] for which in "qk")
    longest = (kwargs[f"max_length_{which}"] for which in "qk")
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_oracle(*states, *offsets, *longest, scale=scaling, window_size=window, enable_gqa=True)
    return output[None], None


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention(name):
    """By its name: what is left on CPU of a kernel that is not there."""
    model = tiny_decoder(name)
    expected = separate(model)
    AttentionInterface.register("flash_oracle", flash_oracle)
    model.config._attn_implementation = "flash_oracle"
    share_prefixes(model)
    for one, other in zip(shared(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_exactness_of_the_kernel_is_found_out(monkeypatch, caplog):
    """The kernel must put the last query to the last key; one that puts the first to the first is not used."""

    def upper_left(query, key, value, query_offsets, key_offsets, *args, **kwargs):
        shifted = [key[k0 : k0 + q1 - q0] for q0, q1, k0 in zip(query_offsets, query_offsets[1:], key_offsets)]  # noqa: B905
        values = [value[k0 : k0 + q1 - q0] for q0, q1, k0 in zip(query_offsets, query_offsets[1:], key_offsets)]  # noqa: B905
        shifted, values = torch.cat(shifted), torch.cat(values)
        return varlen_oracle(query, shifted, values, query_offsets, query_offsets, *args, **kwargs)

    signature = inspect.signature(varlen.varlen_attn)
    for kernel, exact in ((varlen_oracle, True), (upper_left, False)):
        filled = functools.partial(with_scale, kernel)
        filled.__signature__ = signature
        monkeypatch.setattr(varlen, "varlen_attn", filled)
        attention._varlen_is_exact.cache_clear()
        assert attention._varlen_is_exact(torch.device("cpu"), torch.float32, 16) is exact
    attention._varlen_is_exact.cache_clear()
    assert "variable-length attention gives something else" in caplog.text
    monkeypatch.undo()
    assert not attention._varlen_is_exact(torch.device("cpu"), torch.float32, 16)
    assert "variable-length attention does not run" in caplog.text  # PyTorch has none for a CPU
    attention._varlen_is_exact.cache_clear()


def with_scale(kernel, query, *args, scale=None, **kwargs):
    return kernel(query, *args, scale=scale or query.shape[-1] ** -0.5, **kwargs)


def test_what_the_kernel_takes():
    query = torch.zeros(1, 4, 3, 64, dtype=torch.bfloat16)
    assert not attention._takes_varlen(query)  # on CPU
    assert attention._autocast_dtype(query.float()) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention._autocast_dtype(query.float()) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_equals_separate_sequences_on_cuda(name):
    """In bfloat16, to its rounding."""
    sizes = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
    model = tiny_decoder(name, **sizes).to("cuda", torch.bfloat16)
    share_prefixes(model)
    if name != "gemma2":
        assert attention._varlen_is_exact(torch.device("cuda", 0), torch.bfloat16, 64)
    rows, labelled = rows_and_labels()
    tree = build_tree(rows, labelled).to("cuda")
    with torch.no_grad():
        logits = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree).logits
        logps = token_logps(logits, tree.input_ids)
        for row, mask, found, kept in zip(rows, labelled, logps, tree.completion_mask[:, 1:], strict=True):
            ids = torch.tensor([row], device="cuda")
            expected = token_logps(model(input_ids=ids).logits, ids)[0][torch.tensor(mask[1:]).bool()]
            torch.testing.assert_close(found[kept.bool()], expected, rtol=0.02, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_is_exact_on_cuda(dtype, head_dim):
    """Forward and backward, with and without a window."""
    assert attention._varlen_is_exact(torch.device("cuda", 0), dtype, head_dim)
