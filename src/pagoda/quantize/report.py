"""What quantizing did to a model: numbers as plain data, a table for the terminal, a page with plots."""

import math
from pathlib import Path
from typing import Any

from pagoda.config import EngineConfig
from pagoda.models.find import resolve_model
from pagoda.quantize.evaluate import Evaluator, paired_loss
from pagoda.quantize.mini_tasks import overall
from pagoda.quantize.produce import Produced, Progress
from pagoda.quantize.recipe import Recipe
from pagoda.text.template import compile_template

Report = dict[str, Any]
COLORS = ("#3b6ea5", "#c2703d", "#5a9367", "#8a5a9e")


def measure(
    model: str | Path, config: EngineConfig, text: str | None, num_questions: int, progress: Progress | None = None
) -> Report:
    """Size, perplexity (of `text`, else of held-out stories of mini's world), speed where there is a GPU, and, with
    questions, accuracy by task. `right` pairs two such results."""
    files = resolve_model(str(model)).rglob("*.safetensors")
    found: Report = {"bytes": sum(path.stat().st_size for path in files)}
    with Evaluator(model, config) as evaluator:
        scored = evaluator.stories(40) if text is None else evaluator.text(text)
        found |= {"perplexity": scored.perplexity, "tokens": scored.tokens}
        if evaluator.on_gpu:
            found["tokens_per_second"] = evaluator.speed()
        if num_questions:
            answers = evaluator.answer(num_questions, progress=progress)
            rows = [*answers.scores, overall(answers.scores)]
            found["answer_perplexity"] = evaluator.right_answers(num_questions).perplexity
            found |= {"accuracy": {s.task: s.accuracy for s in rows}, "right": answers.right}
    return found


def make_report(model: str, recipe: Recipe, produced: Produced, before: Report, after: Report) -> Report:
    """Everything of one run, ready for JSON."""
    report: Report = {
        "model": model,
        "folder": str(produced.folder),
        "recipe": recipe.settings(),
        "calibration": {"sequences": produced.num_sequences, "length": produced.length},
        "seconds": produced.seconds,
        "layers": produced.errors,
    }
    if "accuracy" in before:
        points, half = paired_loss(before.pop("right"), after.pop("right"))
        report["points_lost"] = {"value": points, "interval": [points - half, points + half]}
    return report | {"before": before, "after": after}


def rows_of(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of the table."""
    before, after = report["before"], report["after"]
    rows = [_row("size, MiB", before["bytes"] / 2**20, after["bytes"] / 2**20, "{:.2f}", "x")]
    rows.append(_row("perplexity", before["perplexity"], after["perplexity"], "{:.4f}", "+"))
    if "answer_perplexity" in before:
        pair = before["answer_perplexity"], after["answer_perplexity"]
        rows.append(_row("perplexity of answers", *pair, "{:.6f}", "+"))
    if "tokens_per_second" in before:
        rows.append(_row("tokens/s, 8 rows", before["tokens_per_second"], after["tokens_per_second"], "{:.0f}", "x"))
    for task, accuracy in before.get("accuracy", {}).items():
        rows.append(_row(f"{task}, %", 100 * accuracy, 100 * after["accuracy"][task], "{:.2f}", "+"))
    return rows


def _row(what: str, before: float, after: float, form: str, change: str) -> tuple[str, str, str, str]:
    text = f"x {after / before:.2f}" if change == "x" else f"{after - before:+.6f}".rstrip("0").rstrip(".")
    return what, form.format(before), form.format(after), text


def table(report: Report) -> str:
    """For the terminal."""
    rows = [("", "before", "after", "change"), *rows_of(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    if "points_lost" in report:
        low, high = report["points_lost"]["interval"]
        lines.append(f"points lost on paired questions: {report['points_lost']['value']:.2f} ({low:.2f} .. {high:.2f})")
    worst = max(((e, i, role) for i, row in enumerate(report["layers"]) for role, e in row.items()), default=None)
    if worst is not None:
        lines.append(
            f"largest error of a matrix's output: {worst[0]:.2e} of its power ({worst[2]} of layer {worst[1]})"
        )
    return "\n".join(lines)


def page(report: Report) -> str:
    """One HTML page that needs nothing else: tables, errors by layer, accuracy by task."""
    before, after = (report[when].get("accuracy", {}) for when in ("before", "after"))
    template = compile_template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=f"{report['recipe']['method']} of {report['model']}",
        rows=[("", "before", "after", "change"), *rows_of(report)],
        colors=COLORS,
        curves=_curves(report["layers"]),
        tasks=[(task, accuracy, after[task]) for task, accuracy in before.items()],
    )


def _curves(layers: list[dict[str, float]]) -> dict[str, Any] | None:
    """Errors by layer in pixels, logarithmic: `grid` of powers of ten, `lines` of points; None where none is known."""
    known = [math.log10(max(v, 1e-12)) for layer in layers for v in layer.values() if v == v]
    if not known:
        return None
    low, high = math.floor(min(known)), math.ceil(max(known) + 1e-9)
    across = 620 / max(len(layers) - 1, 1)

    def y(power: float) -> float:
        return 230 - 210 * (power - low) / (high - low)

    lines = [
        (
            role,
            [
                (round(60 + i * across, 1), round(y(math.log10(max(layer[role], 1e-12))), 1))
                for i, layer in enumerate(layers)
            ],
        )
        for role in layers[0]
    ]
    return {"grid": [(power, round(y(power))) for power in range(low, high + 1)], "lines": lines}
