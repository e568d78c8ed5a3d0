"""Real trained checkpoints, from their folders and from workspaces, give exactly the ids recorded with transformers."""

import json
from pathlib import Path

import pytest

from pagoda import EngineConfig, GenerationConfig, pipeline
from pagoda.cli.main import main

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=64)


@pytest.mark.parametrize("kind", ["folder", "workspace"])
@pytest.mark.parametrize("name", ["stories260k-llama", "zhpoem750k-llama", "babyllama361-llama"])
def test_recorded_ids(shared_data: Path, tmp_path: Path, name: str, kind: str) -> None:
    model = shared_data / "models" / name
    expected = json.loads((shared_data / "models" / "expected" / f"{name}.json").read_text())
    if kind == "workspace":
        assert main(["convert", str(model), "--dst_path", str(tmp_path / "ws")]) == 0
        model = tmp_path / "ws"
    with pipeline(model, EngineConfig(device="cpu", max_batch_size=4)) as pipe:
        for case in expected["prompts"]:
            assert pipe.prompt_ids(case["prompt"], do_preprocess=False) == case["prompt_ids"]
            reply = pipe(case["prompt"], GREEDY.replace(ignore_eos=True), do_preprocess=False)
            assert reply.token_ids == case["ids_64_ignore_eos"]
            stopped = pipe(case["prompt"], GREEDY, do_preprocess=False)
            stop = case["stops_at"]
            assert stopped.token_ids == case["ids_64_ignore_eos"][:stop]
            assert stopped.finish_reason == ("length" if stop is None else "stop")
