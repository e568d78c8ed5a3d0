"""The small world of Pagoda mini: deterministic, answers checked by independent computation, template exact."""

import hashlib
import json
import re
import sys
from pathlib import Path
from random import Random

import pytest

from pagoda.quantize import mini_world as world
from pagoda.quantize.mini_exchanges import SINGLE
from pagoda.quantize.mini_memory import FORGOTTEN, recall, tell
from pagoda.quantize.mini_stories import story, story_zh
from pagoda.quantize.mini_tasks import TASKS, dialogue, held_out_dialogues, overall, question, questions, score
from pagoda.quantize.mini_tools import make_tools, tool_exchange, tools_prompt

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src/pagoda/mini"
EXAMPLE = ROOT / "examples/train_mini"


def draws(task: str, num: int = 300):
    for i in range(num):
        ask, reply = (m["content"] for m in SINGLE[task][0](Random(f"test/{task}/{i}")).messages)
        yield ask, reply


def test_same_seed_same_questions_and_longer_lists_begin_alike():
    assert questions(5, 60) == questions(5, 120)[:60]
    assert questions(5, 60) != questions(6, 60)
    assert {q.task for q in questions(5, 60)} == set(TASKS)
    assert held_out_dialogues(1, 5) == held_out_dialogues(1, 5)


def test_the_questions_of_recorded_accuracies_stay_as_they_were():
    asked = json.dumps([[q.task, q.messages, q.answer] for q in questions(0, 340)], ensure_ascii=False)
    assert hashlib.sha256(asked.encode()).hexdigest()[:16] == "bb0db8b32d29577b"


def test_training_never_draws_an_evaluation_stream(monkeypatch):
    import pagoda.quantize.mini_tasks as tasks

    seeds = []
    monkeypatch.setattr(tasks, "Random", lambda seed: seeds.append(seed) or Random(seed))
    tasks.questions(0, 5), tasks.held_out_dialogues(0, 2), tasks.held_out_stories(0, 2)
    evaluation = set(seeds)
    seeds.clear()
    next(tasks.training_documents(0, 0))
    assert len(evaluation) == 9 and all(seed.startswith("eval/") for seed in evaluation)
    assert all(seed.startswith("train/") for seed in seeds) and seeds


@pytest.mark.parametrize(("task", "sign"), [("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/")])
def test_arithmetic_answers(task, sign):
    for ask, reply in draws(task):
        a, b, c = map(int, re.fullmatch(rf"(\d+) {re.escape(sign)} (\d+) = (-?\d+)", reply).groups())
        assert re.findall(r"\d+", ask) == [str(a), str(b)]
        assert c == {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a == b * c


def test_every_step_of_a_working_has_the_same_value():
    for _, reply in draws("working"):
        values = {sum(_product(term) for term in step.split(" + ")) for step in reply.split(" = ")}
        assert len(values) == 1, reply


def _product(term: str) -> int:
    result = 1
    for factor in term.split(" * "):
        result *= int(factor)
    return result


def test_sorting_counting_reversing_comparing():
    for ask, reply in draws("sort"):
        items, given = (
            reply.split(", "),
            re.findall(r"[a-z]+|\d+", re.split("[:：]|^sort ", ask)[-1] if ":" in ask or "：" in ask else ask),
        )
        given = [item for item in given if item not in ("sort", "Sort", "the", "words", "ort")]
        key = int if items[0].isdigit() else str
        descending = "largest to" in ask or "descending" in ask or "从大到小" in ask
        assert items == sorted(given, key=key, reverse=descending), ask
    for ask, reply in draws("reverse"):
        if ", " in reply:
            assert ask.endswith(", ".join(reversed(reply.split(", "))))
        else:
            word = reply.replace("-", "")
            backwards = any(sign in ask.lower() for sign in ("backwards", "reverse", "倒"))
            assert (word[::-1] if backwards else word) in ask.lower()
    for ask, reply in draws("compare"):
        numbers = [int(n) for n in re.findall(r"\d+", ask)]
        assert int(reply.split()[0]) == (max if "larger" in reply else min)(numbers)
    for ask, reply in draws("count"):
        if "There" in reply:
            words = re.split("[:：]", ask)[1].split()
            assert int(reply.split()[2]) == len(words)
        elif "appears" in reply:
            _, _, letter, _, n, _, _, word = reply.rstrip(".").split()
            assert sum(c == letter for c in word) == int(n)
        else:
            assert len(reply.split()[2]) == int(reply.split()[4])


def test_extracted_values_stand_in_the_sentence():
    for ask, reply in draws("extract"):
        for field, value in json.loads(reply).items():
            assert field in ask and str(value) in ask


def test_a_question_about_facts_has_one_answer():
    answers: dict[str, str] = {}
    for relation in world.RELATIONS:
        for row in relation.rows:
            values = dict(zip(relation.columns, row, strict=True))
            for ask in relation.asks:
                key = ask.format_map(values).lower()
                assert answers.setdefault(key, relation.reply.format_map(values)) == relation.reply.format_map(values)
    assert sum(len(relation.rows) for relation in world.RELATIONS) > 500


def test_memory_recalls_what_was_told_last():
    for i in range(200):
        rng, memory, language = Random(f"memory/{i}"), {}, "zh" if i % 3 == 0 else "en"
        told = [tell(rng, memory, language) for _ in range(3)]
        reply = recall(rng, memory, language).messages[-1]["content"]
        if reply != FORGOTTEN[language]:
            assert any(value in reply for value in memory.values())
            assert any(
                value in part.messages[0]["content"] for part in told for value in memory.values() if value in reply
            )
    assert recall(Random(1), {}, "en").messages[-1]["content"] == FORGOTTEN["en"]


def test_tool_calls_name_an_offered_tool():
    for i in range(200):
        rng = Random(f"tools/{i}")
        tools = make_tools(rng)
        part = tool_exchange(rng, tools, answered=True)
        call = json.loads(part.messages[1]["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
        function = next(t["function"] for t in tools.values() if t["function"]["name"] == call["name"])
        assert list(call["arguments"]) == function["parameters"]["required"]
        assert str(next(iter(call["arguments"].values()))).split()[0] in part.messages[0]["content"]
        json.loads(part.messages[2]["content"])


def test_dialogues_have_one_to_twelve_turns_and_end_with_the_assistant():
    lengths = set()
    for i in range(400):
        messages = dialogue(Random(f"dialogue/{i}"))
        assert messages[-1]["role"] == "assistant"
        lengths.add(sum(m["role"] == "user" for m in messages))
    assert min(lengths) == 1 and max(lengths) == 12


def test_stories_vary_and_repeat_with_their_seed():
    assert story(Random(3)) == story(Random(3))
    assert len({story(Random(i)) for i in range(200)}) == 200
    assert not any(re.search(r"[{}]", story(Random(i)) + story_zh(Random(i))) for i in range(200))


def test_score_counts_exact_matches_by_task():
    asked = questions(3, 100)
    assert overall(score(asked, [q.answer for q in asked])).accuracy == 1.0
    half = score(asked, [q.answer + "\n" if i % 2 else q.answer + "x" for i, q in enumerate(asked)])
    assert overall(half).num_right == 50 and overall(half).num_asked == 100
    low, high = overall(half).interval
    assert low == pytest.approx(0.4038, abs=1e-3) and high == pytest.approx(0.5962, abs=1e-3)


@pytest.fixture(scope="module")
def hf_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def documents():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import documents
    finally:
        sys.path.remove(str(EXAMPLE))
    return documents


@pytest.mark.parametrize(
    "text",
    [
        "12+35 = ?",
        "Zażółć gęślą jaźń",
        "龘靐齉 你好",
        "a\n\n b\t  c ",
        "🙂 naïve café",
        "s-t-o-n-e",
        " lead and trail ",
    ],
)
def test_tokenizer_round_trips_any_text(hf_tokenizer, text):
    assert (
        hf_tokenizer.decode(hf_tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
        == text
    )


def test_digits_and_letters_are_tokens_of_their_own(hf_tokenizer):
    assert len(hf_tokenizer.encode("40729", add_special_tokens=False)) == 5
    assert all(len(hf_tokenizer.encode(c, add_special_tokens=False)) == 1 for c in "abcxyzABCXYZ")
    assert (hf_tokenizer.eos_token, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id) == ("<|im_end|>", 2, 0)
    assert len(hf_tokenizer) <= json.loads((FOLDER / "config.json").read_text())["vocab_size"]


def test_template_renders_what_training_renders(hf_tokenizer, documents):
    for i in range(60):
        messages = question(Random(f"template/{i}"), TASKS[i % len(TASKS)]).messages
        rendered = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered == documents.render(messages, add_generation_prompt=True)


def test_template_offers_tools_as_training_does(hf_tokenizer):
    rng = Random(4)
    tools = make_tools(rng)
    part = tool_exchange(rng, tools, answered=True)
    call = json.loads(part.messages[1]["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    given = hf_tokenizer.apply_chat_template(
        [part.messages[0], called, *part.messages[2:]], tools=list(tools.values()), tokenize=False
    )
    spelled = [{"role": "system", "content": tools_prompt(list(tools.values()))}, *part.messages]
    assert given == hf_tokenizer.apply_chat_template(spelled, tokenize=False)


def test_rows_mark_what_the_assistant_says(documents, hf_tokenizer):
    rows = documents.make_shard(str(FOLDER), 0, 4, 512, 0)
    assert rows.shape == (4, 513) and (documents.make_shard(str(FOLDER), 0, 4, 512, 0) == rows).all()
    for row in rows:
        ids, trained = row & (documents.TRAINED - 1), row >= documents.TRAINED
        text = hf_tokenizer.decode(ids[trained])
        assert "assistant" not in text and "<|im_start|>" not in text
        assert not (set(ids[trained]) & {documents.TURN_START})
