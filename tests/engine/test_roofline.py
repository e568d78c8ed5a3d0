"""Plans by arithmetic against what loaders and executors really hold, and against limits worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from pagoda.cli.main import main
from pagoda.config import EngineConfig
from pagoda.engine import roofline
from pagoda.kernels.int4_layout import pack_tiles
from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.models.decoder import build_program
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.loader import load_model
from pagoda.models.local_weights import LocalMatrix, open_weights
from pagoda.models.spec import read_spec, spec_from_config

CPU = torch.device("cpu")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("scheme", ["auto", "int8", "fp8"])
def test_weights_are_as_large_as_those_that_load(tiny_llama: Path, scheme: str, tp: int) -> None:
    config = EngineConfig(device="cpu", weight_format=scheme, tp=tp)
    spec = read_spec(tiny_llama, config)
    held = 0
    for item in open_weights(tiny_llama, spec, config, 0, tp, CPU):
        if isinstance(item, LocalMatrix):
            linear = Linear.pack(item.role, item.scheme, item.tensors, None, item.in_features, CPU, torch.float32)
            held += sum(t.nbytes for t in linear.tensors.values())
        elif item.name == "embed.weight":
            held += item.tensor.nbytes
    assert roofline.weight_bytes(spec, tp, 4) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(("n", "k", "group"), [(64, 128, 128), (200, 96, 32), (130, 320, 64)])
def test_four_bit_matrices_are_as_large_as_their_layout(n: int, k: int, group: int) -> None:
    q, scales = torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, k // group)
    packed = pack_tiles(q, scales, scales.to(torch.uint8), False, torch.bfloat16)
    assert roofline._matrix_bytes("int4", group, n, k, 2) == sum(t.nbytes for t in packed.values())


@pytest.mark.parametrize("policy", ["none", "int8", "int4", "fp8"])
def test_blocks_are_as_large_as_an_executors(tiny_llama: Path, policy: str) -> None:
    config = EngineConfig(device="cpu", quant_policy=policy, session_len=256, max_batch_size=4)
    spec, group = read_spec(tiny_llama, config), Group.single()
    program = build_program(spec, load_model(tiny_llama, spec, config, CPU, torch.float32, group), group)
    block = EagerExecutor(program, config, CPU, torch.float32, group).bytes_per_block()
    found = roofline.predict(spec, config, "h200", 16)
    assert found.memory.block_bytes == block
    assert found.memory.num_tokens >= 4 * 256 and found.fits


def test_limits_are_those_of_the_performance_page() -> None:
    """Llama-3.1-8B on an H200: 308 tokens a second alone, 15,000 in a batch of 64 at 576 tokens; 45,670 of prompt."""
    spec = spec_from_config(LLAMA_8B)
    alone = roofline.predict(spec, EngineConfig(session_len=256, max_batch_size=1), "h200", 128)
    assert alone.limit_tokens_per_second == pytest.approx(308, rel=0.01)
    assert alone.tokens_per_second == pytest.approx(243.3, rel=0.1)  # W1 of A
    four = roofline.predict(spec, EngineConfig(session_len=256, max_batch_size=1, weight_format="int4"), "h200", 128)
    assert four.tokens_per_second == pytest.approx(441, rel=0.25)  # W1 of A4
    batch = roofline.predict(spec, EngineConfig(session_len=576, max_batch_size=64), "h200", 128)
    assert batch.limit_tokens_per_second == pytest.approx(15000, rel=0.05)
    long = roofline.predict(spec, EngineConfig(session_len=4096, max_batch_size=1), "h200", 4096)
    assert 4096 / long.limit_first_token_seconds == pytest.approx(45670, rel=0.02)
    both = roofline.predict(spec, EngineConfig(session_len=256, max_batch_size=1, tp=2), "h200", 128)
    assert 1.3 < both.tokens_per_second / alone.tokens_per_second < 2
    assert both.memory.weight_bytes == pytest.approx(alone.memory.weight_bytes / 2, rel=0.01)


def test_the_command_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = {**LLAMA_8B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
             "intermediate_size": 28672}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(large))

    def plan(*flags: str) -> dict:
        assert main(["plan", str(tmp_path), "--json", "--context", "8192", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    one = plan("--gpu", "h100")
    assert not one["fits"] and "131" in one["error"]
    needed = one["smallest_of_this_gpu"]
    assert plan("--gpu", "h100", "--tp", str(needed["tp"]))["fits"]
    assert not plan("--gpu", "h100", "--tp", str(needed["tp"] - 1))["fits"]
    few = plan("--gpu", "h200", "--tp", "2", "--concurrency", "256")
    assert not few["fits"] and few["running"] == few["sessions_that_fit"] < 256
    assert plan("--gpu", "h200", "--weight-format", "int4", "--concurrency", "4")["fits"]
    assert main(["plan", "mini", "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    assert "64 are wanted: fits" in said and "tokens/s" in said
    assert main(["plan", "mini", "--gpu", "gameboy"]) == 2
    assert "h200" in capsys.readouterr().err
