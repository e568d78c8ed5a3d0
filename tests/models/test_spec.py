"""config.json -> ModelSpec: real configs, transformers' rope numbers, shards that add up, refusals in one sentence."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, ConfigError, ModelError
from pagoda.models.families import FAMILIES
from pagoda.models.sharding import ZERO, shard_heads
from pagoda.models.spec import read_spec, spec_from_config, spec_from_json

KNOWN_CONFIGS = {
    "Baichuan2-7B", "Llama-2-7b-chat-hf", "Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Meta-Llama-3.1-70B",
    "Meta-Llama-3.1-8B", "Mistral-7B-Instruct-v0.2", "Phi-3-mini-128k-instruct", "Qwen-7B-Chat", "Qwen1.5-7B-Chat",
    "Qwen2-1.5B-Instruct", "Qwen2-7B-Instruct", "Qwen2.5-7B-Instruct", "Qwen3-0.6B", "Qwen3-32B-FP8", "Qwen3-8B",
    "Yi-6B-Chat", "gemma-2-2b", "internlm-20b", "internlm2-chat-1_8b", "internlm2_5-7b-chat",
}  # fmt: skip
LACKS = {
    "DeepSeek-V2-Lite-Chat": "latent attention", "DeepSeek-V3": "mixture-of-experts", "InternVL2-2B": "vision",
    "InternVL2-4B": "vision", "Mixtral-8x7B-v0.1": "mixture-of-experts", "chatglm2-6b": "half rotary",
    "Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4": "mixture-of-experts", "Qwen2-VL-2B-Instruct-AWQ": "vision",
    "Qwen3-30B-A3B": "mixture-of-experts", "Qwen3-30B-A3B-FP8": "mixture-of-experts", "chatglm3-6b": "half rotary",
    "gemma-3-4b": "vision", "gpt-oss-20b": "mixture-of-experts",
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 100, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def llama(**changes) -> dict:
    return {**LLAMA, **changes}


def test_every_real_config_parses_or_is_refused_by_name(shared_data: Path):
    folders = sorted((shared_data / "configs").iterdir())
    assert {f.name for f in folders} == KNOWN_CONFIGS | set(LACKS)
    for folder in folders:
        values = json.loads((folder / "config.json").read_text())
        if folder.name in KNOWN_CONFIGS:
            spec = read_spec(folder, EngineConfig())
            assert spec.hidden_size == values["hidden_size"] and len(spec.windows) == values["num_hidden_layers"]
            assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
        else:
            with pytest.raises(ModelError) as e:
                read_spec(folder, EngineConfig())
            assert values["architectures"][0] in str(e.value) and LACKS[folder.name] in str(e.value)


def test_details_of_real_configs(shared_data: Path):
    def spec(name):
        return read_spec(shared_data / "configs" / name, EngineConfig())

    gemma = spec("gemma-2-2b")
    assert gemma.windows[:3] == (4096, 0, 4096) and gemma.attn_softcap == 50 and gemma.final_softcap == 30
    assert gemma.tied_embeddings and gemma.attn_scale == 256**-0.5 and gemma.act == "gelu_tanh" and gemma.post_norms
    assert gemma.embed_scale == math.sqrt(2304)
    qwen = spec("Qwen-7B-Chat")
    assert qwen.ffn_size == 11008 and qwen.logn_len == 512 and qwen.rope.stepped and qwen.qkv_bias and not qwen.o_bias
    assert [qwen.rope.variant(n) for n in (512, 513, 1024, 1025)] == [0, 3 * 512, 3 * 512, 7 * 512]
    fp8 = spec("Qwen3-32B-FP8")
    assert fp8.quant.scheme == "fp8" and fp8.quant.block == (128, 128) and fp8.qk_norm and fp8.head_dim == 128
    assert spec("Mistral-7B-Instruct-v0.2").windows == (0,) * 32 and spec("Qwen2.5-7B-Instruct").windows == (0,) * 28
    assert (
        spec("internlm2_5-7b-chat").rope.kind == "dynamic" and spec("internlm-20b").rope.original_max_position == 4096
    )
    assert spec("Llama-3.2-1B-Instruct").eos_ids == (128001, 128008, 128009)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": 1.25},
    YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0, 1.1, 1.2, 1.3],
     "long_factor": [1.0, 2.0, 3.0, 4.0]},
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0] * 4,
     "long_factor": [2.0] * 4, "attention_factor": 1.5},
    {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("new_form", [True, False])
def test_rope_numbers_are_those_of_transformers(rope, new_form):
    given = {**rope, "rope_theta": 5000.0}
    theirs = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"}, rope_parameters=dict(given))
    if new_form:
        values = llama(rope_parameters=given)
    else:
        old = {("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "partial_rotary_factor"}
        values = llama(
            rope_scaling=old, rope_theta=5000.0, partial_rotary_factor=rope.get("partial_rotary_factor", 1.0)
        )
    ours = spec_from_config(values).rope
    assert (
        ours.kind == rope["rope_type"]
        and ours.theta == 5000.0
        and ours.dim == int(8 * rope.get("partial_rotary_factor", 1))
    )
    if ours.kind == "default":
        return
    _, attention_factor = ROPE_INIT_FUNCTIONS[ours.kind](theirs, "cpu")
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    expected_original = {"linear": 64, "dynamic": 64}.get(ours.kind, rope.get("original_max_position_embeddings"))
    assert ours.original_max_position == expected_original
    long_freq, _ = ROPE_INIT_FUNCTIONS[ours.kind](theirs, "cpu", seq_len=100)
    if ours.kind == "dynamic":  # the documented formula of the contract, with the length that `variant` gives
        n = ours.variant(100)
        base = ours.theta * (ours.factor * n / ours.original_max_position - (ours.factor - 1)) ** (
            ours.dim / (ours.dim - 2)
        )
        torch.testing.assert_close(long_freq, base ** -(torch.arange(0, ours.dim, 2) / ours.dim))
    if ours.kind == "longrope":
        assert ours.variant(16) == 0 and ours.variant(17) == 1
        plain = ours.theta ** -(torch.arange(0, ours.dim, 2) / ours.dim)
        torch.testing.assert_close(long_freq, plain / torch.tensor(ours.long_factor))


def test_phi3_calls_longrope_su():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    values = llama(architectures=["Phi3ForCausalLM"], original_max_position_embeddings=16, pad_token_id=0)
    new_form = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    theirs = Phi3Config(**{k: v for k, v in values.items() if k != "architectures"}, rope_parameters=new_form)
    values["rope_scaling"] = {"type": "su", **factors}
    ours = spec_from_config(values).rope
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu")
    assert ours.kind == "longrope" and ours.factor == 4.0
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("arch", ["Qwen2ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("explicit", [True, False])
def test_windows_are_those_of_transformers(arch, explicit, tmp_path):
    values = llama(architectures=[arch], model_type=FAMILIES[arch].name, sliding_window=7, num_hidden_layers=5)
    if arch.startswith("Qwen"):
        values |= {"use_sliding_window": True, "max_window_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoConfig.from_pretrained(tmp_path)
    if explicit:  # as transformers 5 writes it
        theirs.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [arch]}
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 5
    assert spec_from_config(values).windows == tuple(7 if t == "sliding_attention" else 0 for t in types)


@given(kv=st.integers(1, 9), group=st.integers(1, 9), size=st.integers(1, 9))
def test_every_head_lies_on_exactly_one_rank_beside_its_own_keys(kv, group, size):
    seen: list[int] = []
    shapes = set()
    for rank in range(size):
        q_heads, kv_heads = shard_heads(kv * group, kv, rank, size)
        shapes.add((len(q_heads), len(kv_heads)))
        per_kv = len(q_heads) // len(kv_heads)
        assert len(q_heads) % len(kv_heads) == 0
        for i, head in enumerate(q_heads):
            if head != ZERO:
                assert kv_heads[i // per_kv] == head // group
        seen += [h for h in q_heads if h != ZERO]
    assert sorted(seen) == list(range(kv * group)) and len(shapes) == 1
    if size == 1:
        assert shapes == {(kv * group, kv)} and seen == list(range(kv * group))


def test_shards_cover_ffn_and_vocabulary():
    spec = spec_from_config(llama(intermediate_size=172, vocab_size=361))
    for size in (1, 2, 3, 4, 8):
        shapes = [spec.shard(rank, size) for rank in range(size)]
        assert sum(s.ffn_valid for s in shapes) == 172 and sum(s.vocab_valid for s in shapes) == 361
        assert all(s.ffn_size == shapes[0].ffn_size and s.vocab_rows == shapes[0].vocab_rows for s in shapes)
        assert [s.ffn_start for s in shapes] == [min(172, r * shapes[0].ffn_size) for r in range(size)]
    assert spec.shard(0, 1).ffn_size == 172 and spec.shard(0, 1).vocab_rows == 361


def test_overrides_of_the_engine():
    spec = spec_from_config(LLAMA, EngineConfig(rope_scaling_factor=2.0, use_logn_attn=True))
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_max_position, spec.logn_len) == (
        "dynamic",
        2.0,
        64,
        64,
    )
    with pytest.raises(ConfigError, match="rope_scaling_factor"):
        spec_from_config(llama(rope_scaling=ROPES[3]), EngineConfig(rope_scaling_factor=2.0))


def test_internlm_spellings():
    base = llama(architectures=["InternLMForCausalLM"])
    spec = spec_from_config(base | {"bias": True})
    assert spec.qkv_bias and spec.o_bias and spec.rope.kind == "dynamic" and spec.rope.factor == 1.0
    assert spec_from_config(base | {"bias": False, "rotary": {"base": 500, "type": "origin"}}).rope.theta == 500
    with pytest.raises(ModelError, match="rotary"):
        spec_from_config(base | {"rotary": {"base": 500, "type": "odd"}})
    spec = spec_from_config(llama(architectures=["InternLM3ForCausalLM"], qkv_bias=True, bias=False))
    assert spec.qkv_bias and not spec.o_bias and not spec.mlp_bias


BAD = [
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "mrope"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0, "long_factor": [1.0]}}, "short_factor"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_size": 33}, "hidden_size"),
    ({"vocab_size": -5}, "vocab_size"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"torch_dtype": "int3"}, "torch_dtype"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"alibi": True}, "ALiBi"),
    ({"sliding_window": 128}, "sliding_window"),
    ({"architectures": ["BaichuanForCausalLM"], "hidden_size": 5120}, "ALiBi"),
    ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "both directions"),
    ({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": True}, "mlp_bias"),
    ({"architectures": ["WonderForCausalLM"]}, "WonderForCausalLM"),
    ({"architectures": None}, "architectures"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 128}}, "bits"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}}, "version"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128}}, "bits"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "word"), BAD, ids=lambda v: str(v)[:60])
def test_bad_values_are_named_in_one_sentence(change, word):
    with pytest.raises(ModelError, match=word) as e:
        spec_from_config(llama(**change))
    assert "\n" not in str(e.value)


def test_missing_or_damaged_folder(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        read_spec(tmp_path / "nothing", EngineConfig())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path, EngineConfig())
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="JSON"):
        read_spec(tmp_path, EngineConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="architectures"):
        read_spec(tmp_path, EngineConfig())


def test_unknown_keys_are_reported(caplog):
    spec_from_config(llama(surprise=3, initializer_range=0.1))
    assert "surprise" in caplog.text and "initializer_range" not in caplog.text


def test_generation_config_names_the_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_spec(tmp_path, EngineConfig()).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_spec(tmp_path, EngineConfig()).eos_ids == (2, 7)


def test_quantizations_that_are_read():
    def quant(**given):
        return spec_from_config(llama(quantization_config=given)).quant

    awq = quant(
        quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm", modules_to_not_convert=["a"]
    )
    assert (awq.scheme, awq.group_size, awq.zero_point, awq.skip) == ("int4", 128, True, ("a",))
    gptq = quant(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=False)
    assert gptq.act_order and gptq.zero_point and gptq.layout == "gptq"

    def compressed(weights, inputs, layout):
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return quant(
            quant_method="compressed-tensors", format=layout, config_groups={"group_0": group}, ignore=["lm_head"]
        )

    w4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
    assert compressed(w4, None, "pack-quantized").scheme == "int4"
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    per_token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    assert compressed(eight, per_token, "int-quantized").scheme == "int8"
    floats = {"num_bits": 8, "type": "float", "strategy": "channel"}
    assert compressed(floats, per_token | {"type": "float"}, "float-quantized").scheme == "fp8"
    with pytest.raises(ModelError, match="compressed-tensors"):
        compressed(w4 | {"num_bits": 2}, None, "pack-quantized")
