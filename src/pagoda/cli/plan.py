"""`pagoda plan MODEL`: what fits on which devices and how fast it can be, without loading weights or needing a GPU."""

import argparse
import dataclasses
import json

from pagoda.cli.flags import BOOL, Parser, add_config_flags, config_from
from pagoda.config import EngineConfig
from pagoda.errors import DeviceError, UsageError

KNOBS = ("tp", "weight_format", "quant_policy", "dtype", "cache_max_entry_count", "cache_block_seq_len",
         "max_prefill_token_num", "rope_scaling_factor")  # fmt: skip


def make_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Tell what fits on which devices, and how fast it can be, by arithmetic.")
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with config.json (no weights needed), a workspace, ..."
    )
    parser.add_argument("--gpu", default="h200", help="kind of device (default: h200)")
    parser.add_argument("--concurrency", type=int, metavar="N", default=64, help="sessions at once (default: 64)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of each session (default: the model's, <= 8192)"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="prompt of the first-token time (default: up to 1024)")
    parser.add_argument("--json", **BOOL, default=False, help="print one JSON object")
    add_config_flags(parser, EngineConfig, "engine", KNOBS)
    return parser


def run(args: argparse.Namespace) -> int:
    from pagoda.engine import roofline
    from pagoda.models.find import resolve_model
    from pagoda.models.loader import resolve_spec
    from pagoda.models.spec import session_len

    if args.gpu not in roofline.DEVICES:
        raise UsageError(f"--gpu {args.gpu} is unknown: use one of {', '.join(roofline.DEVICES)}.")
    spec, config = resolve_spec(resolve_model(args.model), config_from(args, EngineConfig))
    context = args.context or min(session_len(spec, config), 8192)
    prompt = args.prompt or min(1024, context)
    if min(args.concurrency, context, prompt) < 1 or prompt > context:
        raise UsageError("--concurrency, --context and --prompt must be 1 or more, and the prompt within the context.")
    if config.tp > spec.num_heads:
        raise UsageError(f"tp {config.tp} is more than the model's {spec.num_heads} attention heads: lower --tp.")
    config = config.replace(session_len=context, max_batch_size=args.concurrency)
    try:
        found: roofline.Prediction | None = roofline.predict(spec, config, args.gpu, prompt)
        why = ""
    except DeviceError as error:
        found, why = None, str(error)
    same = roofline.smallest_fit(spec, config, prompt, [args.gpu])
    least = roofline.smallest_fit(spec, config, prompt, list(roofline.DEVICES))
    if args.json:
        print(json.dumps(_facts(found, why, same, least, roofline.DEVICES[args.gpu].origin)))
    else:
        print("\n".join(_lines(args, config.tp, found, why, same, least, roofline.DEVICES[args.gpu].origin)))
    return 0


def _facts(found, why: str, same, least, origin: str) -> dict:
    """The plan as plain data; bytes are those of one rank."""
    short = [None if p is None else {"gpu": p.gpu, "tp": p.tp} for p in (same, least)]
    facts = {"fits": found is not None and found.fits, "smallest_of_this_gpu": short[0], "smallest": short[1]}
    if found is None:
        return {**facts, "error": why}
    memory = {**dataclasses.asdict(found.memory), "num_tokens": found.memory.num_tokens}
    sessions = found.memory.num_tokens // found.context
    return {**dataclasses.asdict(found), "memory": memory, "sessions_that_fit": sessions, "figures": origin, **facts}


def _lines(args: argparse.Namespace, tp: int, found, why: str, same, least, origin: str) -> list[str]:
    lines = [f"{args.model} on {tp} x {args.gpu} ({origin})"]
    if found is None:
        lines.append(f"does not fit: {why}")
    else:
        each = " on each device" if tp > 1 else ""
        lines += [line + each if n < 2 else line for n, line in enumerate(found.memory.lines())]
        lines += [
            f"sessions   {found.memory.num_tokens // found.context} of {found.context} tokens fit, "
            f"{found.concurrency} are wanted: {'fits' if found.fits else 'does not fit'}",
            f"decode     {found.tokens_per_second:.0f} tokens/s with {found.running} sessions of {found.context} "
            f"tokens ({found.tokens_per_second / found.running:.1f} each; limit {found.limit_tokens_per_second:.0f})",
            f"prompt     {found.first_token_seconds * 1e3:.1f} ms to the first token after {found.prompt} tokens "
            f"(limit {found.limit_first_token_seconds * 1e3:.1f} ms)",
        ]
    for p, what in ((same, f"of this kind ({args.gpu})"), (least, "of any kind")):
        lines.append(f"smallest set-up {what} that fits: " + ("none" if p is None else f"{p.tp} x {p.gpu}"))
    return lines
