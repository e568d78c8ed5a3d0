"""A model split over ranks computes what it computes whole: real processes over gloo, float32."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import FAMILIES, internlm, random_model

from pagoda.config import EngineConfig
from pagoda.layers.parallel import Group
from pagoda.models.decoder import build_program
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.loader import load_model
from pagoda.models.spec import read_spec
from stepping import Stepper

PROMPT = [(7 * i) % 131 for i in range(20)]


def logits(folder: Path, group: Group) -> torch.Tensor:
    engine = EngineConfig(dtype="float32", device="cpu", cache_block_seq_len=8, tp=group.size)
    spec, cpu = read_spec(folder, engine), torch.device("cpu")
    weights = load_model(folder, spec, engine, cpu, torch.float32, group)
    run = EagerExecutor(build_program(spec, weights, group), engine, cpu, torch.float32, group)
    stepper = Stepper(run, 8, 1, len(PROMPT))
    return torch.cat([stepper.step([(0, PROMPT[a:b])])[0] for a, b in ((0, 13), (13, 19), (19, 20))])


def rank_main(rank: int, size: int, folders: list[Path], meet: str) -> None:
    torch.set_num_threads(1)
    group = Group.join(rank, size, f"file://{meet}", torch.device("cpu"))
    for folder in folders:
        torch.save(logits(folder, group), f"{folder}/logits-{rank}.pt")
    group.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_has_the_logits_of_the_whole_model(size, tmp_path):
    """Biases counted once, kv heads repeated where ranks are more, sizes that the ranks do not divide."""
    folders = []
    for name in ("llama_biases", "llama_tied", "qwen3", "gemma2"):
        random_model(FAMILIES[name]()).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    internlm(tmp_path / "internlm")
    folders.append(tmp_path / "internlm")
    mp.spawn(rank_main, (size, folders, str(tmp_path / "meet")), nprocs=size)
    for folder in folders:
        whole = logits(folder, Group.single())
        for rank in range(size):
            part = torch.load(f"{folder}/logits-{rank}.pt", weights_only=True)
            torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)
