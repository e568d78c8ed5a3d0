"""What each setting costs on the bundled model, on paired questions: few in the quick tests, all in the slow ones."""

from pathlib import Path

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.quantize.evaluate import Answers, Evaluator, paired_loss
from pagoda.quantize.produce import Calibration, Source, quantize_model
from pagoda.quantize.recipe import Recipe

GPU = torch.cuda.is_available()
QUESTIONS = 10000 if GPU else 1000
CALIBRATION = Calibration(samples=64, length=512)


def ask(model: Path | str, num: int, policy: str = "none") -> tuple[Answers, float]:
    """Answers, and the perplexity of the right ones."""
    with Evaluator(model, EngineConfig(quant_policy=policy, max_batch_size=256 if GPU else 64)) as evaluator:
        return evaluator.answer(num), evaluator.right_answers(1000).perplexity


@pytest.fixture(scope="module")
def whole() -> tuple[Answers, float]:
    return ask("mini", QUESTIONS)


def test_an_int8_cache_answers_the_same():
    """Quick: 102 questions leave room for one that differs."""
    before, after = ask("mini", 102)[0], ask("mini", 102, "int8")[0]
    assert before.accuracy > 0.95
    assert sum(a != b for a, b in zip(before.right, after.right)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "points"), [("int8", 0.2), ("int4", 1.5), ("fp8", 0.3)])
def test_the_price_of_a_cache(whole, policy, points):
    lost, half = paired_loss(whole[0].right, ask("mini", QUESTIONS, policy)[0].right)
    assert lost <= points, (lost, half)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "points"),
    [(Recipe("awq", 128), 1.0), (Recipe("awq", 32), 0.5), (Recipe("smooth"), 0.3), (Recipe("fp8"), 0.3)],
    ids=lambda p: f"{p.method}-{p.group}" if isinstance(p, Recipe) else None,
)
def test_the_price_of_weights(whole, tmp_path, recipe, points):
    """Within its limit; and AWQ is better than rounding to nearest in the perplexity of right answers. (That of whole
    conversations falls under any noise: what users say was hardly trained, and the model is too sure of it.)"""
    quantize_model(Source("mini", CALIBRATION), tmp_path / "out", recipe)
    answers, perplexity = ask(tmp_path / "out", QUESTIONS)
    lost, half = paired_loss(whole[0].right, answers.right)
    assert lost <= points, (lost, half)
    if recipe.method == "awq":
        quantize_model(Source("mini", CALIBRATION), tmp_path / "rtn", Recipe("rtn", recipe.group))
        nearest = ask(tmp_path / "rtn", 17)[1]
        assert whole[1] < perplexity < nearest
