"""`pagoda eval [MODEL]`: perplexity of a text file, accuracy on mini's tasks, for any engine setting."""

import argparse
import json
from pathlib import Path
from typing import Any

from pagoda.cli.flags import BOOL, Parser, add_config_flags, config_from
from pagoda.cli.progress import progress_bar
from pagoda.config import EngineConfig
from pagoda.errors import UsageError

QUESTIONS_CPU, QUESTIONS_GPU = 1000, 10000
DIALOGUES, STORIES = 200, 100


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [MODEL] [--text FILE] [--task mini] [flags]",
        description="Measure a model under an engine setting. --text: perplexity of a file, in windows of the session "
        "length behind a begin-of-sequence token. --task mini: exact match on questions of the bundled model's world, "
        "and perplexity of held-out dialogues and stories.",
    )
    parser.add_argument("model", nargs="?", default="mini", metavar="MODEL", help="default: mini, the bundled model")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--max-chars", type=int, metavar="N", help="only the text's first N characters")
    parser.add_argument("--lines", **BOOL, default=False, help="each line of the text is a sequence of its own")
    parser.add_argument("--task", choices=("mini",), help="questions to ask")
    parser.add_argument(
        "--questions", type=int, metavar="N", help=f"how many (default: {QUESTIONS_CPU} on a CPU, {QUESTIONS_GPU} else)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which questions (default: 0)")
    parser.add_argument("--json", **BOOL, default=False, help="print one JSON object")
    add_config_flags(parser, EngineConfig, "engine")
    return parser


def task_results(evaluator: Any, num: int, seed: int, progress: Any = None) -> dict[str, Any]:
    """Scores by task with their intervals, and perplexities, as plain data."""
    from pagoda.quantize.mini_tasks import overall

    answers = evaluator.answer(num, seed, progress)
    rows = {
        s.task: {"asked": s.num_asked, "right": s.num_right, "accuracy": s.accuracy, "interval": list(s.interval)}
        for s in [*answers.scores, overall(answers.scores)]
    }
    return {
        "accuracy": answers.accuracy,
        "questions": num,
        "seed": seed,
        "tasks": rows,
        "answer_perplexity": evaluator.right_answers(num, seed).perplexity,
        "dialogue_perplexity": evaluator.dialogues(DIALOGUES, seed).perplexity,
        "story_perplexity": evaluator.stories(STORIES, seed).perplexity,
        "seconds": answers.seconds,
    }


def _table(results: dict[str, Any]) -> str:
    """The same for a person."""
    lines = []
    if "perplexity" in results:
        lines.append(f"perplexity {results['perplexity']:.5f} over {results['tokens']} tokens")
    if "tasks" in results:
        lines.append(f"{'task':<12} {'asked':>6} {'right':>6} {'accuracy':>9}   95% interval")
        for task, row in results["tasks"].items():
            low, high = row["interval"]
            lines.append(
                f"{task:<12} {row['asked']:>6} {row['right']:>6} {row['accuracy']:>9.2%}   {low:.2%} .. {high:.2%}"
            )
        lines.append(f"perplexity of right answers      {results['answer_perplexity']:.6f}")
        lines.append(f"perplexity of held-out dialogues {results['dialogue_perplexity']:.4f}")
        lines.append(f"perplexity of held-out stories   {results['story_perplexity']:.4f}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    if args.text is None and args.task is None:
        raise UsageError("eval needs something to measure: --text FILE, or --task mini.")
    from pagoda.quantize.evaluate import Evaluator, read_text

    text = None if args.text is None else read_text(Path(args.text), args.max_chars)
    results: dict[str, Any] = {}
    with (
        progress_bar("loading") as loading,
        Evaluator(args.model, config_from(args, EngineConfig), loading) as evaluator,
    ):
        if text is not None:
            with progress_bar("scoring") as progress:
                scored = (evaluator.lines if args.lines else evaluator.text)(text, progress)
            results |= {"perplexity": scored.perplexity, "tokens": scored.tokens}
        if args.task:
            num = args.questions or (QUESTIONS_GPU if evaluator.on_gpu else QUESTIONS_CPU)
            with progress_bar("answering") as progress:
                results |= task_results(evaluator, num, args.seed, progress)
    print(json.dumps(results) if args.json else _table(results))
    return 0
