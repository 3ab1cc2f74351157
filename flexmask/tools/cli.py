"""The command line: `flexmask COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from flexmask import __version__
from flexmask.errors import FlexmaskError
from flexmask.tools.demo.command import add_demo, run_demo
from flexmask.tools.plan.command import add_plan, run_plan
from flexmask.tools.prepare.command import add_prepare, run_prepare
from flexmask.tools.show.command import add_show, run_show
from flexmask.tools.train.command import add_train, run_train
from flexmask.tools.verify.command import add_verify, run_verify

_COMMANDS = {
    "plan": run_plan,
    "show": run_show,
    "verify": run_verify,
    "prepare": run_prepare,
    "demo": run_demo,
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The codes: 0 done, 1 not proved, 2 unusable input (one line says why), 130 stopped.
    """
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    options, others = parser.parse_known_args([_with_underscores(word) for word in given])
    if others and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if options.command == "train":
            sys.exit(run_train(options, others))
        sys.exit(_COMMANDS[options.command](options))
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_plan, add_show, add_verify, add_prepare, add_train, add_demo):
        add(commands)
    return parser
