"""The command line: `flexmask COMMAND DATA... [options]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from flexmask import __version__
from flexmask.errors import FlexmaskError
from flexmask.tools.demo import command as demo
from flexmask.tools.plan import command as plan
from flexmask.tools.prepare import command as prepare
from flexmask.tools.show import command as show
from flexmask.tools.train import command as train
from flexmask.tools.verify import command as verify


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The codes: 0 done, 1 not proved, 2 unusable input (one line says why), 130 stopped.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [_with_underscores(word) for word in given]
    try:
        if words[:1] == ["train"] and not {"-h", "--help"} & set(words):
            sys.exit(train.run(words[1:]))  # whose options are also the Trainer's
        options = _parser().parse_args(words)
        sys.exit(options.run(options))
    except FlexmaskError as error:
        print(f"flexmask: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("flexmask: stopped", file=sys.stderr)
        sys.exit(130)


def _with_underscores(word: str) -> str:
    """An option spelled --like-this as --like_this, the way that the Trainer spells its own."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexmask",
        description="Fine-tune reasoning models on multi-turn conversations in one exact pass.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flexmask {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (plan, show, verify, prepare, train, demo):
        name, usage = command.USAGE.split()[0], f"flexmask {command.USAGE} [options]"
        added = commands.add_parser(name, usage=usage, help=command.HELP, allow_abbrev=False)
        added.set_defaults(run=command.run)
        command.add_arguments(added)
    return parser
