"""What each setting costs on the bundled model, on paired questions: few in the quick tests, all in the slow ones."""

from pathlib import Path

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.models.checkpoint import SafetensorsFolder
from pagoda.models.find import resolve_model
from pagoda.models.loader import resolve_spec
from pagoda.models.local_weights import LocalWeights
from pagoda.quantize.evaluate import Answers, Evaluator, paired_loss
from pagoda.quantize.mini_tasks import held_out_dialogues
from pagoda.quantize.produce import Calibration, Source, quantize_model
from pagoda.quantize.recipe import Recipe
from pagoda.quantize.walk import Walk, read_layer
from pagoda.text.template import load_template
from pagoda.text.tokenizer import load_tokenizer

GPU = torch.cuda.is_available()
QUESTIONS = 10000 if GPU else 1000
CALIBRATION = Calibration(samples=64, length=512)


def ask(model: Path | str, num: int, policy: str = "none") -> Answers:
    with Evaluator(model, EngineConfig(quant_policy=policy, max_batch_size=256 if GPU else 64)) as evaluator:
        return evaluator.answer(num)


def next_logprobs(folder: Path, ids_SL: torch.Tensor) -> torch.Tensor:
    """Of every next token of every position [S, L, V], float32."""
    spec, _ = resolve_spec(folder, EngineConfig())
    tensors, cpu = SafetensorsFolder(folder), torch.device("cpu")
    walk, embed = Walk(spec, ids_SL.shape[1], cpu, torch.float32), tensors.get("model.embed_tokens.weight").float()
    with torch.inference_mode():
        h_SLC = walk.embed(embed, ids_SL)
        for index in range(spec.num_layers):
            walk.advance(read_layer(LocalWeights(spec, tensors, 0, 1, cpu), index), h_SLC)
        x = torch.nn.functional.rms_norm(h_SLC, (spec.hidden_size,), tensors.get("model.norm.weight").float(), 1e-5)
        return (x @ embed.T).log_softmax(-1)


@pytest.fixture(scope="module")
def whole() -> Answers:
    return ask("mini", QUESTIONS)


def test_an_int8_cache_answers_the_same():
    """Quick: 102 questions leave room for one that differs."""
    before, after = ask("mini", 102), ask("mini", 102, "int8")
    assert before.accuracy > 0.95
    assert sum(a != b for a, b in zip(before.right, after.right)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "points"), [("int8", 0.2), ("int4", 1.5), ("fp8", 0.3)])
def test_the_price_of_a_cache(whole, policy, points):
    lost, half = paired_loss(whole.right, ask("mini", QUESTIONS, policy).right)
    assert lost <= points, (lost, half)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "points"),
    [(Recipe("awq", 128), 1.0), (Recipe("awq", 32), 0.5), (Recipe("smooth"), 0.3), (Recipe("fp8"), 0.3)],
    ids=lambda p: f"{p.method}-{p.group}" if isinstance(p, Recipe) else None,
)
def test_the_price_of_weights(whole, tmp_path, recipe, points):
    quantize_model(Source("mini", CALIBRATION), tmp_path / "out", recipe)
    lost, half = paired_loss(whole.right, ask(tmp_path / "out", QUESTIONS).right)
    assert lost <= points, (lost, half)


@pytest.mark.slow
@pytest.mark.parametrize("group", [128, 32])
def test_awq_is_better_than_rounding_in_perplexity(tmp_path, group):
    """In that of what the original model would say next in held-out conversations, averaged over all it might say: the
    perplexity of a given text swings by more than 4 bit costs, with a few tokens that nobody could foresee."""
    mini = resolve_model("mini")
    tokenizer = load_tokenizer(mini)
    template = load_template(mini, None, tokenizer)
    text = "".join(template.render(m, add_generation_prompt=False) for m in held_out_dialogues(0, 60))
    ids = torch.tensor(tokenizer.encode(text)[: 24 * 256]).view(24, 256)
    before, excess = next_logprobs(mini, ids), {}
    for method in ("rtn", "awq"):
        recipe, source = Recipe(method, group), Source("mini", Calibration(samples=64, length=512, device="cpu"))
        quantize_model(source, tmp_path / method, recipe)
        after = next_logprobs(tmp_path / method, ids)
        excess[method] = float((before.exp() * (before - after)).sum(-1).mean())  # of its logarithm
    assert 0 < excess["awq"] < 0.7 * excess["rtn"], excess
