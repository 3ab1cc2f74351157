"""The table of docs/templates.md: what becomes of every chat template that TRL ships.

Run `python tests/template_table.py` to write the file anew.
"""

import re
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chat_cases import CASES, chat_case
from chat_tokenizer import chat_templates, chat_tokenizer

from flexmask.data.samples import render_samples
from flexmask.data.template import _announce
from flexmask.errors import TemplateError
from flexmask.tree.sample import Sample

PATH = Path(__file__).parent.parent / "docs" / "templates.md"
TRL = f"TRL {version('trl')}"
_HEAD = f"""# Chat templates

<!-- Written by `python tests/template_table.py`; a test compares it. -->

flexmask renders every turn with the tokenizer's own chat template: the prompt as at inference, then
what the template writes for the message, up to the stop token. This table holds every chat template
that {TRL} ships for inference, image models included, on text-only conversations of several
turns. gemma4_v5_large is TRL's gemma4_v5 with the empty thought that Gemma 4 of 12B and more adds
to its prompt while thinking is off.

- **exact**: token for token what rendering each turn by hand gives.
- **composed**: the template does not continue its own prompt, and leaves open how the turn goes on;
  the turn is put together as its note says, with a warning.
- **refused**: the template cannot write the conversation without losing something; an error names
  the message and the reason. Nothing is trained.

The columns are the features of the conversation: a system message, thinking, tool calls. A row with
a setting passes it in `chat_template_kwargs`, and is there only where that changes something.

GLM-4 ends its turn with the role of the next one, `<|user|>` after an answer, `<|observation|>`
after a tool call, and its template writes that as part of the next message. flexmask looks it up
there and trains it as the stop token, after the last message too.

"""
_SPLIT = re.compile(r": the prompt has .*?; ")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "exact", "composed" or "refused", why, and the samples."""

    verdict: str
    note: str
    samples: list[Sample]


def settings_of(name: str) -> list[dict[str, Any]]:
    """The settings under which a template is tried: none, and both values of enable_thinking."""
    if "enable_thinking" not in chat_templates()[name]:
        return [{}]
    return [{}, {"enable_thinking": True}, {"enable_thinking": False}]


def outcome(name: str, case: str, settings: dict[str, Any]) -> Outcome:
    """The outcome of a case with a template; rendered once a process."""
    return _outcome(name, case, tuple(settings.items()))


@cache
def _outcome(name: str, case: str, settings: tuple[tuple[str, Any], ...]) -> Outcome:
    messages, tools = chat_case(case)
    _announce.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            samples = render_samples(
                messages, chat_tokenizer(name), tools=tools, chat_template_kwargs=dict(settings)
            )
        except TemplateError as error:
            text = re.sub(r"^message \d+: ", "", str(error))
            return Outcome("refused", _SPLIT.sub("; ", text), [])
    notes = [str(warning.message) for warning in caught]
    assert len(notes) < 2, notes
    composed = any("completed" in note or "composed" in note for note in notes)
    return Outcome("composed" if composed else "exact", "".join(notes), samples)


def template_table() -> str:
    """The text of docs/templates.md."""
    notes: list[str] = []
    lines = [
        "| template | " + " | ".join(case.replace("+", " + ") for case in CASES) + " |",
        "|---" * (len(CASES) + 1) + "|",
    ]
    for name in chat_templates():
        default: list[tuple[str, str]] = []
        for settings in settings_of(name):
            found = [outcome(name, case, settings) for case in CASES]
            outcomes = [(one.verdict, one.note) for one in found]
            if outcomes == default:
                continue
            default = default or outcomes
            cells = [name + "".join(f", `{key}={value}`" for key, value in settings.items())]
            for verdict, note in outcomes:
                if note and note not in notes:
                    notes.append(note)
                cells.append(f"{verdict} {notes.index(note) + 1}" if note else verdict)
            lines.append("| " + " | ".join(cells) + " |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return _HEAD + "\n".join([*lines, "", "Notes:", "", *numbered, ""])


if __name__ == "__main__":
    PATH.write_text(template_table(), encoding="utf-8")
