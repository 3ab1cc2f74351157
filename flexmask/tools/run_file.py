"""One YAML file for a run: it stands for the words of a command line, by the names of options.

A value is the text that is written, and means what it would on the command line: YAML by itself
takes 1e-5 for text and `no` for false. So argparse checks all of it once more, in one way.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from itertools import takewhile
from math import isfinite
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from flexmask.errors import DataError, one_line
from flexmask.tools.options import OPTIONS, JsonObject, meant_option

SUFFIXES = (".yaml", ".yml")
_TAG = "tag:yaml.org,2002:"
_NOT_KEPT = ("resume", "hub_token", "local_rank")  # of one start of a run, or secret


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as it is in JSON."""


class _Dumper(yaml.SafeDumper):
    """The same: a text that reads 1e-5 is written in quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        _TAG + "float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file of options.

    Attributes:
        path: of the file.
        options: for each, how its value is written, and what YAML makes of it.
    """

    path: str
    options: dict[str, tuple[yaml.Node, Any]]

    def words(self, parser: argparse.ArgumentParser, without: Collection[str] = ()) -> list[str]:
        """The words that stand for the options that a parser has, DATA first.

        Args:
            parser: of a command; one that has no --model takes the model's tokenizer.
            without: options to pass over.

        Raises:
            DataError: a value is not what its option takes.
        """
        actions, options = option_actions(parser), self.options
        if "model" in options and "model" not in actions:
            options = {"tokenizer": options["model"]} | options
        data, words = [], []
        for name, (node, value) in options.items():
            if name not in actions or name in without or value is None:
                continue
            action = actions[name]
            if isinstance(value, bool) and (_is_flag(action) or action.nargs == "?"):
                words += _switch(name, action, value)
                continue
            texts = self._texts(name, action, node, value)
            if not action.option_strings:
                data += texts
            elif len(texts) == 1:
                words.append(f"--{name}={texts[0]}")  # which may begin with a dash
            else:
                words += [f"--{name}", *texts]
        return data + words

    def check_keys(self, parser: argparse.ArgumentParser) -> None:
        """Raise DataError for a key that is no option of a parser or of training."""
        known = {*option_actions(parser), *OPTIONS}
        if not known >= self.options.keys():
            from transformers import TrainingArguments

            known |= {field.name for field in fields(TrainingArguments)}
        for name, (node, _) in self.options.items():
            if name not in known:
                raise DataError(
                    f"{self._place(node)}: unknown key {name}{meant_option(name, known)}; keys are "
                    "the options of `flexmask train --help` and of transformers.TrainingArguments"
                )

    def _place(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def _texts(self, name: str, action: argparse.Action, node: yaml.Node, value: Any) -> list[str]:
        """The words of a value, or DataError where the option does not take it."""
        if _takes_json(action) and not isinstance(value, str):
            return [json.dumps(value, default=str)]
        several = isinstance(value, list) and action.nargs in ("+", "*")
        nodes = node.value if several else [node]
        texts = [one.value for one in nodes if _fits(action, one)]
        if len(texts) > 1 or not action.option_strings:  # where a dash begins an option
            texts = [text for text in texts if not text.startswith("-")]
        if texts and len(texts) == len(nodes):
            return texts
        is_text = isinstance(node, yaml.ScalarNode)
        got = node.value if is_text else json.dumps(value, default=str)
        raise DataError(
            f"{self._place(node)}: {name} must be {_wanted(action)}, got "
            f"{shorten(got, 100, placeholder=' ...')}"
        )


def read_run_file(path: str) -> RunFile:
    """The options in a YAML file; DataError where it holds none, or one of them twice."""
    try:
        loader = _Loader(Path(path).read_text("utf-8"))
        node = loader.get_single_node()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        read = [
            (str(key.value), value, loader.construct_object(value, True)) for key, value in pairs
        ]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: is not YAML: {one_line(error)}") from None
    if not read:
        raise DataError(f"{path}: holds no options; write one a line, such as `max_tokens: 16384`")
    file = RunFile(path, {})
    for key, written, value in read:
        name = key.replace("-", "_")
        if name in file.options:
            raise DataError(f"{file._place(written)}: {name} is there twice; leave out one")
        file.options[name] = (written, value)
    return file


def with_run_file(
    words: Sequence[str], parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> tuple[list[str], RunFile | None]:
    """The words behind a command, in place of a run file its own, so that the others win."""
    if not words or not words[0].endswith(SUFFIXES):
        return list(words), None
    file = read_run_file(words[0])
    data = list(takewhile(lambda word: not word.startswith("-"), words[1:]))
    given = file.words(parser, [*without, "data"] if data else without)
    return [*data, *given, *words[1 + len(data) :]], file


def option_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser, and its DATA, by their names."""
    known: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.default != argparse.SUPPRESS:  # as --help has it
            known.setdefault(action.dest, action)  # --no_NAME comes later
    return known


def to_yaml(options: Mapping[str, Any]) -> str:
    """The run file of these options; what is None or empty is left out."""
    kept = {name: _plain(options[name]) for name in options if name not in _NOT_KEPT}
    kept = {name: value for name, value in kept.items() if value not in (None, [])}
    return yaml.dump(kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def text_or_json(text: str) -> Any:
    """The object or list of a text in JSON, or else the text."""
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, (dict, list)):
            return value
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _takes_json(action: argparse.Action) -> bool:
    return isinstance(action, JsonObject) or action.type is text_or_json


def _is_flag(action: argparse.Action) -> bool:
    return action.nargs == 0 or getattr(action.type, "__name__", "") == "string_to_bool"


def _switch(name: str, action: argparse.Action, on: bool) -> list[str]:
    """The words of true or false, for an option that can stand alone."""
    if action.nargs == 0:
        return [f"--{name}" if on else f"--no_{name}"]
    if _is_flag(action):
        return [f"--{name}={'true' if on else 'false'}"]
    return [f"--{name}"] if on else []  # such as --fsdp


def _fits(action: argparse.Action, node: yaml.Node) -> bool:
    """Whether the option takes what is written for a value of it."""
    if not isinstance(node, yaml.ScalarNode):
        return False
    if _is_flag(action) or (node.tag == _TAG + "bool" and action.choices is None):
        return False
    try:
        value = action.type(node.value) if callable(action.type) else node.value
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or value in action.choices


def _wanted(action: argparse.Action) -> str:
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    if _is_flag(action):
        return "true or false"
    kind = {int: "a whole number", float: "a number"}.get(action.type, "text")  # type: ignore[call-overload]
    return f"{kind}, or a list of it" if action.nargs in ("+", "*") else kind
