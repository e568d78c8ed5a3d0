"""Fixed ranges of an int8 cache, and an int4 cache on a model whose keys have outlier channels."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pagoda
from pagoda.cli.main import main
from pagoda.config import EngineConfig
from pagoda.layers import kv_schemes
from pagoda.models.spec import read_spec
from pagoda.models.workspace_weights import read_kv_ranges
from pagoda.quantize.evaluate import Evaluator
from pagoda.quantize.kv_ranges import ranges

MINI = Path(pagoda.__file__).parent / "mini"


def calibrated(tmp_path: Path, model: Path, *more: str) -> Path:
    """The user's road: calibrate, convert, kv_qparams."""
    calib = ["--calib_samples", "4", "--calib_seqlen", "128", "--work_dir", str(tmp_path / "stats"), "--device", "cpu"]
    assert main(["lite", "calibrate", "--model", str(model), *calib]) == 0
    assert main(["convert", str(model), "--dst_path", str(tmp_path / "workspace")]) == 0
    words = ["--work_dir", str(tmp_path / "stats"), "--turbomind_dir", str(tmp_path / "workspace"), "--num_tp", "1"]
    assert main(["lite", "kv_qparams", *words, *more]) == 0
    return tmp_path / "workspace"


def test_ranges_by_hand():
    low, high = torch.tensor([-2.0, 1.0]), torch.tensor([3.1, 6.1])
    scale, zero = ranges(low, high, torch.tensor([3.1, 6.1]), symmetric=False)
    torch.testing.assert_close(scale, torch.tensor([0.02, 0.02]))
    torch.testing.assert_close(zero, torch.tensor([0.55, 3.55]))
    scale, zero = ranges(low, high, torch.tensor([2.54, 12.7]), symmetric=True)
    torch.testing.assert_close(scale, torch.tensor([0.02, 0.1]))
    assert not zero.any()


@pytest.mark.parametrize("symmetric", ["False", "True"])
def test_a_calibrated_cache_serves_as_well(tmp_path, symmetric):
    """The workspace's ranges follow the formula, are cut by rank, and hardly change what the model says."""
    workspace = calibrated(tmp_path, MINI, "--kv_sym", symmetric)
    spec = read_spec(MINI, EngineConfig())
    whole = read_kv_ranges(workspace, spec, spec.shard(0, 1))
    stats = load_file(tmp_path / "stats" / "key_stats.safetensors")
    low, high = stats["layers.3.min"].amin(-1), stats["layers.3.max"].amax(-1)
    scale = torch.maximum(-low, high) / 127 if symmetric == "True" else (high - low) / 255
    torch.testing.assert_close(whole[3].k_scale, scale)
    second = read_kv_ranges(workspace, spec, spec.shard(1, 2))
    assert torch.equal(second[3].k_scale, whole[3].k_scale[1:]) and len(second) == spec.num_layers
    found = {}
    for policy in ("none", "int8"):
        config = EngineConfig(device="cpu", dtype="float32", quant_policy=policy, max_batch_size=8)
        with Evaluator(workspace, config) as evaluator:
            found[policy] = evaluator.dialogues(12).perplexity
            assert "one C++ call" in evaluator.engine.info.report[0]
    assert found["int8"] != found["none"]
    assert found["int8"] == pytest.approx(found["none"], rel=5e-3)


def test_an_int4_cache_stands_outlier_channels(tmp_path, monkeypatch):
    """Keys times 32 in three pairs of channels, queries divided by it: the same model, but for the cache's rounding.
    Without the rotation that the scheme applies it is a much worse one."""
    tensors = load_file(MINI / "model.safetensors")
    spec = read_spec(MINI, EngineConfig())
    half = spec.head_dim // 2
    for name, t in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = t.view(-1, spec.head_dim, t.shape[1])
            for channel in (2, 9, 20):  # rope turns channel and channel + half together
                for row in (channel, channel + half):
                    heads[:, row] *= 32.0 if "k_proj" in name else 1 / 32
    for path in MINI.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((MINI / "chat_template.jinja").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")

    def perplexity(model: Path, policy: str) -> float:
        config = EngineConfig(device="cpu", dtype="float32", quant_policy=policy, max_batch_size=8)
        with Evaluator(model, config) as evaluator:
            return evaluator.dialogues(10).perplexity

    dense = perplexity(tmp_path, "none")
    assert dense == pytest.approx(perplexity(MINI, "none"), rel=1e-4)
    rotated = perplexity(tmp_path, "int4")
    plain = dataclasses.replace(kv_schemes.KV_SCHEMES["int4"], rotated=False)
    monkeypatch.setitem(kv_schemes.KV_SCHEMES, "int4", plain)
    collapsed = perplexity(tmp_path, "int4")
    assert rotated < 1.25 * dense, (dense, rotated)
    assert collapsed - dense > 2 * abs(rotated - dense), (dense, rotated, collapsed)


def test_refusals_of_lite(tmp_path, capsys):
    empty = ["--work_dir", str(tmp_path), "--turbomind_dir", str(tmp_path)]
    for words, sentence in (
        (["lite", "kv_qparams", *empty], "is not a workspace"),
        (["lite", "auto_awq", "mini", "--w_bits", "8"], "4 bits, not 8"),
        (["lite", "calibrate", "mini", "--w_bits", "4"], "does not belong to lite calibrate"),
        (["lite"], "one of the words"),
        (["lite", "auto_awq", "mini", "--calib_dataset", "c4", "--work_dir", str(tmp_path / "x")], "c4 is not a file"),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err
