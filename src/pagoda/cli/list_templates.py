"""`pagoda list`: the chat templates that have a name."""

import argparse

from pagoda.cli.flags import Parser
from pagoda.text.named_templates import TEMPLATES


def make_parser(prog: str) -> Parser:
    return Parser(prog=prog, description="Print the names of the chat templates, with their other spellings.")


def run(args: argparse.Namespace) -> int:
    width = max(len(t.names[0]) for t in TEMPLATES)
    for template in sorted(TEMPLATES, key=lambda t: t.names[0]):
        print(f"{template.names[0]:<{width}}  {', '.join(template.names[1:])}".rstrip())
    return 0
