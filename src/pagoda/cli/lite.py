"""`lmdeploy lite calibrate | kv_qparams | auto_awq | smooth_quant`: the spellings that users of older versions know."""

import argparse
from collections.abc import Callable
from pathlib import Path

from pagoda.cli.flags import BOOL, Parser
from pagoda.cli.quantize import add_calibration_flags, step_printer
from pagoda.errors import UsageError

WORDS = ("calibrate", "kv_qparams", "auto_awq", "smooth_quant")
OWN = {  # flags that belong to some of the words only
    "turbomind_dir": ("kv_qparams",), "kv_bits": ("kv_qparams",), "kv_sym": ("kv_qparams",), "num_tp": ("kv_qparams",),
    "w_bits": ("auto_awq",), "w_sym": ("auto_awq",), "w_group_size": ("auto_awq",),
    "model": ("calibrate", "auto_awq", "smooth_quant"),
}  # fmt: skip


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} calibrate | auto_awq | smooth_quant [MODEL] [flags]\n"
        f"       {prog} kv_qparams --work-dir DIR --turbomind-dir WORKSPACE [flags]",
        description="calibrate: statistics of activations, keys and values. kv_qparams: from these, fixed ranges of an "
        "int8 KV cache, into a workspace. auto_awq, smooth_quant: quantized checkpoints.",
    )
    parser.add_argument("words", nargs="*", metavar="MODEL", help="or --model; kv_qparams: WORK_DIR WORKSPACE")
    parser.add_argument("--model", metavar="MODEL", help="16-bit checkpoint")
    parser.add_argument("--turbomind-dir", metavar="DIR", help="kv_qparams: the workspace")
    parser.add_argument("--kv-bits", type=int, metavar="N", help="kv_qparams: 8")
    parser.add_argument("--kv-sym", **BOOL, help="kv_qparams: ranges around 0")
    parser.add_argument("--num-tp", type=int, metavar="N", help="kv_qparams: as the workspace says; not needed")
    parser.add_argument("--w-bits", type=int, metavar="N", help="auto_awq: 4")
    parser.add_argument("--w-sym", **BOOL, help="auto_awq: False")
    parser.add_argument("--w-group-size", type=int, metavar="N", help="auto_awq: 32, 64 or 128 (default)")
    add_calibration_flags(parser, 2048)
    return parser


def run(args: argparse.Namespace) -> int:
    word = args.first_word
    if word is None:
        raise UsageError(f"lite needs one of the words {', '.join(WORDS)} first.")
    for name, words in OWN.items():
        if getattr(args, name) is not None and word not in words:
            raise UsageError(f"--{name.replace('_', '-')} does not belong to lite {word}.")
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "calibrate": _calibrate, "kv_qparams": _kv_qparams, "auto_awq": _produce, "smooth_quant": _produce,
    }  # fmt: skip
    return actions[word](args)


def _source(args: argparse.Namespace):
    from pagoda.quantize.produce import Calibration, Source

    given = [*args.words, *([args.model] if args.model else [])]
    if len(given) != 1:
        raise UsageError(f"lite {args.first_word} takes one MODEL, not {len(given)}.")
    calibration = Calibration(args.calib_dataset, args.calib_samples, args.calib_seqlen, args.device)
    return Source(given[0], calibration)


def _calibrate(args: argparse.Namespace) -> int:
    from pagoda.quantize.kv_ranges import write_stats
    from pagoda.quantize.produce import calibrate

    write_stats(Path(args.work_dir), calibrate(_source(args), step_printer("calibrating")))
    print(f"{args.work_dir} holds inputs_stats, outputs_stats, key_stats and value_stats (.safetensors).")
    return 0


def _kv_qparams(args: argparse.Namespace) -> int:
    from pagoda.quantize.kv_ranges import write_kv_ranges

    if args.kv_bits not in (None, 8):
        raise UsageError(f"kv_qparams makes ranges of 8 bits, not {args.kv_bits}: the int4 cache needs none.")
    if len(args.words) > 2:
        raise UsageError(f"kv_qparams takes WORK_DIR and WORKSPACE, not {len(args.words)} words.")
    stats, workspace = (*args.words, args.work_dir, args.turbomind_dir)[:2] if args.words else (args.work_dir, None)
    if len(args.words) < 2:
        workspace = args.turbomind_dir or "./workspace"
    path = write_kv_ranges(Path(stats), Path(workspace), bool(args.kv_sym))
    print(f'{path} is written; `quant_policy = "int8"` in {workspace}/engine.toml makes the cache use it.')
    return 0


def _produce(args: argparse.Namespace) -> int:
    from pagoda.quantize.produce import quantize_model
    from pagoda.quantize.recipe import Recipe

    if args.w_bits not in (None, 4):
        raise UsageError(f"auto_awq makes weights of 4 bits, not {args.w_bits}: smooth_quant makes 8 bits.")
    if args.w_sym:
        raise UsageError("auto_awq makes weights with zero points: leave out --w-sym.")
    method = "awq" if args.first_word == "auto_awq" else "smooth"
    settings = {"dataset": args.calib_dataset, "samples": args.calib_samples, "length": args.calib_seqlen}
    recipe = Recipe(method, args.w_group_size or 128)
    produced = quantize_model(_source(args), Path(args.work_dir), recipe, settings, step_printer("quantizing"))
    print(f"{produced.folder} is ready after {produced.seconds:.0f} s: `lmdeploy convert` or chat with it.")
    return 0
