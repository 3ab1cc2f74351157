"""Conversations into trees: every text rendered and tokenised once, against turn by turn."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

from benchmarks.naive_rendering import naive_samples
from benchmarks.plots import draw_curves
from benchmarks.record import Measurement, Record, Target
from benchmarks.tables import Table, seconds, times
from benchmarks.timing import Task, alternate, ratios, spread
from flexmask import Sample, build_tree, render_samples
from flexmask.demo import DATA_PATH, TOKENIZER_PATH

TITLE = "Rendering"
ABOUT = """\
Messages to tree: `render_samples` and `build_tree`, against rendering and tokenising the prompt and
the answer of every turn whole, one after the other. Both do the same checks of the template. The
tokenizer and template are the shipped ones. Conversations: the shipped tutoring turns end to end,
tool calls included, and turns of 60 user, 300 thinking and 120 answer words, of which every fourth
is made of random letters, since a tokenizer remembers words that it has met. Before: all samples
must be the same token for token."""

_WORDS = (60, 300, 120)  # of user, thinking and answer
_ROUNDS = 5
_MANY_TURNS = 128  # from here on two rounds are enough


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
                measured = round(row["speed_up"]["median"], 1)
                name = f"messages to tree, 64 turns of {kind}, against turn by turn"
                measurement.targets.append(Target(name, 10, measured))
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
    naive = naive_samples(messages, tokenizer)
    name = f"samples that differ, {num_turns} turns of {kind}"
    measurement.check(name, _num_different(samples, naive), 0)
    tree = build_tree(samples)
    took = alternate(
        {
            "once": Task(lambda: build_tree(render_samples(messages, tokenizer))),
            "naive": Task(
                lambda: build_tree(naive_samples(messages, tokenizer)),
                rounds=2 if num_turns >= _MANY_TURNS else None,
            ),
            "tree": Task(lambda: build_tree(samples)),
        },
        rounds=rounds,
        label=f"{num_turns} turns of {kind}",
    )
    return {
        "kind": kind,
        "num_turns": num_turns,
        "num_tokens": tree.num_tokens,
        "num_sample_tokens": tree.num_sample_tokens,
        "seconds": {way: spread(values) for way, values in took.items()},
        "speed_up": spread(ratios(took["naive"], took["once"])),
    }


def _num_different(samples: list[Sample], others: list[Sample]) -> int:
    same = sum(
        a.key == b.key
        and a.input_ids.tobytes() == b.input_ids.tobytes()
        and a.loss_weights.tobytes() == b.loss_weights.tobytes()
        for a, b in zip(samples, others, strict=True)
    )
    return len(samples) - same


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
    lines = [
        (
            f"{row['num_turns']} turns of {row['kind']}",
            f"{row['num_tokens']:,}",
            f"{row['num_sample_tokens']:,}",
            seconds(row["seconds"]["once"]),
            seconds(row["seconds"]["naive"]),
            times(row["speed_up"]),
            seconds(row["seconds"]["tree"]),
        )
        for row in record["rows"]
    ]
    columns = (
        *("conversation", "tokens, single-pass", "tokens, N-pass", "each text once"),
        *("turn by turn", "times faster", "of it build_tree"),
    )
    return [Table("Messages to tree: median (lowest-highest)", columns, lines)]


def draw(record: Record, path: Path) -> str:
    curves = {}
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["kind"] == kind]
        turns = [row["num_turns"] for row in rows]
        for way, name in (("once", "each text once"), ("naive", "turn by turn")):
            curves[f"{kind}, {name}"] = (turns, [r["seconds"][way]["median"] for r in rows])
    draw_curves(curves, path, x_label="turns", y_label="seconds")
    return "Seconds from messages to tree against the number of turns, both axes logarithmic"
