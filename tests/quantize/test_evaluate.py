"""Perplexities against those recorded beside the reference models; the task against replies that are known."""

import json

import pytest

from pagoda.cli.main import main
from pagoda.config import EngineConfig
from pagoda.errors import UsageError
from pagoda.quantize.evaluate import Evaluator, paired_loss, read_text
from pagoda.quantize.mini_tasks import questions

RECORDED = [  # model, text, characters, by line, perplexity, tokens: README of the reference data
    ("babyllama361-llama", "tinystories_a.txt", 20000, False, 2.20453, 20001),
    ("stories260k-llama", "tinystories_a.txt", 20000, False, 4.3081, 9481),
    ("zhpoem750k-llama", "zh_tang_poems_val.txt", 6000, True, 132.87733, 6001),
]


@pytest.mark.parametrize(("model", "text", "chars", "lines", "perplexity", "tokens"), RECORDED)
def test_perplexity_is_the_recorded_one(shared_data, capsys, model, text, chars, lines, perplexity, tokens):
    words = ["eval", str(shared_data / "models" / model), "--text", str(shared_data / "text" / text), "--json"]
    words += ["--max_chars", str(chars), "--lines", str(lines), "--dtype", "float32", "--max-batch-size", "8"]
    assert main([*words, "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"perplexity": pytest.approx(perplexity, abs=2e-5 * perplexity), "tokens": tokens}


def test_mini_answers_its_questions(capsys):
    assert main(["eval", "mini", "--task", "mini", "--questions", "68", "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] >= 0.94
    assert sum(row["asked"] for task, row in result["tasks"].items() if task != "overall") == 68
    low, high = result["tasks"]["overall"]["interval"]
    assert low < result["accuracy"] <= high
    assert 1 < result["story_perplexity"] < 3 and 1 < result["dialogue_perplexity"] < 3


def test_right_answers_are_scored_alone():
    """As many tokens as the answers have, and far less surprise than in whole conversations."""
    asked = questions(0, 5)
    with Evaluator("mini", EngineConfig(device="cpu", dtype="float32", max_batch_size=8)) as evaluator:
        found = evaluator.right_answers(5)
        tokens = sum(len(evaluator.tokenizer.encode(q.answer + "<|im_end|>\n")) for q in asked)
        everything = evaluator.dialogues(5)
    assert found.tokens == tokens
    assert 1 < found.perplexity < 1.01 < everything.perplexity


def test_wrong_answers_count_as_wrong():
    """A model of random weights knows nothing."""
    with Evaluator("mini", EngineConfig(device="cpu", load_format="dummy", max_batch_size=17)) as evaluator:
        answers = evaluator.answer(17)
    assert answers.accuracy == 0 and len(answers.right) == 17 == sum(s.num_asked for s in answers.scores)


def test_paired_loss_by_hand():
    points, half = paired_loss([True] * 90 + [False] * 10, [True] * 80 + [False] * 15 + [True] * 5)
    assert points == pytest.approx(5.0)  # ten lost, five won, of a hundred
    assert half == pytest.approx(196 * ((0.15 - 0.0025) / 100) ** 0.5)


def test_questions_are_paired_by_their_seed():
    assert [q.answer for q in questions(3, 20)] == [q.answer for q in questions(3, 40)][:20]


def test_refusals(tmp_path, capsys):
    with pytest.raises(UsageError, match="UTF-8"):
        read_text(tmp_path / "absent.txt")
    assert main(["eval", "mini"]) == 2
    assert "--text FILE" in capsys.readouterr().err
