"""The command line: `flexmask COMMAND DATA... [options]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

from flexmask import __version__
from flexmask.errors import FlexmaskError
from flexmask.tools.demo import command as demo
from flexmask.tools.inputs import check_inputs
from flexmask.tools.plan import command as plan
from flexmask.tools.prepare import command as prepare
from flexmask.tools.run_file import with_run_file
from flexmask.tools.show import command as show
from flexmask.tools.train import command as train
from flexmask.tools.verify import command as verify


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The codes: 0 done, 1 not proved, 2 unusable input (one line says why), 130 stopped.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [_with_underscores(word) for word in given]
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Output(sys.stderr)):
        try:
            _run(words)
        finally:
            sys.stdout.flush()


def _run(words: list[str]) -> NoReturn:
    try:
        if words[:1] == ["train"] and not {"-h", "--help"} & set(words):
            sys.exit(train.run(words[1:]))  # whose options are also the Trainer's
        parser, commands = _parsers()
        command, file = commands.get(words[0] if words else ""), None
        if command is not None:  # "output" is that of training
            words[1:], file = with_run_file(words[1:], command, without=("output",))
        options = parser.parse_args(words)
        check_inputs(options)
        if file is not None and command is not None:
            file.check_keys(command)
        sys.exit(options.run(options))
    except FlexmaskError as error:
        print(f"flexmask: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # with what is to be said of it, or nothing
        print(" ".join(["flexmask: stopped", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)


def _with_underscores(word: str) -> str:
    """An option spelled --like-this as --like_this, the way that the Trainer spells its own."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of its commands."""
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
    return parser, commands.choices


class _Output:
    """A stream of this process that nobody need read to its end, as in `flexmask plan ... | head`.

    From where the reader has left, what is written goes nowhere, and the command goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, use: Callable[[], int | None]) -> int | None:
        try:
            return use()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None
