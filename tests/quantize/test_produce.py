"""Quantized checkpoints: read by an independent reader, run by transformers, resumed, refused.

The oracle of every format is written here from its description, on numpy, without Pagoda's own (un)packing.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open

from pagoda.config import EngineConfig
from pagoda.errors import ModelError, UsageError
from pagoda.layers.parallel import Group
from pagoda.models.loader import load_model, resolve_spec
from pagoda.quantize.evaluate import Evaluator
from pagoda.quantize.moments import STAY, Moments
from pagoda.quantize.produce import Calibration, Source, calibrate, quantize_model
from pagoda.quantize.recipe import Recipe
from pagoda.quantize.rounding import SHARES, SHIFTS, encode, grid, round_groups, search_ranges
from pagoda.quantize.scales import ScaleSearch
from pagoda.quantize.statistics import LayerStats
from pagoda.quantize.walk import read_layer

SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "gemma2": lambda: hf.Gemma2Config(**{**SIZES, "tie_word_embeddings": True}, head_dim=16, query_pre_attn_scalar=16),
}
IDS = torch.randint(3, 131, (6, 48), generator=torch.Generator().manual_seed(1))


def checkpoint(folder: Path, family: str = "llama") -> Path:
    """A small model whose inputs have channels of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.3 * noise + (0 if family == "gemma2" else 1))
            if name.endswith("layernorm.weight"):
                p[::11] *= 8
    model.save_pretrained(folder)
    return folder


def source(folder: Path) -> Source:
    return Source(str(folder), Calibration(device="cpu"), ids=IDS)


def stored(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                t = file.get_tensor(name)
                tensors[name] = (t.float() if t.is_floating_point() else t).numpy()
    return tensors


def nibbles(words: np.ndarray, axis: int, order=range(8)) -> np.ndarray:
    """Value v of word w along `axis` is at 8 w + v; it lies in bits 4 p .. 4 p + 3 with order[p] = v."""
    words = words.view(np.uint32)
    shape = list(words.shape)
    shape[axis] *= 8
    out = np.zeros(shape, np.int64)
    for place, value in enumerate(order):
        at = [slice(None)] * words.ndim
        at[axis] = slice(value, None, 8)
        out[tuple(at)] = (words >> np.uint32(4 * place)) & 15
    return out


def meaning(tensors: dict[str, np.ndarray], module: str, recipe: Recipe) -> np.ndarray:
    """What a module's tensors say, [N, K] float32."""
    t = {n.removeprefix(module + "."): v for n, v in tensors.items() if n.startswith(module + ".")}
    if recipe.format == "compressed-tensors":
        return t["weight"].astype(np.float32) * t["weight_scale"].astype(np.float32)
    awq = recipe.format == "awq"
    order = (0, 2, 4, 6, 1, 3, 5, 7) if awq else range(8)
    q = nibbles(t["qweight"], 1 if awq else 0, order)
    zeros = nibbles(t["qzeros"], 1, order) + (0 if awq else 1)
    groups = np.arange(len(q)) // recipe.group if awq else t["g_idx"]
    return ((q - zeros[groups]).astype(np.float32) * t["scales"].astype(np.float32)[groups]).T


RECIPES = [Recipe("rtn", 32), Recipe("awq", 32), Recipe("gptq", 32), Recipe("gptq", 32, act_order=False),
           Recipe("awq-gptq", 32), Recipe("smooth"), Recipe("fp8"), Recipe("fp8", static=True)]  # fmt: skip


@pytest.mark.parametrize(("recipe", "family"), [*((r, "llama") for r in RECIPES), (Recipe("awq", 32), "phi3")])
def test_an_independent_reader_reads_the_same_weights(recipe, family, tmp_path):
    """Bit-equal to what our loader multiplies; and transformers with these weights computes what our engine does."""
    model = checkpoint(tmp_path / "model", family)
    produced = quantize_model(source(model), tmp_path / "out", recipe)
    assert len(produced.errors) == 2 and all(0 < e < 0.3 for row in produced.errors for e in row.values())
    spec, config = resolve_spec(tmp_path / "out", EngineConfig())
    weights = load_model(tmp_path / "out", spec, config, torch.device("cpu"), torch.float32, Group.single())
    tensors = stored(tmp_path / "out")
    fused = {
        "llama": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
        "phi3": [["qkv_proj"], ["gate_up_proj"]],
    }
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        for linear, room, names in (
            (layer.w_qkv, "self_attn", fused[family][0]),
            (layer.wo, "self_attn", ["o_proj"]),
            (layer.w_gate_up, "mlp", fused[family][1]),
            (layer.w_down, "mlp", ["down_proj"]),
        ):
            expected = np.concatenate([meaning(tensors, f"{at}{room}.{name}", recipe) for name in names])
            assert np.array_equal(linear.dequantize().numpy(), expected), (i, names)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_folded_scales_change_nothing(family, tmp_path):
    """Random scales through norm, v and up: the layer computes what it did."""
    origin = source(checkpoint(tmp_path, family))
    walk, h = origin.start()
    stats, layer = LayerStats(), read_layer(origin.weights, 1)
    walk.advance(layer, h, stats.watch)
    search = ScaleSearch(walk, layer, stats, lambda w: ("dense", {"weight": w}))
    for role in ("qkv", "o", "gate_up", "down"):
        random = torch.rand(layer.weight(role).shape[1], generator=torch.Generator().manual_seed(3)) * 3 + 0.2
        search._best = lambda role, candidates: next(iter(candidates))
        if role == "o":  # query heads of one kv head share their scales
            random = random.view(2, 2, 16)[:, :1].expand(2, 2, 16).reshape(-1)
        search.fold(role, [random])
    assert not torch.allclose(search.layer.weight("o"), layer.weight("o"))
    before, after = h.clone(), h.clone()
    walk.advance(layer, before)
    walk.advance(search.layer, after)
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4)
    again = LayerStats()
    walk.advance(search.layer, h, again.watch)
    for role in ("qkv", "o", "gate_up", "down"):  # statistics were rescaled along
        torch.testing.assert_close(stats[role].absmean, again[role].absmean, rtol=2e-3, atol=2e-4)


def test_transformers_agrees_with_the_folder(tmp_path):
    """The original module with the folder's tensors, unpacked, in place of its own: same logits as our engine's."""
    model, recipe = checkpoint(tmp_path / "model"), Recipe("awq", 32)
    quantize_model(source(model), tmp_path / "out", recipe)
    tensors, reference = stored(tmp_path / "out"), hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    state = reference.state_dict()
    for name in state:
        module = name.removesuffix(".weight")
        packed = f"{module}.qweight" in tensors
        state[name] = torch.tensor(meaning(tensors, module, recipe) if packed else tensors[name])
    reference.load_state_dict(state)
    from pagoda.engine.client import start_engine
    from pagoda.engine.request import EngineRequest, SamplingParams

    with start_engine(tmp_path / "out", EngineConfig(device="cpu", cache_block_seq_len=8), inline=True) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = list(engine.submit(EngineRequest("a", IDS[0].tolist(), params)))
    with torch.no_grad():
        logprobs = reference(IDS[:1]).logits[0].float().log_softmax(-1)
    expected = logprobs[:-1].gather(1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor([e.logprob for e in output.prompt_logprobs[1:]]), expected, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("method", ["awq", "gptq", "smooth"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(method, tmp_path):
    model, recipe = checkpoint(tmp_path / "model"), Recipe(method, 32)
    quantize_model(source(model), tmp_path / "whole", recipe)

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source(model), tmp_path / "parts", recipe, progress=stop)
    with pytest.raises(UsageError, match="other settings"):
        quantize_model(source(model), tmp_path / "parts", Recipe(method, 32), {"samples": 3})
    resumed = quantize_model(source(model), tmp_path / "parts", recipe)
    assert len(resumed.errors) == 2
    files = sorted(p.name for p in (tmp_path / "whole").glob("model*"))
    assert len(files) == 4  # two layers, the rest, the index
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    with pytest.raises(UsageError, match="holds a model already"):
        quantize_model(source(model), tmp_path / "whole", recipe)


def test_sizes_that_no_group_divides_are_refused(shared_data, tmp_path):
    odd = Source(str(shared_data / "models" / "stories260k-llama"), Calibration(device="cpu"), ids=IDS)
    with pytest.raises(ModelError, match=r"ffn size of 172 .* --method smooth or fp8"):
        quantize_model(odd, tmp_path / "out", Recipe("awq", 32))
    with pytest.raises(ModelError, match="use --group-size 32"):
        quantize_model(source(checkpoint(tmp_path / "model")), tmp_path / "out", Recipe("awq", 128))
    assert not (tmp_path / "out").exists()
    quantize_model(source(tmp_path / "model"), tmp_path / "done", Recipe("rtn", 32))
    with pytest.raises(UsageError, match="quantized already"):
        source(tmp_path / "done")


def test_methods_beat_rounding_on_the_output(tmp_path):
    """AWQ and GPTQ leave less error than rounding to nearest, on channels of unequal size."""
    model, errors = checkpoint(tmp_path / "model"), {}
    for method in ("rtn", "awq", "gptq", "awq-gptq"):
        errors[method] = quantize_model(source(model), tmp_path / method, Recipe(method, 32)).errors
    for role in ("qkv", "gate_up", "down"):
        assert errors["awq"][0][role] < errors["rtn"][0][role]
        assert errors["gptq"][0][role] < 0.7 * errors["rtn"][0][role]
    for role in ("qkv", "o", "gate_up", "down"):  # errors add up from layer to layer unless they are made good
        assert all(errors[m][1][role] < 0.8 * errors["rtn"][1][role] for m in ("awq", "gptq", "awq-gptq"))


def test_ranges_are_the_best_of_their_grid():
    """Brute force: with the ranges of all other groups as they ended, no other range of a group gives less error."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(3, 64, generator=generator) ** 3
    x = (torch.randn(40, 64, generator=generator) + 1) * torch.linspace(0.1, 3, 64)
    codes = search_ranges(w, x.T @ x, 32)
    assert torch.equal(codes.values(), values_of(codes, w))
    found = ((codes.values() - w) @ x.T).square().sum(1)
    assert found.sum() < 0.6 * ((round_groups(w, 32).values() - w) @ x.T).square().sum()
    last = w[:, None, 32:]  # the group that was searched last
    for share, shift in itertools.product(SHARES, SHIFTS):
        scales, zeros = grid(last, share)
        zeros = (zeros.int() + shift).clamp(0, 15)
        values = codes.values()
        values[:, 32:] = ((encode(last, scales, zeros).float() - zeros[..., None]) * scales.float()[..., None])[:, 0]
        assert (((values - w) @ x.T).square().sum(1) >= found * (1 - 1e-4)).all(), (share, shift)


def values_of(codes, w_NK):
    """Each weight at the nearest level of its group."""
    levels = (torch.arange(16) - codes.zeros_NG[..., None].float()) * codes.scales_NG[..., None].float()
    levels = levels.repeat_interleave(w_NK.shape[1] // levels.shape[1], 1)
    return levels.gather(2, (levels - w_NK[..., None]).abs().argmin(2, keepdim=True))[..., 0]


def test_a_matrix_makes_good_the_errors_before_it():
    """The target is the damped least-squares solution by lstsq; without errors before it, the matrix itself."""
    generator = torch.Generator().manual_seed(5)
    w, y = torch.randn(7, 24, generator=generator), torch.randn(90, 24, generator=generator)
    x = y + 0.3 * torch.randn(90, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    moments = Moments.of(zip(y.split(30), x.split(30)))
    hold = (STAY * x.square().sum(0).mean()).sqrt().double() * torch.eye(24, dtype=torch.float64)
    right = torch.cat([(y @ w.T).double(), hold @ w.double().T])
    expected = torch.linalg.lstsq(torch.cat([x.double(), hold]), right).solution.T
    torch.testing.assert_close(moments.target(w), expected.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(Moments.of([(y, y)]).target(w), w, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_inputs(tmp_path):
    """Against hooks on transformers' own modules; keys and values against its cache."""
    model = checkpoint(tmp_path)
    files = calibrate(source(model))
    reference, seen = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), {}
    layer = reference.model.layers[1]
    modules = {"qkv": layer.self_attn.q_proj, "o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
    for role, module in modules.items():
        module.register_forward_hook(lambda m, args, out, role=role: seen.__setitem__(role, (args[0], out)))
    with torch.no_grad():
        cache = reference(IDS, use_cache=True).past_key_values
    for role in modules:
        x = seen[role][0].flatten(0, 1)
        ours = {k: files["inputs_stats"][f"layers.1.{role}.{k}"] for k in ("min", "max", "mean", "absmax", "absmean")}
        theirs = {"min": x.amin(0), "max": x.amax(0), "mean": x.mean(0), "absmax": x.abs().amax(0)}
        for key, value in (theirs | {"absmean": x.abs().mean(0)}).items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        files["outputs_stats"]["layers.1.down.max"], seen["down"][1].flatten(0, 1).amax(0), rtol=1e-3, atol=1e-4
    )
    keys = cache.layers[1].keys.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(files["key_stats"]["layers.1.max"], keys.amax(0), rtol=1e-3, atol=1e-4)
    assert files["value_stats"]["layers.1.absmax"].shape == (2, 16)


def test_config_says_what_the_folder_holds(tmp_path):
    quantize_model(source(checkpoint(tmp_path / "model")), tmp_path / "out", Recipe("awq", 32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert config["quantization_config"] == expected and config["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq", "awq-gptq"])
@pytest.mark.parametrize("start", [0, 80000, 200000])
@pytest.mark.parametrize(
    ("model", "text", "chars", "lines", "dense", "nearest"),
    [
        ("babyllama361-llama", "tinystories_a.txt", 20000, False, 2.20453, 2.26172),
        ("zhpoem750k-llama", "zh_tang_poems_val.txt", 6000, True, 132.87733, 137.10872),
    ],
)
def test_int4_keeps_the_perplexity_of_trained_models(
    shared_data, tmp_path, model, text, chars, lines, dense, nearest, start, method
):
    """At most 60% of the gap that rounding to nearest leaves (recorded beside the models), whichever of three texts
    it is calibrated on; none of them is scored."""
    content = (shared_data / "text" / text).read_text()
    rest = content[chars:]
    if lines and start:  # there are few held-out poems: others then
        poems = [p["content"] for p in json.loads((shared_data / "text" / "zh_tang_poems.json").read_text())[:1500]]
        poems = [p for p in poems if p[:8] not in content[:chars]]
        rest = "\n".join(poems[start // 400 : start // 400 + 300])
    part = rest if lines else rest[start : start + 80000]
    rows = [{"text": line} for line in part.splitlines()] if lines else [{"text": part}]
    (tmp_path / "calib.jsonl").write_text("\n".join(map(json.dumps, rows)))
    calibration = Calibration(str(tmp_path / "calib.jsonl"), 64, 256, "cpu")
    quantize_model(Source(str(shared_data / "models" / model), calibration), tmp_path / "out", Recipe(method, 32))
    config = EngineConfig(device="cpu", dtype="float32", cache_block_seq_len=8, max_batch_size=8)
    with Evaluator(tmp_path / "out", config) as evaluator:
        ours = (evaluator.lines if lines else evaluator.text)(content[:chars]).perplexity
    assert ours - dense <= 0.6 * (nearest - dense)
