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

from chat_cases import CASES, chat_case, hand_rendered
from chat_tokenizer import chat_templates, chat_tokenizer
from jinja2.exceptions import TemplateError as JinjaError

from flexmask.data.renderer import render_samples
from flexmask.data.template import announce_once
from flexmask.data.thinking import thinking_rule
from flexmask.errors import TemplateError
from flexmask.tree.sample import Sample

PATH = Path(__file__).parent.parent / "docs" / "templates.md"
TRL = f"TRL {version('trl')}"
_HEAD = f"""# Chat templates

<!-- Written by `python tests/template_table.py`; a test compares it. -->

flexmask renders every turn with the tokenizer's own chat template: the prompt as at inference, then
what the template writes for the message, up to the stop token. This table holds every chat template
that {TRL} ships for inference, image models included, and those of models that it does not ship
(deepseek_v3_1, deepseek_v4, gemma4_v5_large, glm_4_7, glm_5_3, kimi_*, minimax_*; written anew from
public sources, see [tests/templates](../tests/templates/README.md)), on text-only conversations of
several turns.

- **exact**: token for token what rendering each turn by hand gives.
- **composed**: the template does not continue its own prompt, and leaves open how the turn goes on;
  the turn is put together as its note says, with a warning.
- **refused**: the template cannot write the conversation without losing something; an error names
  the message and the reason. Nothing is trained.

The columns are the features of the conversation: a system message, thinking, tool calls. The last
one names [what becomes of earlier thinking](thinking-history.md); *partly preserved*: tool calls
keep theirs, answers do not. A row with a setting passes it in `chat_template_kwargs`, and is there
only where that changes something.

GLM ends its turn with the role of the next one, `<|user|>` after an answer, `<|observation|>`
after a tool call, and its template writes that as part of the next message. flexmask looks it up
there and trains it as the stop token, after the last message too.

DeepSeek V3.2 and V4 ship an encoder in Python (`encoding/`) and no template. flexmask renders with
any tokenizer's own `apply_chat_template`: in Python, give `render_samples` or `TreeCollator` a
tokenizer with one that calls the encoder, as serving engines make it; for a command, give a Jinja
template that writes the same (`--chat_template FILE`). deepseek_v4 here is such a tokenizer.

gemma4_v5_large is TRL's gemma4_v5 with the empty thought that Gemma 4 of 12B and more adds to its
prompt while thinking is off.

"""
# None, and every setting that changes what templates do with thinking.
SETTINGS: list[dict[str, Any]] = [
    {},
    *({"enable_thinking": value} for value in (True, False)),
    *({"thinking": value} for value in (True, False)),
    *({"thinking_mode": value} for value in ("enabled", "disabled")),
    {"preserve_thinking": True},
    {"preserve_thinking": False},
    {"clear_thinking": False},
    {"truncate_history_thinking": False},
    {"thinking": True, "drop_thinking": False},
]
_SPLIT = re.compile(r": the prompt has .*?; ")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "exact", "composed" or "refused", why, and the samples.

    `history` names what the template does with the thinking of earlier turns.
    """

    verdict: str
    notes: tuple[str, ...]
    samples: tuple[Sample, ...]
    history: str


@cache
def settings_of(name: str) -> list[dict[str, Any]]:
    """The settings that a template is tried with: none, and those of `SETTINGS` that change it."""
    found: dict[str, dict[str, Any]] = {}
    for settings in SETTINGS:
        if all(key in chat_templates()[name] for key in settings):
            found.setdefault(_texts(name, tuple(settings.items())), settings)
    return list(found.values())


def _texts(name: str, settings: tuple[tuple[str, Any], ...]) -> str:
    """What a template writes for the cases with thinking, or why it does not."""
    texts: list[object] = []
    for case in ("thinking", "thinking+tools"):
        messages, tools = chat_case(case)
        for index in (1, len(messages) - 1):
            try:
                texts += hand_rendered(
                    chat_tokenizer(name), messages, index, tools, **dict(settings)
                )
            except (TypeError, JinjaError) as error:
                texts.append(str(error))
    return repr(texts)


def outcome(name: str, case: str, settings: dict[str, Any]) -> Outcome:
    """The outcome of a case with a template; rendered once a process."""
    return _outcome(name, case, tuple(settings.items()))


@cache
def _outcome(name: str, case: str, settings: tuple[tuple[str, Any], ...]) -> Outcome:
    messages, tools = chat_case(case)
    tokenizer = chat_tokenizer(name)
    rule = thinking_rule(tokenizer, tools, dict(settings)).history
    announce_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            samples = render_samples(
                messages, tokenizer, tools=tools, chat_template_kwargs=dict(settings)
            )
        except TemplateError as error:
            text = re.sub(r"^message \d+: ", "", str(error))
            return Outcome("refused", (_SPLIT.sub("; ", text),), (), rule)
    notes = tuple(str(warning.message) for warning in caught)
    composed = any("completed" in note or "composed" in note for note in notes)
    return Outcome("composed" if composed else "exact", notes, tuple(samples), rule)


def history(name: str, settings: dict[str, Any]) -> str:
    """What later prompts hold of the thinking; "" where none can be written."""
    plain, calls = (outcome(name, case, settings) for case in ("thinking", "thinking+tools"))
    if plain.verdict == "refused":
        return ""
    same = plain.history == calls.history
    return plain.history if same else f"{calls.history} with tools, else {plain.history}"


def template_table() -> str:
    """The text of docs/templates.md."""
    notes: list[str] = []
    columns = ["template", *(case.replace("+", " + ") for case in CASES), "history"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in chat_templates():
        rows: list[list[str]] = []
        for settings in settings_of(name):
            row = []
            for one in (outcome(name, case, settings) for case in CASES):
                notes += [note for note in one.notes if note not in notes]
                row.append(" ".join([one.verdict, *(str(notes.index(n) + 1) for n in one.notes)]))
            row.append(history(name, settings))
            if row not in rows[:1]:
                rows.append(row)
                cell = name + "".join(f", `{key}={value}`" for key, value in settings.items())
                lines.append("| " + " | ".join([cell, *row]) + " |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return _HEAD + "\n".join([*lines, "", "Notes:", "", *numbered, ""])


if __name__ == "__main__":
    PATH.write_text(template_table(), encoding="utf-8")
