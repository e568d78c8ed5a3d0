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
    parser.add_argument("--group-size", type=int, help="check that the 4-bit weights have groups of this size")
    add_config_flags(parser, EngineConfig, "settings written to engine.toml", SETTINGS)
    return parser


def _check_format(folder: Path, config: EngineConfig, wanted: str | None, group_size: int | None) -> None:
    """`UsageError` when the checkpoint is not what the flags say it is."""
    from pagoda.models.spec import read_spec

    quant = read_spec(folder, config).quant
    found = "hf" if quant is None else quant.method
    if wanted is not None and found != {"llama": "hf"}.get(wanted, wanted):
        raise UsageError(f"{folder} is of format {found}, not {wanted}: leave out --model-format.")
    if group_size and (quant is None or quant.group_size != group_size):
        has = "no groups" if quant is None else f"groups of {quant.group_size}"
        raise UsageError(f"The weights of {folder} have {has}, not of {group_size}: leave out --group-size.")


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
    _check_format(folder, config, args.model_format, args.group_size)
    from pagoda.models.convert import write_workspace

    with progress_bar("converting") as progress:
        write_workspace(folder, dst, config, name, progress)
    print(f"{dst} is ready: `pagoda chat {dst}`.")
    return 0
