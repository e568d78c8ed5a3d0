"""Every mistake of a user is one sentence with the way out, exit code 2, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.models.find import resolve_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(resolve_model("mini"), tmp_path / "model"))


def change(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must be refused; its one sentence."""
    assert main([str(w) for w in words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pagoda: ")]
    assert len(said) == 1 and len(said[0]) < 500, said
    return said[0]


def test_a_missing_folder(capsys, tmp_path):
    assert "nowhere" in refused(capsys, "chat", tmp_path / "nowhere")


def test_truncated_weights(capsys, model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, "chat", model, "--device", "cpu")
    assert "model.safetensors" in refused(capsys, "convert", model, "--dst_path", tmp_path / "ws")
    assert not (tmp_path / "ws").exists()


def test_missing_and_leftover_tensors(capsys, model):
    change(model, num_hidden_layers=9)
    assert "layers.8" in refused(capsys, "chat", model, "--device", "cpu")
    change(model, num_hidden_layers=7)
    assert "layers.7" in refused(capsys, "chat", model, "--device", "cpu")


def test_an_unknown_architecture(capsys, model, tmp_path):
    change(model, architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM" in refused(capsys, "chat", model)
    assert "MambaForCausalLM" in refused(capsys, "convert", model, "--dst_path", tmp_path / "ws")
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 0), ("hidden_act", "relu6"), ("rope_scaling", {"rope_type": "odd"})]
)
def test_a_config_value_out_of_range(capsys, model, key, value):
    change(model, **{key: value})
    sentence = refused(capsys, "chat", model)
    assert key in sentence or str(value) in sentence or "odd" in sentence


def test_a_missing_template(capsys, model):
    (model / "chat_template.jinja").unlink()
    assert "template" in refused(capsys, "chat", model)
    assert "no-such-template" in refused(capsys, "chat", model, "--model-name", "no-such-template")


def test_a_workspace_of_a_newer_version(capsys, model, tmp_path):
    assert main(["convert", str(model), "--dst_path", str(tmp_path / "ws")]) == 0
    capsys.readouterr()
    path = tmp_path / "ws" / "model.json"
    values = json.loads(path.read_text())
    values["pagoda_workspace"] = 99
    path.write_text(json.dumps(values))
    assert "99" in refused(capsys, "chat", tmp_path / "ws")


def test_an_old_workspace_names_the_command(capsys, tmp_path):
    (tmp_path / "old" / "triton_models" / "weights").mkdir(parents=True)
    assert "convert" in refused(capsys, "chat", tmp_path / "old")


def test_convert_deletes_no_folder_of_others(capsys, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "mine" in refused(capsys, "convert", model, "--dst_path", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_more_ranks_than_devices(capsys, model):
    sentence = refused(capsys, "chat", model, "--device", "cuda", "--tp", "99")
    assert "CUDA" in sentence or "99" in sentence


def test_a_prompt_longer_than_the_session():
    from pagoda import EngineConfig, PagodaError, pipeline

    with pipeline("mini", EngineConfig(session_len=64, device="cpu")) as pipe:
        with pytest.raises(PagodaError, match="64"):
            pipe("word " * 200)
        assert pipe("12+35").text
