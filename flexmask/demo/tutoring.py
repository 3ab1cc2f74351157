"""Tutoring conversations: problems with follow-up questions, put together as chat messages.

The same seed gives the same conversations, character by character, on every machine. Each record
holds `messages`, `tools` where the tutor has some, and `answers`: for each assistant message with
a result, the result as it stands there and a formula that gives it from the student's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from random import Random
from typing import Any

from flexmask.demo.calendar_steps import write
from flexmask.demo.tools import SCHEMAS
from flexmask.demo.topics.ages import ages
from flexmask.demo.topics.bags import bags
from flexmask.demo.topics.boxes import boxes
from flexmask.demo.topics.clock import plans
from flexmask.demo.topics.dates import dates
from flexmask.demo.topics.garden import garden
from flexmask.demo.topics.journeys import journey
from flexmask.demo.topics.savings import savings
from flexmask.demo.topics.scores import scores
from flexmask.demo.topics.sequences import sequence
from flexmask.demo.topics.shopping import shopping
from flexmask.demo.turn import Call, Topic, Turn

NUM_CONVERSATIONS = 400
SEED = 2504

# Shopping and dates stand twice: they have the most to say.
TOPICS: tuple[Topic, ...] = (
    shopping,
    shopping,
    dates,
    dates,
    plans,
    bags,
    boxes,
    sequence,
    garden,
    journey,
    ages,
    savings,
    scores,
)

_SYSTEM = (
    "You are a patient tutor. Answer in one or two sentences and name the step that matters.",
    "You are a friendly math tutor for students of about twelve years. Be short and exact.",
    "Help with arithmetic, dates and times. Check every result before you answer.",
    "You are a tutor. Think the problem through, then reply briefly in plain words.",
    "You tutor one student. Later questions often build on earlier answers, so keep track of them.",
)
_SYSTEM_TOOLS = " Use the tools where numbers or dates are awkward."
_STARTS = ("", "", "", "Let me see. ", "Step by step. ", "Okay. ", "One thing after the other. ")
_CLOSINGS = (
    " I give the result and the step behind it.",
    " I keep the answer short and name the main step.",
    " The student may want to go on from here, so the result comes first.",
    " Not every line of this belongs in the answer.",
    " One sentence with the result and its reason will do.",
    " I am sure of it now.",
    " Both ways lead to the same place, so I can answer.",
    " Good, nothing contradicts it.",
)
_OUTROS = (
    " Try to explain it back to me in your own words.",
    " You can check it yourself by going backwards.",
    " Ask me if one of the steps is not clear.",
    " Does that match what you had?",
    " Shall we take it one step further?",
    " Write the steps down, you may need them again.",
)
_INTENTS = (
    "I will use a tool for this.",
    "A tool call makes this safe.",
    "This is easy to get wrong by hand, so I call a tool.",
    "I have a tool for exactly that.",
)
_NEXT_INTENTS = ("Now the next step.", "One more call is needed.", "With that I can go on.")
_BRIDGES = ("New problem. ", "Something else. ", "Next one. ", "Now a different question. ")
_RECALLS = (
    "Before we go on, what was {} again?",
    "Sorry, I did not write it down: what was {}?",
    "Remind me, please. What was {}?",
)
_THANKS = (
    ("Thank you, that helped a lot!", "You are welcome. You asked good questions today."),
    ("Thanks, now I understand it.", "Glad to hear that. Try one like it on your own next."),
    ("Great, that is all for today.", "Well done. Come back whenever you have another problem."),
)


def conversations(number: int = NUM_CONVERSATIONS, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Yields tutoring conversations as JSON-ready records, always the same ones for a seed."""
    for index in range(number):
        yield _conversation(Random(f"{seed}/{index}"), f"tutoring-{index:04d}")


def to_jsonl(records: Iterator[dict[str, Any]]) -> str:
    """Returns records as text, one JSON object a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _conversation(rng: Random, name: str) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name, "messages": []}
    has_tools = rng.random() < 0.3
    if rng.random() < 0.45:
        content = rng.choice(_SYSTEM) + (_SYSTEM_TOOLS if has_tools else "")
        record["messages"].append({"role": "system", "content": content})
    if has_tools:
        record["tools"] = list(SCHEMAS.values())
    record["answers"] = []
    left = _num_turns(rng)
    topics = rng.sample(TOPICS, len(TOPICS))
    for number, topic in enumerate(topics):
        left -= _problem(rng, record, topic, left, bridge=number > 0)
        if left == 1 and rng.random() < 0.6:
            question, reply = rng.choice(_THANKS)
            record["messages"] += [_user(question), {"role": "assistant", "content": reply}]
            left = 0
        if not left:
            break
    return record


def _num_turns(rng: Random) -> int:
    """Returns a number of user turns from 2 to 12, most often 4 or 5."""
    return min(int(rng.triangular(2, 13, 3)), 12)


def _problem(rng: Random, record: dict[str, Any], topic: Topic, left: int, *, bridge: bool) -> int:
    """Adds one problem and its follow-up questions, at most `left` turns; returns how many."""
    turns = list(topic(rng))[:left]
    for number, turn in enumerate(turns):
        question = rng.choice(_BRIDGES) + turn.question if bridge and not number else turn.question
        _add_turn(rng, record, turn, question)
    labelled = [turn for turn in turns if turn.label]
    if len(turns) < left and len(labelled) > 1 and rng.random() < 0.35:
        _add_recall(rng, record, rng.choice(labelled[:-1]))
        return len(turns) + 1
    return len(turns)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _add_recall(rng: Random, record: dict[str, Any], turn: Turn) -> None:
    """Adds a question about an earlier result, which needs no thinking."""
    record["messages"].append(_user(rng.choice(_RECALLS).format(turn.label)))
    reply = f"{turn.label[0].upper()}{turn.label[1:]} was {turn.shown or turn.value}."
    _add_answer(record, {"role": "assistant", "content": reply}, turn)


def _add_turn(rng: Random, record: dict[str, Any], turn: Turn, question: str) -> None:
    """Adds a turn in one of the tutor's manners: with tools, with thinking, or straight away."""
    guess, verdict, praise = _guess(rng, turn)
    record["messages"].append(_user(question + guess))
    message: dict[str, Any] = {"role": "assistant", "content": praise + turn.reply}
    ending = f"{turn.check}{verdict}{_sometimes(rng, 0.5, _CLOSINGS)}"
    if "tools" in record and turn.rounds and rng.random() < 0.75:
        note = _add_calls(rng, record["messages"], turn)
        message["reasoning_content"] = f"{note} {ending}"
    elif guess or len(turn.work) > 60 or rng.random() < 0.5:
        message["reasoning_content"] = f"{rng.choice(_STARTS)}{turn.plan}\n{turn.work}\n{ending}"
    message["content"] += _sometimes(rng, 0.25, _OUTROS)
    _add_answer(record, message, turn)


def _sometimes(rng: Random, chance: float, choices: tuple[str, ...]) -> str:
    return rng.choice(choices) if rng.random() < chance else ""


def _add_answer(record: dict[str, Any], message: dict[str, Any], turn: Turn) -> None:
    record["answers"].append(
        {"message": len(record["messages"]), "value": turn.value, "formula": turn.formula}
    )
    record["messages"].append(message)


def _guess(rng: Random, turn: Turn) -> tuple[str, str, str]:
    """Returns the student's own guess, what the tutor thinks of it, and how the reply begins."""
    if not turn.value.isdigit() or int(turn.value) < 8 or rng.random() > 0.15:
        return "", "", ""
    value = int(turn.value)
    if rng.random() < 0.4:
        said = rng.choice([f" I get {value}.", f" Is it {value}?"])
        return (
            said,
            f" The student said {value}, which is right.",
            rng.choice(["Yes. ", "Exactly. "]),
        )
    off = rng.choice([-3, -2, -1, 1, 2, 4])
    said = rng.choice([f" I get {value + off}.", f" My guess is {value + off}."])
    thought = (
        f" The student said {value + off}. {value + off} - {value} = {off}, so it is near but "
        "wrong."
    )
    return said, thought, rng.choice(["Not quite. ", "Close, but not exactly. "])


def _add_calls(rng: Random, messages: list[dict[str, Any]], turn: Turn) -> str:
    """Adds the tool calls of a turn and their results; returns a remark on the last results."""
    note = turn.plan
    for number, calls in enumerate(turn.rounds):
        intent = rng.choice(_NEXT_INTENTS if number else _INTENTS)
        thought, note = f"{note} {intent}", _remark(calls)
        ids = [f"call_{len(messages)}_{number}" for number in range(len(calls))]
        messages.append(
            {
                "role": "assistant",
                "reasoning_content": thought,
                "content": rng.choice(["", "", "Let me check that."]),
                "tool_calls": [_tool_call(*pair) for pair in zip(ids, calls, strict=True)],
            }
        )
        messages += [_tool_result(*pair) for pair in zip(ids, calls, strict=True)]
    return note


def _tool_call(identifier: str, call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": identifier, "type": "function", "function": function}


def _tool_result(identifier: str, call: Call) -> dict[str, Any]:
    content = json.dumps(call.result)
    return {"role": "tool", "tool_call_id": identifier, "name": call.name, "content": content}


def _remark(calls: tuple[Call, ...]) -> str:
    """Returns what the tutor reads in the results of one round."""
    return " ".join(_reading(call) for call in calls)


def _reading(call: Call) -> str:
    if call.name == "calculator":
        return f"The calculator says {call.arguments['expression']} = {call.result['result']}."
    if call.name == "days_between":
        return f"The tool counts {call.result['days']} days."
    day = date.fromisoformat(call.result["date"])
    return f"The tool answers {write(day)}, a {call.result['weekday']}."
