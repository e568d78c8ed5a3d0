"""What quantizing did to a model: numbers as plain data, a table for the terminal, a page with plots."""

import html
import math
from pathlib import Path
from typing import Any

from pagoda.config import EngineConfig
from pagoda.models.find import resolve_model
from pagoda.quantize.evaluate import Evaluator, paired_loss
from pagoda.quantize.mini_tasks import overall
from pagoda.quantize.produce import Produced, Progress
from pagoda.quantize.recipe import Recipe

Report = dict[str, Any]
COLOURS = ("#3b6ea5", "#c2703d", "#5a9367", "#8a5a9e")


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
    title = f"{report['recipe']['method']} of {report['model']}"
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in [("", "before", "after", "change"), *rows_of(report)]
    )
    roles = list(report["layers"][0]) if report["layers"] else []
    lines = {role: [row[role] for row in report["layers"]] for role in roles}
    plots = [("Error of each matrix's output, share of its power (logarithmic), by layer", _lines(lines))]
    if "accuracy" in report["before"]:
        both = {k: (v, report["after"]["accuracy"][k]) for k, v in report["before"]["accuracy"].items()}
        plots.append(("Exact match by task, before and after", _bars(both)))
    body = "".join(f"<h2>{html.escape(name)}</h2>{svg}" for name, svg in plots)
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:2px 14px;text-align:right}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}td:first-child{{text-align:left}}</style><h1>{html.escape(title)}</h1>"
        f"<table>{cells}</table>{body}</html>"
    )


def _svg(width: int, height: int, inside: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="11">{"".join(inside)}</svg>'
    )


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}">{html.escape(text)}</text>'


def _lines(series: dict[str, list[float]]) -> str:
    """One line a series over the layers, logarithmic, with a grid line at each power of ten."""
    known = [math.log10(max(v, 1e-12)) for values in series.values() for v in values if v == v]
    if not known:
        return "<p>not measured</p>"
    low, high = math.floor(min(known)), math.ceil(max(known) + 1e-9)
    across = 620 / max(len(next(iter(series.values()))) - 1, 1)
    parts = []

    def y(power: float) -> float:
        return 230 - 210 * (power - low) / (high - low)

    for power in range(low, high + 1):
        parts.append(f'<path d="M60 {y(power):.0f}h620" stroke="#ddd"/>' + _text(14, y(power) + 4, f"1e{power}"))
    for (name, values), colour in zip(series.items(), COLOURS):
        points = [(60 + i * across, y(math.log10(max(v, 1e-12)))) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{h:.1f}" for x, h in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{h:.1f}" r="3" fill="{colour}"/>' for x, h in points]
        parts.append(_text(695, 20 + 16 * list(series).index(name), name, colour))
    return _svg(780, 245, parts)


def _bars(pairs: dict[str, tuple[float, float]]) -> str:
    """Two bars a name, of shares from 0 to 1."""
    parts = []
    for i, (name, values) in enumerate(pairs.items()):
        parts.append(_text(4, 26 * i + 18, name))
        for j, (value, colour) in enumerate(zip(values, COLOURS)):
            parts.append(
                f'<rect x="110" y="{26 * i + 5 + 9 * j}" width="{540 * value:.1f}" height="8" fill="{colour}"/>'
            )
        parts.append(_text(660, 26 * i + 18, f"{values[0]:.2%} / {values[1]:.2%}"))
    return _svg(780, 26 * len(pairs) + 8, parts)
