"""What it costs to bring conversations from messages to trees."""

from __future__ import annotations

import json
import random
import time
import warnings
from pathlib import Path
from typing import Any, cast

from benchmarks.plots import draw_curves
from benchmarks.record import Measurement, Record, Target
from benchmarks.tables import Columns, Table, seconds, table
from benchmarks.timing import spread
from flexmask import build_tree, render_samples
from flexmask.demo import DATA_PATH, TOKENIZER_PATH

TITLE = "Rendering"
ABOUT = """\
Messages to tree, once for each conversation: `render_samples` (every prompt and completion written
by the chat template, checked, and tokenised piece by piece) and `build_tree`. The tokenizer and
template are the shipped ones. Conversations: the shipped tutoring turns end to end, tool calls
included, and turns of 60 user, 300 thinking and 120 answer words, of which every fourth is made of
random letters, since a tokenizer remembers words that it has met. Before: every context must be
what `apply_chat_template` and `encode` give, token for token. Seconds are those that the process
computes, on all of its cores together."""

_WORDS = (60, 300, 120)  # of user, thinking and answer
_ROUNDS = 5
_GOAL_S = 0.5  # one core, for 64 turns


def measure(*, quick: bool) -> Measurement:
    warnings.filterwarnings("ignore", message="the chat template")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # prompts longer than the tiny model's limit are meant here
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    rounds = 1 if quick else _ROUNDS
    measurement = Measurement(settings={"words": _WORDS, "rounds": rounds})
    for num_turns in (4, 6) if quick else (4, 16, 64, 128):
        for kind, messages in (
            ("tutoring", tutoring_turns(num_turns)),
            ("words", word_turns(num_turns, _WORDS)),
        ):
            row = _measure_one(measurement, kind, num_turns, messages, tokenizer, rounds)
            measurement.rows.append(row)
            if num_turns == 64:
                name = f"messages to tree, 64 turns of {kind}, seconds"
                measured = round(row["seconds"]["messages"]["median"], 2)
                measurement.targets.append(Target(name, _GOAL_S, measured, is_most=True))
    return measurement


def _measure_one(
    measurement: Measurement,
    kind: str,
    num_turns: int,
    messages: list[dict[str, Any]],
    tokenizer: Any,
    rounds: int,
) -> dict[str, Any]:
    samples = render_samples(messages, tokenizer)
    contexts = [sample.input_ids[sample.loss_weights == 0].tolist() for sample in samples]
    different = sum(
        context != _context_by_hand(messages[: cast("int", sample.key)], tokenizer)
        for context, sample in zip(contexts, samples, strict=True)
    )
    measurement.check(f"contexts that differ, {num_turns} turns of {kind}", different, 0)
    tree = build_tree(samples)
    took: dict[str, list[float]] = {"messages": [], "tree": []}
    for _ in range(rounds):
        began = time.process_time()
        samples = render_samples(messages, tokenizer)
        rendered = time.process_time()
        build_tree(samples)
        merged = time.process_time()
        took["messages"].append(merged - began)
        took["tree"].append(merged - rendered)
    return {
        "kind": kind,
        "num_turns": num_turns,
        "num_tokens": tree.num_tokens,
        "num_sample_tokens": tree.num_sample_tokens,
        "seconds": {name: spread(values) for name, values in took.items()},
    }


def _context_by_hand(history: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def tutoring_turns(num_turns: int) -> list[dict[str, Any]]:
    """Messages of the shipped conversations end to end, up to so many of the assistant."""
    messages: list[dict[str, Any]] = []
    for line in DATA_PATH.read_text("utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            if message["role"] != "system":
                messages.append(message)
                num_turns -= message["role"] == "assistant"
            if num_turns == 0:
                return messages
    raise ValueError("num_turns must be at most the turns that ship")


def word_turns(num_turns: int, words: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Turns of so many words of user, thinking and answer; always the same."""
    rng = random.Random(0)
    known = [word for word in DATA_PATH.read_text("utf-8").split() if word.isalpha()]

    def text(num_words: int) -> str:
        return " ".join(
            rng.choice(known)
            if rng.random() < 0.75
            else "".join(rng.choices("etaoinshrdlu", k=rng.randint(3, 11)))
            for _ in range(num_words)
        )

    user, thinking, answer = words
    messages: list[dict[str, Any]] = []
    for _ in range(num_turns):
        messages.append({"role": "user", "content": text(user)})
        thought = text(thinking)
        messages.append(
            {"role": "assistant", "reasoning_content": thought, "content": text(answer)}
        )
    return messages


def tables(record: Record) -> list[Table]:
    columns: Columns = {
        "conversation": lambda row: f"{row['num_turns']} turns of {row['kind']}",
        "tokens, single-pass": lambda row: f"{row['num_tokens']:,}",
        "tokens, N-pass": lambda row: f"{row['num_sample_tokens']:,}",
        "messages to tree": lambda row: seconds(row["seconds"]["messages"]),
        "of it build_tree": lambda row: seconds(row["seconds"]["tree"]),
    }
    heading = "Messages to tree, CPU time: median (lowest-highest)"
    return [table(heading, record["rows"], columns)]


def draw(record: Record, path: Path) -> str:
    curves = {}
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["kind"] == kind]
        turns = [row["num_turns"] for row in rows]
        curves[kind] = (turns, [row["seconds"]["messages"]["median"] for row in rows])
    draw_curves(curves, path, x_label="turns", y_label="CPU seconds")
    return "CPU seconds from messages to tree against the number of turns, both axes logarithmic"
