"""Fill the model card of Pagoda mini from a training log: `python examples/train_mini/card.py DIR/log.json`.

Writes the sections between the markers of src/pagoda/mini/README.md anew; everything else in the card stays.
"""

import argparse
import json
import re
from pathlib import Path

from pagoda.quantize.mini_tasks import TaskScore, overall


def training_section(log: dict) -> str:
    last = log["curve"][-1]
    return "\n".join(
        [
            f"- parameters: {log['parameters'] / 1e6:.2f} million",
            f"- device: {log['device']}, torch {log['torch']}",
            f"- command: `{log['command']}`",
            f"- {log['tokens'] / 1e6:.0f} million tokens in {log['steps']} steps and {log['seconds']:.0f} s",
            f"- {log['tokens'] / log['seconds'] / 1e6:.2f} million tokens/s; {log['total_seconds']:.0f} s in all",
            f"- {log['distinct_rows']} rows seen once, {log['repeated_rows']} drawn again",
            f"- loss on what the assistant says: {log['curve'][0][2]} at the first step, {last[2]} at step {last[0]}",
        ]
    )


def accuracy_section(log: dict) -> str:
    scores = [TaskScore(task, right, asked) for task, (right, asked) in log["accuracy"].items()]
    lines = ["| task | asked | exact match | 95% interval |", "|---|---|---|---|"]
    for s in [*scores, overall(scores)]:
        low, high = s.interval
        lines.append(f"| {s.task} | {s.num_asked} | {s.accuracy:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join(lines)


def fill(card: str, log: dict) -> str:
    for name, text in (("training", training_section(log)), ("accuracy", accuracy_section(log))):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        assert begin in card and end in card, f"the card has lost its marker {begin}"
        card = re.sub(f"{begin}.*?{end}", lambda _, t=text, b=begin, e=end: f"{b}\n{t}\n{e}", card, flags=re.DOTALL)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--card", type=Path, default=Path("src/pagoda/mini/README.md"))
    args = parser.parse_args()
    args.card.write_text(fill(args.card.read_text(), json.loads(args.log.read_text())))


if __name__ == "__main__":
    main()
