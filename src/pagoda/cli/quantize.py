"""`pagoda quantize MODEL`: a 16-bit checkpoint becomes a quantized one, with a report of what that cost."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pagoda.cli.flags import BOOL, Parser
from pagoda.config import EngineConfig
from pagoda.errors import UsageError

METHODS = ("awq", "gptq", "awq-gptq", "smooth", "fp8", "rtn")  # tests hold this to quantize.recipe


def add_calibration_flags(parser: Parser, seqlen: int) -> None:
    """Which text, how much of it, on which device, and where the result goes."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib-dataset", default="builtin", metavar="FILE",
        help="txt, json, jsonl or parquet file; default: text that Pagoda brings",
    )  # fmt: skip
    group.add_argument("--calib-samples", type=int, default=128, metavar="N", help="sequences (default: 128)")
    group.add_argument(
        "--calib-seqlen", type=int, default=seqlen, metavar="N", help=f"tokens of each (default: {seqlen})"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--work-dir", default="./quant_output", metavar="DIR", help="folder to write (default: ./quant_output)"
    )


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} MODEL [--method awq] [flags]",
        description="Quantize a 16-bit checkpoint, layer by layer; an interrupted run goes on where it stopped. "
        "awq, gptq, awq-gptq, rtn: 4-bit weights; smooth: 8-bit integers (W8A8); fp8: 8-bit floats.",
    )
    parser.add_argument("model", nargs="?", default="mini", metavar="MODEL", help="default: mini, the bundled model")
    parser.add_argument("--method", choices=METHODS, default="awq", help="default: awq")
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="inputs that share a scale: 32, 64, 128"
    )
    parser.add_argument("--act-order", **BOOL, help="GPTQ: large inputs first")
    parser.add_argument("--static", **BOOL, default=False, help="fp8: calibrated scales of the activations")
    add_calibration_flags(parser, 512)
    report = parser.add_argument_group("report")
    report.add_argument("--report", **BOOL, default=True, help="measure before and after (default: True)")
    report.add_argument("--eval-text", metavar="FILE", help="text whose perplexity is measured; default: our own")
    report.add_argument("--questions", type=int, metavar="N", help="of mini's tasks (default: 300 for mini, else none)")
    return parser


def step_printer(what: str) -> Callable[[float], None]:
    """Progress on stderr with the time left: one line that is written over on a terminal, else a line each tenth."""
    started, shown, last = time.monotonic(), "\r{}   " if sys.stderr.isatty() else "{}\n", 0.0

    def show(share: float) -> None:
        nonlocal last
        if share - last < (0.001 if sys.stderr.isatty() else 0.0999) and share < 1:
            return
        passed, last = time.monotonic() - started, share
        left = passed / share - passed if share else 0.0
        sys.stderr.write(shown.format(f"{what}: {share:4.0%}, {passed:.0f} s, {left:.0f} s left"))
        if share >= 1 and sys.stderr.isatty():
            sys.stderr.write("\n")
        sys.stderr.flush()

    return show


def run(args: argparse.Namespace) -> int:
    from pagoda.quantize.evaluate import read_text
    from pagoda.quantize.produce import Calibration, Source, quantize_model
    from pagoda.quantize.recipe import Recipe

    text = None if args.eval_text is None else read_text(Path(args.eval_text))
    recipe = Recipe(args.method, args.group_size, args.act_order, args.static)
    calibration = Calibration(args.calib_dataset, args.calib_samples, args.calib_seqlen, args.device)
    source, folder = Source(args.model, calibration), Path(args.work_dir)
    settings = {"dataset": calibration.source, "samples": calibration.samples, "length": calibration.length}
    try:
        produced = quantize_model(source, folder, recipe, settings, step_printer("quantizing"))
    except KeyboardInterrupt:
        print("\nStopped: the same command goes on from here.", file=sys.stderr)
        raise
    print(f"{folder} is ready after {produced.seconds:.0f} s: `pagoda chat {folder}`.")
    if args.report:
        asked = args.questions if args.questions is not None else 300 if args.model == "mini" else 0
        _report(args.model, recipe, produced, EngineConfig(device=args.device), text, asked)
    return 0


def _report(model: str, recipe, produced, config: EngineConfig, text: str | None, num_questions: int) -> None:
    """Measure, print, and leave `report.json` and `report.html` in the folder."""
    from pagoda.quantize.report import make_report, measure, page, table

    before = measure(model, config, text, num_questions, step_printer("asking before"))
    after = measure(produced.folder, config, text, num_questions, step_printer("asking after"))
    report = make_report(model, recipe, produced, before, after)
    try:
        (produced.folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (produced.folder / "report.html").write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The report cannot be written ({error}): free some space.") from None
    print(table(report))
    print(f"with plots: {produced.folder / 'report.html'}")
