"""The options that say how conversations are rendered, the same for every command that does."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flexmask.errors import DataError


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Add `--chat_template` and `--chat_template_kwargs`."""
    add = parser.add_argument
    add("--chat_template", metavar="FILE", help="a Jinja file; default: the tokenizer's own")
    add(
        "--chat_template_kwargs",
        metavar="JSON",
        help="settings for the template, such as '{\"enable_thinking\": true}'",
    )


def read_template_kwargs(text: str | None) -> dict[str, Any] | None:
    """What `--chat_template_kwargs` says, None where it was left out.

    Raises:
        DataError: it is no JSON object.
    """
    if text is None:
        return None
    try:
        variables = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"--chat_template_kwargs is not JSON ({error.msg}): {text}") from None
    if not isinstance(variables, dict):
        raise DataError(f"--chat_template_kwargs must be a JSON object, got {text}")
    return variables
