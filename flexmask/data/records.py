"""Records: those that say their messages in other words, and those that are not to be learnt."""

from __future__ import annotations

from typing import Any

from flexmask.data.values import read_text
from flexmask.errors import DataError

HOLD_MESSAGES = ("messages", "conversations")

# Keys that change what is to be trained, and why flexmask does not take them.
MEDIA = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio"), "flexmask trains on text"
)
_PAIRS = dict.fromkeys(
    ("chosen", "rejected", "rejected_response", "rejected_messages"),
    "of a pair, only the better conversation is to be trained, as 'messages' alone",
)
REFUSED_IN_RECORD = {**MEDIA, **_PAIRS, "choices": "the answer belongs to the messages"}
WEIGHTS = ("train", "weight", "loss_weight", "loss_scale", "sample_weight")
LABELS = ("label", "kto_tag")


def as_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with its `messages`, in place of the keys that say them in other words.

    These are `prompt` and `completion` (TRL), texts or lists of messages, of which the completion
    is trained; and `instruction`, `input`, `output` and `history` (Alpaca, LLaMA-Factory), of which
    every answer is. Other records are returned as they are.

    Raises:
        DataError: a text is none, or a pair of the history is none.
    """
    given = {key for key, value in record.items() if value is not None}
    if given & {*HOLD_MESSAGES}:
        return record
    if {"prompt", "completion"} <= given:
        used = {"prompt", "completion"}
        prompt = _read_messages(record["prompt"], "user", "prompt")
        prompt = [{**m, "train": False} if isinstance(m, dict) else m for m in prompt]
        messages = prompt + _read_messages(record["completion"], "assistant", "completion")
    elif {"instruction", "output"} <= given:
        used = {"instruction", "input", "output", "history"}
        messages = _read_history(record.get("history") or [])
        texts = [read_text(record.get(key), key) for key in ("instruction", "input")]
        messages.append({"role": "user", "content": "\n".join(filter(None, texts))})
        messages += _read_messages(read_text(record["output"], "output"), "assistant", "output")
    else:
        return record
    others = {key: value for key, value in record.items() if key not in used}
    return {**others, "messages": messages}


def _read_messages(value: Any, role: str, what: str) -> list[Any]:
    """A text as a message of `role`; a list of messages as it is."""
    return value if isinstance(value, list) else [{"role": role, "content": read_text(value, what)}]


def _read_history(pairs: Any) -> list[Any]:
    messages = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history must be a list of [question, answer], got {pair!r}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": read_text(text, "history")})
    return messages


def check_record(record: dict[str, Any]) -> None:
    """Raise DataError for keys of a record that change what is to be trained."""
    check_refused(record, REFUSED_IN_RECORD, "the record")
    for key in LABELS:
        if record.get(key) is False:
            raise DataError(
                f"the record has {key}: false, an example of what not to say; leave it out"
            )
    for key in WEIGHTS:
        if record.get(key) not in (None, 1):
            raise DataError(
                f"the record has {key} {record[key]!r}; conversations are trained or not, and "
                "weighed by --weighting: leave it out, or remove the key"
            )


def check_refused(holder: dict[str, Any], refused: dict[str, str], what: str) -> None:
    """Raise DataError for keys of a record or a message that flexmask does not take."""
    for key, reason in refused.items():
        if holder.get(key):
            raise DataError(
                f"{what} has {key!r}, but {reason}; remove it, or leave the conversation out"
            )
