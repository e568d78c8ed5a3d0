"""References and doors of rope_and_write, prefill and decode attention on a CPU, against transformers and brute
force.
"""

import pytest
import torch
from attention_cases import brute_force, poison, random_cache, random_tables, relative
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from pagoda.errors import ConfigError
from pagoda.kernels.decode_attention import decode_attention
from pagoda.kernels.kv_pack import read_kv
from pagoda.kernels.prefill_attention import prefill_attention
from pagoda.kernels.rope_cache import rope_and_write
from pagoda.layers.kv_schemes import KV_SCHEMES, StaticRanges, get_kv_scheme

CASES = [(4, 2, 32, 0, 0.0), (3, 1, 80, 9, 0.0), (6, 6, 16, 0, 5.0), (4, 2, 32, 70, 20.0)]  # H, K, D, window, soft cap


def angles(num_tokens, pairs):
    x = torch.rand(num_tokens, pairs) * 6
    return x.cos(), x.sin()


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize("case", CASES)
def test_decode_is_brute_force(scheme, case):
    heads, kv_heads, dim, window, softcap = case
    kv_lens = [1, 0, 64, 130, 17]
    table = random_tables(kv_lens, 4, 20)
    cache = poison(random_cache(scheme, 20, kv_heads, dim), kv_lens, table)
    q = torch.randn(len(kv_lens), heads, dim)
    out = decode_attention(q, cache, torch.tensor(kv_lens, dtype=torch.int32), table, dim**-0.5, window, softcap)
    assert not out[1].any()
    for row, kv_len in enumerate(kv_lens):
        if kv_len:
            want = brute_force(q[row : row + 1], [kv_len - 1], cache, table[row], dim**-0.5, window, softcap)
            assert relative(out[row : row + 1], want) < 1e-5


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize("case", CASES)
def test_prefill_is_brute_force(scheme, case):
    heads, kv_heads, dim, window, softcap = case
    query_lens, kv_lens = [1, 1, 3, 0, 20, 17], [20, 64, 3, 5, 80, 129]
    table = random_tables(kv_lens, 3, 20)
    cache = poison(random_cache(scheme, 20, kv_heads, dim), kv_lens, table)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    q = torch.randn(sum(query_lens), heads, dim)
    kv_len = torch.tensor(kv_lens, dtype=torch.int32)
    args = (q, cache, starts, kv_len, table, max(query_lens), dim**-0.5, window, softcap)
    out = prefill_attention(*args)
    torch.testing.assert_close(prefill_attention(*args, single_rows=2), out)
    on_device = (q, cache, starts.clamp(min=2), *args[3:])
    torch.testing.assert_close(prefill_attention(*on_device, single_len_R=kv_len * (torch.arange(6) < 2)), out)
    for row, (n, total) in enumerate(zip(query_lens, kv_lens)):
        mine = slice(starts[row], starts[row + 1])
        want = brute_force(q[mine], range(total - n, total), cache, table[row], dim**-0.5, window, softcap)
        assert relative(out[mine], want) < 1e-5 or n == 0


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_is_transformers(qk_norm):
    heads, kv_heads, dim, tokens = 4, 2, 32, 7
    cos, sin = angles(tokens, dim // 2)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    gains = [torch.rand(dim) + 0.5 for _ in "qk"] if qk_norm else [None, None]
    cache = random_cache("none", 3, kv_heads, dim, block_len=4)
    slot = torch.tensor([4, 5, -1, 7, 8, 9, 10])
    before = cache.k.clone()
    q = rope_and_write(qkv, cos, sin, slot, cache, heads, kv_heads, dim, *gains, 1e-6)
    x = qkv.view(1, tokens, -1, dim).transpose(1, 2)
    parts = list(x.split([heads, kv_heads, kv_heads], 1))
    for i, gain in enumerate(gains):
        if gain is not None:
            norm = Qwen3RMSNorm(dim, 1e-6)
            norm.weight.data = gain
            parts[i] = norm(parts[i])
    want_q, want_k = apply_rotary_pos_emb(
        parts[0], parts[1], torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    )
    torch.testing.assert_close(q, want_q[0].transpose(0, 1))
    for t, s in enumerate(slot.tolist()):
        if s >= 0:
            torch.testing.assert_close(cache.k[s // 4, :, s % 4], want_k[0, :, t])
            torch.testing.assert_close(cache.v[s // 4, :, s % 4], parts[2][0, :, t])
    torch.testing.assert_close(cache.k[1, :, 2], before[1, :, 2])  # slot -1 and all other places stay
    torch.testing.assert_close(cache.k[0], before[0])


def test_partial_rope_and_logn_scale():
    heads, kv_heads, dim, tokens = 2, 1, 16, 3
    cos, sin = angles(tokens, 4)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    cache = random_cache("none", 2, kv_heads, dim, block_len=4)
    grow = torch.tensor([1.0, 1.5, 2.0])
    q = rope_and_write(qkv, cos, sin, torch.tensor([4, 5, 6]), cache, heads, kv_heads, dim, q_scale_T=grow)
    x = qkv.view(tokens, -1, dim)[:, :heads]
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:8]], -1)) * torch.complex(cos, sin)[:, None]
    want = torch.cat([turned.real, turned.imag, x[..., 8:]], -1) * grow[:, None, None]
    torch.testing.assert_close(q, want)


@pytest.mark.parametrize(("scheme", "bound"), [("none", 1e-6), ("int8", 0.01), ("fp8", 0.04), ("int4", 0.12)])
def test_what_is_written_is_read_back(scheme, bound):
    kv_heads, dim = 2, 64
    cache = random_cache(scheme, 4, kv_heads, dim)
    qkv = torch.randn(100, 3 * kv_heads * dim)
    slot = torch.randperm(3 * 64)[:100] + 64
    one = torch.ones(100, 0)
    q = rope_and_write(qkv, one, one, slot, cache, kv_heads, kv_heads, dim)
    k, v = read_kv(cache, slot // 64)
    k, v = (x[torch.arange(100), :, slot % 64] for x in (k, v))
    raw_q, raw_k, raw_v = qkv.view(100, 3, kv_heads, dim).unbind(1)
    assert relative(v, raw_v.double()) < bound
    score, want = (q * k).sum(-1), (raw_q * raw_k).sum(-1)  # the basis may differ, scores may not
    assert relative(score, want.double()) < bound * 1.5


@pytest.mark.parametrize(("scheme", "lost"), [("int4", 0.5), ("int8", 0.05)])
def test_rotation_saves_keys_with_outlier_channels(scheme, lost):
    """Two channels 30 times the others, whose share in the scores is like the others'."""
    dim, tokens = 128, 256
    keys, queries = torch.randn(tokens, 1, dim), torch.randn(tokens, 1, dim)
    keys[..., [5, 77]] *= 30
    queries[..., [5, 77]] /= 30
    qkv = torch.cat([queries, keys, torch.randn(tokens, 1, dim)], 1).flatten(1)
    one = torch.ones(tokens, 0)
    error = {}
    for rotated in (False, True):
        cache = get_kv_scheme(scheme).allocate(5, 1, dim, 64, torch.float32, "cpu")
        if not rotated:
            cache.rotation = None
        q = rope_and_write(qkv, one, one, torch.arange(tokens) + 64, cache, 1, 1, dim)
        k, _ = read_kv(cache, torch.arange(1, 5))
        score = q[:, 0] @ k.permute(1, 0, 2, 3).flatten(1, 2)[0].T
        error[rotated] = relative(score, (queries[:, 0] @ keys[:, 0].T).double())
    assert error[False] > lost
    assert error[True] < 0.35 * error[False]


def test_sizes_of_blocks():
    none = KV_SCHEMES["none"].bytes_per_block(8, 128, 64, torch.bfloat16)
    assert none == 2 * 8 * 128 * 64 * 2
    for name, gain in (("int8", 1.9), ("fp8", 1.9), ("int4", 3.7)):
        scheme = KV_SCHEMES[name]
        cache = scheme.allocate(3, 8, 128, 64, torch.bfloat16, "cpu")
        tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
        held = sum(t.nbytes for t in tensors if t is not None)
        assert held == 3 * scheme.bytes_per_block(8, 128, 64, torch.bfloat16)
        assert none / (held / 3) >= gain


def test_static_int8_ranges():
    ranges = StaticRanges(
        torch.tensor([0.1, 0.2]), torch.tensor([3.0, 0.0]), torch.tensor([0.05, 0.1]), torch.tensor([0.0, -1.0])
    )
    cache = get_kv_scheme("int8").allocate(3, 2, 32, 64, torch.float32, "cpu", ranges)
    keys = torch.rand(10, 2, 32) * 20 - 10 + ranges.k_zero[:, None]
    values = torch.rand(10, 2, 32) * 10 - 5 + ranges.v_zero[:, None]
    one = torch.ones(10, 0)
    rope_and_write(torch.cat([keys, keys, values], 1).flatten(1), one, one, torch.arange(10) + 64, cache, 2, 2, 32)
    k, v = read_kv(cache, torch.tensor([1]))
    assert ((k[0, :, :10].transpose(0, 1) - keys).abs() <= ranges.k_scale[:, None] / 2 + 1e-5).all()
    assert ((v[0, :, :10].transpose(0, 1) - values).abs() <= ranges.v_scale[:, None] / 2 + 1e-5).all()


def test_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="int3"):
        get_kv_scheme("int3")
