"""`pagoda convert [NAME] PATH`: a checkpoint becomes a workspace."""

import argparse
from pathlib import Path

from pagoda.cli.flags import Parser, add_config_flags, config_from
from pagoda.cli.progress import progress_bar
from pagoda.config import EngineConfig
from pagoda.errors import UsageError

SETTINGS = ("tp", "session_len", "max_batch_size", "cache_max_entry_count", "cache_block_seq_len", "quant_policy",
            "rope_scaling_factor", "use_logn_attn", "load_format", "weight_format")  # fmt: skip
FORMATS = ("hf", "llama", "awq", "gptq")


def make_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, usage=f"{prog} [NAME] MODEL [flags]", description="Convert a checkpoint to a workspace.")
    parser.add_argument("words", nargs="+", metavar="[NAME] MODEL", help="template's name (see `list`), checkpoint")
    parser.add_argument("--dst-path", default="./workspace", help="folder to write (default: ./workspace)")
    parser.add_argument("--model-name", help="the chat template's name, instead of NAME")
    parser.add_argument("--model-format", choices=FORMATS, help="check that the checkpoint is of this format")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), help="cpu: pack the weights for CPUs, so that starting is reading the file"
    )
    parser.add_argument("--group-size", type=int, help="check that the 4-bit weights have groups of this size")
    add_config_flags(parser, EngineConfig, "settings written to engine.toml", SETTINGS)
    return parser


def run(args: argparse.Namespace) -> int:
    if len(args.words) > 2:
        raise UsageError(f"convert takes [NAME] MODEL, not {len(args.words)} words.")
    *names, model = args.words
    name = names[0] if names else args.model_name
    if name is not None:
        from pagoda.text.template import require_name

        require_name(name)
    config = config_from(args, EngineConfig)
    from pagoda.models.find import resolve_model

    folder, dst = resolve_model(model), Path(args.dst_path)
    from pagoda.models.convert import write_workspace

    with progress_bar("converting") as progress:
        form = {"llama": "hf"}.get(args.model_format, args.model_format)
        write_workspace(folder, dst, config, name, progress, model_format=form, group_size=args.group_size or 0)
    print(f"{dst} is ready: `pagoda chat {dst}`.")
    return 0
