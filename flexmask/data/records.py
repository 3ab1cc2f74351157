"""Records that have other words or names for their messages, or are not simply to be learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexmask.data.values import parse_json, read_text
from flexmask.errors import DataError

HOLD_MESSAGES = ("messages", "conversations")
# Names without which a record is none; of others a record may have none.
_NEEDED = (
    *(*HOLD_MESSAGES, "prompt", "completion", "instruction", "output", "query", "response"),
    *("role", "content", "from", "value"),
)

OTHER_NAMES = "where the data have other names, --data_columns says which"

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
    is trained; and `instruction`, `input`, `output` and `history` (Alpaca, LLaMA-Factory), or
    `query`, `response` and `history` (ms-swift), of which every answer is. Other records are
    returned as they are.

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
        messages = _read_exchanges(record, ("instruction", "input"), "output")
    elif {"query", "response"} <= given:
        used = {"query", "response", "history"}
        messages = _read_exchanges(record, ("query",), "response")
    else:
        return record
    others = {key: value for key, value in record.items() if key not in used}
    return {**others, "messages": messages}


def with_lists(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the record with messages that are the JSON text of a list, as tables have them, read.

    Args:
        record: as it stands in the data.
        columns: as in `rename_keys`.

    Raises:
        DataError: such a text is not JSON.
    """
    names = {columns.get(key, key) for key in HOLD_MESSAGES}
    return {
        key: parse_json(value, repr(key))
        if key in names and isinstance(value, str) and value.lstrip().startswith("[")
        else value
        for key, value in record.items()
    }


def rename_keys(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the record with the names that flexmask reads, in it and in its messages.

    Args:
        record: as it stands in the data.
        columns: what the data call each of flexmask's names, such as {"messages": "chat"}.

    Raises:
        DataError: the record does not have such a name, or has both.
    """
    names = {own: name for name, own in columns.items()}
    renamed, found = _rename(record, names), set(record)
    for key in (*HOLD_MESSAGES, "prompt", "completion"):
        if isinstance(renamed.get(key), list):
            found.update(*(message for message in renamed[key] if isinstance(message, dict)))
            renamed[key] = [
                _rename(message, names) if isinstance(message, dict) else message
                for message in renamed[key]
            ]
    for name in _NEEDED:
        if columns.get(name, name) not in found and name in columns:
            raise DataError(
                f"has no {columns[name]!r}, which --data_columns takes for {name!r}; the record "
                f"and its messages have {sorted(map(str, found))}"
            )
    return renamed


def check_columns(columns: Any) -> None:
    """Raise DataError for what does not name keys of the data."""
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(isinstance(v, str) for v in columns.values()):
        raise DataError(
            "data_columns must give the name in the data for each name of flexmask, such as "
            f'{{"messages": "chat"}}, got {columns!r}'
        )
    if len({*columns.values()}) < len(columns):
        raise DataError(f"data_columns takes a name of the data for two, in {dict(columns)}")


def _rename(holder: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {names.get(key, key): value for key, value in holder.items()}
    if len(renamed) < len(holder):
        both = next(own for own, name in names.items() if own in holder and name in holder)
        raise DataError(
            f"has {both!r}, which --data_columns takes for {names[both]!r}, and that too"
        )
    return renamed


def _read_messages(value: Any, role: str, what: str) -> list[Any]:
    """A text as a message of `role`; a list of messages as it is."""
    return value if isinstance(value, list) else [{"role": role, "content": read_text(value, what)}]


def _read_exchanges(record: dict[str, Any], asked: Sequence[str], answered: str) -> list[Any]:
    """The history, then the lines of a question and its answer."""
    messages = _read_history(record.get("history") or [])
    texts = [read_text(record.get(key), key) for key in asked]
    messages.append({"role": "user", "content": "\n".join(filter(None, texts))})
    return messages + _read_messages(read_text(record[answered], answered), "assistant", answered)


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
