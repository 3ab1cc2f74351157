"""The shape of all commands, and the options that they share: the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flexmask.errors import DataError
from flexmask.training.options import TrainConfig

_FIELDS = {field.name: field for field in fields(TrainConfig)}
_TYPES = get_type_hints(TrainConfig)
OPTIONS = tuple(_FIELDS)

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands[argparse.ArgumentParser],
    usage: str,
    run: Callable[[argparse.Namespace], int] | None,
    **settings: Any,
) -> argparse.ArgumentParser:
    """Add a subcommand, and return its parser.

    Args:
        commands: those of `flexmask`.
        usage: the command with what it requires, such as "plan DATA... --tokenizer PATH_OR_ID".
        run: runs it, and returns the exit code; None where `main` does that by itself.
        settings: its help and what else an `ArgumentParser` takes.
    """
    parser = commands.add_parser(
        usage.split()[0], usage=f"flexmask {usage} [options]", allow_abbrev=False, **settings
    )
    parser.set_defaults(run=run)
    return parser


def add_options(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add options of `TrainConfig`; `data` is positional.

    Args:
        parser: where to add them.
        names: of the fields, in the order of the help.
        changes: arguments of `add_argument` in place of what the field says.
    """
    for name in names:
        settings = _settings(name) | changes
        if name == "data":
            parser.add_argument("data", **settings)
        else:
            parser.add_argument(f"--{name}", **settings)


def _settings(name: str) -> dict[str, Any]:
    """What `add_argument` is told of a field."""
    field, kind = _FIELDS[name], _TYPES[name]
    settings = dict(field.metadata)
    if field.default is not MISSING:
        settings["default"] = field.default
        if field.default:
            value = field.default if isinstance(field.default, (str, int)) else field.default[0]
            settings["help"] += f"; default: {value}"
    elif name != "data":
        settings["required"] = True
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    if kind is bool:
        del settings["metavar"]
        return settings | {"action": "store_true"}
    if get_origin(kind) is Literal:
        return settings | {"choices": get_args(kind)}
    if get_origin(kind) is Sequence:
        return settings | {"nargs": "+"}
    if get_origin(kind) is Mapping:
        return settings | {"action": _JsonObject}
    return settings | {"type": kind}


class _JsonObject(argparse.Action):
    """An option whose value is a JSON object."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            value = json.loads(values)
        except json.JSONDecodeError as error:
            raise DataError(f"--{self.dest} is not JSON ({error.msg}): {values}") from None
        if not isinstance(value, dict):
            raise DataError(f"--{self.dest} must be a JSON object, got {values}")
        setattr(namespace, self.dest, value)
