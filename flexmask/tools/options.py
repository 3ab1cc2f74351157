"""The options that commands share: fields of `TrainConfig`, and `--json`; what is checked early."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flexmask.data.renderer import RENDERING
from flexmask.errors import DataError, did_you_mean
from flexmask.files import check_target, write_json
from flexmask.plots import check_picture
from flexmask.training.options import TrainConfig

_FIELDS = {field.name: field for field in fields(TrainConfig)}
_TYPES = get_type_hints(TrainConfig)
OPTIONS = tuple(_FIELDS)
_MEANT = {  # what other trainers call them
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "packing": "max_tokens",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "cp_size": "sequence_parallel_size",
    "sp_size": "sequence_parallel_size",
    "context_parallel_size": "sequence_parallel_size",
}
TEMPLATE = ("chat_template", *(name for name in RENDERING if name != "weighting"))


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
        if settings.get("action") == "store_true":  # for one that a run file sets
            no, hidden = f"--no_{name}", argparse.SUPPRESS
            parser.add_argument(no, dest=name, action="store_false", default=False, help=hidden)


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
        return settings | {"action": JsonObject}
    if kind is int:
        settings["action"] = at_least(1)
    return settings | {"type": kind}


def meant_option(name: str, known: Iterable[str], mark: str = "") -> str:
    """`did_you_mean` for the name of an option, which may be that of another trainer."""
    return did_you_mean(_MEANT.get(name, name), known, mark)


def add_number(
    parser: argparse.ArgumentParser, name: str, default: int, text: str, *, lowest: int = 1
) -> None:
    """Add an option that is a number from `lowest` on; `text` is its help."""
    parser.add_argument(
        name,
        type=int,
        action=at_least(lowest),
        default=default,
        metavar="N",
        help=f"{text}; default: {default}",
    )


def add_picture(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add an option that names a picture to draw, PNG or SVG; `text` is its help."""
    parser.add_argument(name, action=_checked(check_picture), metavar="FILE", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which `print_report` heeds."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        action=_checked(_check_json),
        metavar="FILE",
        help="as JSON; without FILE, print it",
    )


def _check_json(path: str, option: str) -> None:
    if path != "-":
        check_target(path, option)


def print_report(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Print a report as text, or as JSON where `--json` names no file; else write it there."""
    print(json.dumps(data, indent=2) if options.json == "-" else text)
    if options.json not in (None, "-"):
        write_json(data, options.json)


def _checked(check: Callable[[Any, str], object]) -> type[argparse.Action]:
    """An action that stores a value unless `check(value, option)` raises a FlexmaskError."""

    class Checked(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            check(values, f"--{self.dest}")
            setattr(namespace, self.dest, values)

    return Checked


def at_least(lowest: int) -> type[argparse.Action]:
    """An action that stores a number from `lowest` on, and refuses others by a DataError."""

    def check(number: int, option: str) -> None:
        if number < lowest:
            raise DataError(f"{option} must be at least {lowest}, got {number}")

    return _checked(check)


class JsonObject(argparse.Action):
    """An option whose value is a JSON object."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        """Store the object, or raise DataError."""
        try:
            value = json.loads(values)
        except json.JSONDecodeError as error:
            raise DataError(f"--{self.dest} is not JSON ({error.msg}): {values}") from None
        if not isinstance(value, dict):
            raise DataError(f"--{self.dest} must be a JSON object, got {values}")
        setattr(namespace, self.dest, value)
