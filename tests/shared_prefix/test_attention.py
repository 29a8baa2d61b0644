"""Compares decoders on a prefix tree with the same decoders on separate sequences."""

import copy
import functools
import inspect
import pickle
import random
import re
import sys
import types

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from stepdpo_trl.shared_prefix import attention
from stepdpo_trl.shared_prefix.forward import share_prefixes
from stepdpo_trl.shared_prefix.support import TESTED_MODEL_TYPES
from stepdpo_trl.shared_prefix.tree import build_tree

from .architectures import SHARED, VOCABULARY, tiny_decoder

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0])  # weights of the rows in the differentiated sum


def rows_and_labels():
    """Return two problems with a common prefix and two answers each, longer than the windows of the models."""
    draw = random.Random(0)
    first = [draw.randrange(3, VOCABULARY) for _ in range(9)]
    second = first[:6] + [draw.randrange(3, VOCABULARY) for _ in range(7)]
    rows, labels = [], []
    for prompt, length in ((first, 4), (second, 2), (first, 6), (second, 8)):
        rows.append(prompt + [draw.randrange(3, VOCABULARY) for _ in range(length)])
        labels.append([0] * len(prompt) + [1] * length)
    return rows, labels


def token_logps(logits, input_ids):
    return logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]


def separate(model):
    """Return the log-probabilities of the labeled tokens of each row, computed one row at a time."""
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
def test_windows_have_an_effect(name):
    """Without an effect, the comparison with separate sequences would not test them."""
    model, wide = tiny_decoder(name), tiny_decoder(name, sliding_window=64)
    wide.load_state_dict(model.state_dict())
    assert max((a - b).abs().max() for a, b in zip(separate(model), separate(wide), strict=True)) > 0.01


def test_all_supported_model_types_are_tested():
    assert {name.split()[0] for name in SHARED} == set(TESTED_MODEL_TYPES)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_load_balance_of_experts(name):
    """The load balancing loss weights each token by the number of rows that contain it."""
    model = tiny_decoder(name)
    share_prefixes(model)
    rows, labels = rows_and_labels()
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    for tree in (build_tree(rows, labels), build_tree(rows, labels, 24), build_tree(rows, labels).padded(3)):
        output = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree, output_router_logits=True)
        torch.testing.assert_close(output.aux_loss, expected, rtol=1e-5, atol=0)


def test_model_without_a_tree_is_unchanged():
    model = tiny_decoder("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    share_prefixes(model)
    wrapped = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)  # as profilers do
    share_prefixes(model)  # no effect
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    assert torch.equal(tiny_decoder("llama")(input_ids=ids).logits, before)  # other models are unchanged


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_unwrapped_attention_function_raises(name, monkeypatch):
    """A function that is set later ignores the tree and must not attend to all of its tokens."""
    model = tiny_decoder("llama", attn_implementation="sdpa" if name == "eager" else "eager")
    share_prefixes(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", unwrapped(modeling_llama.eager_attention_forward))
    model.set_attn_implementation(name)
    with pytest.raises(RuntimeError, match="size"):
        shared(model)


def unwrapped(attention):
    return getattr(attention, "attention", attention)


def test_eager_attention_of_other_architectures_is_unchanged():
    """Each architecture has its own eager attention, which a registered function would override."""
    share_prefixes(tiny_decoder("gemma2"))
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None
    assert modeling_phi3.eager_attention_forward is unwrapped(modeling_phi3.eager_attention_forward)


def test_copies():
    """A deep copy uses its own weights, and an unpickled copy can be wrapped again."""
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


def test_activations_of_one_pack_are_kept():
    """The forward pass keeps the tensors of one pack for the backward, not those of all packs."""
    model = tiny_decoder("llama")
    share_prefixes(model)
    kept = {}
    for max_tokens in (None, 24):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            shared(model, max_tokens)
        kept[max_tokens] = sum(sizes)
    assert kept[24] < 0.75 * kept[None]


# ------------------------------------------------------------------------------------------------ kernels


def varlen_oracle(query, key, value, query_offsets, key_offsets, max_q, max_k, *, scale, window_size, enable_gqa):
    """Reference for PyTorch's kernel, computed per query. Tensors have shape `(tokens, heads, head_dim)`."""
    assert enable_gqa
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    left, right = window_size
    outputs = []
    for q0, q1, k0, k1 in zip(query_offsets, query_offsets[1:], key_offsets, key_offsets[1:], strict=False):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        for i in range(q1 - q0):
            position = (k1 - k0) - (q1 - q0) + i
            first = k0 if left < 0 else k0 + max(0, position - left)
            visible = slice(first, k0 + position + right + 1)
            scores = torch.einsum("hd,khd->hk", query[q0 + i], key[visible]) * scale
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[visible]))
    return torch.stack(outputs)


def replace_kernel(monkeypatch, kernel):
    """Let PyTorch's module have this kernel; `None` removes the module, as in PyTorch before 2.10."""
    module = kernel and types.SimpleNamespace(varlen_attn=kernel)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attention._varlen_is_exact.cache_clear()


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo3", "qwen3_moe"])
def test_variable_length_kernel(name, monkeypatch):
    """The kernel gets the right arguments. On CPU it is replaced by the reference."""
    replace_kernel(monkeypatch, varlen_oracle)
    monkeypatch.setattr(attention, "_supports_varlen", lambda query, **kwargs: True)
    model = tiny_decoder(name)
    share_prefixes(model)
    assert_equal(model)


def flash_oracle(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """Stand-in for a FlashAttention function of Transformers, which takes offsets in addition to the tensors."""
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
    """The FlashAttention path is selected by name. On CPU the kernel is replaced by the reference."""
    model = tiny_decoder(name)
    expected = separate(model)
    AttentionInterface.register("flash_oracle", flash_oracle)
    model.config._attn_implementation = "flash_oracle"
    share_prefixes(model)
    for one, other in zip(shared(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_exactness_of_the_kernel_is_checked(monkeypatch, caplog):
    """The kernel must align the last query with the last key; one that aligns the first ones is not used."""

    def upper_left(query, key, value, query_offsets, key_offsets, *args, **kwargs):
        shifted = [key[k0 : k0 + q1 - q0] for q0, q1, k0 in zip(query_offsets, query_offsets[1:], key_offsets)]  # noqa: B905
        values = [value[k0 : k0 + q1 - q0] for q0, q1, k0 in zip(query_offsets, query_offsets[1:], key_offsets)]  # noqa: B905
        shifted, values = torch.cat(shifted), torch.cat(values)
        return varlen_oracle(query, shifted, values, query_offsets, query_offsets, *args, **kwargs)

    for kernel, exact in ((varlen_oracle, True), (upper_left, False)):
        scaled = functools.partial(with_default_scale, kernel)
        scaled.__signature__ = inspect.signature(varlen_oracle)
        replace_kernel(monkeypatch, scaled)
        assert attention._varlen_is_exact(torch.device("cpu"), torch.float32, 16) is exact
    attention._varlen_is_exact.cache_clear()
    assert "variable-length attention differs from masked attention" in caplog.text


def test_kernel_without_support_for_the_device(caplog):
    pytest.importorskip("torch.nn.attention.varlen", reason="torch<2.10 has no variable-length attention")
    attention._varlen_is_exact.cache_clear()
    assert not attention._varlen_is_exact(torch.device("cpu"), torch.float32, 16)
    assert re.search("variable-length attention (does not run|with grouped heads and windows)", caplog.text)


@pytest.mark.parametrize("kernel", [None, lambda query, key, value: query])
def test_torch_without_the_kernel(kernel, monkeypatch, caplog):
    replace_kernel(monkeypatch, kernel)
    assert not attention._varlen_is_exact(torch.device("cpu"), torch.float32, 16)
    assert "Install torch>=2.12" in caplog.text
    attention._varlen_is_exact.cache_clear()
    attention._varlen_is_exact.cache_clear()


def with_default_scale(kernel, query, *args, scale=None, **kwargs):
    return kernel(query, *args, scale=scale or query.shape[-1] ** -0.5, **kwargs)


def test_inputs_of_the_kernel():
    query = torch.zeros(1, 4, 3, 64, dtype=torch.bfloat16)
    assert not attention._supports_varlen(query)  # on CPU
    assert attention._autocast_dtype(query.float()) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention._autocast_dtype(query.float()) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_equals_separate_sequences_on_cuda(name):
    """In bfloat16, up to rounding."""
    sizes = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
    model = tiny_decoder(name, **sizes).to("cuda", torch.bfloat16)
    share_prefixes(model)
    if name != "gemma2":
        assert attention._varlen_is_exact(torch.device("cuda", 0), torch.bfloat16, 64)
    rows, labels = rows_and_labels()
    tree = build_tree(rows, labels).to("cuda")
    with torch.no_grad():
        logits = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree).logits
        logps = token_logps(logits, tree.input_ids)
        for row, mask, found, kept in zip(rows, labels, logps, tree.completion_mask[:, 1:], strict=True):
            ids = torch.tensor([row], device="cuda")
            expected = token_logps(model(input_ids=ids).logits, ids)[0][torch.tensor(mask[1:]).bool()]
            torch.testing.assert_close(found[kept.bool()], expected, rtol=0.02, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_is_exact_on_cuda(dtype, head_dim):
    """Forward and backward, with and without a window."""
    assert attention._varlen_is_exact(torch.device("cuda", 0), dtype, head_dim)
