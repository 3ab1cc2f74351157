"""What a tokenizer and its chat template write, in one short text."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary, the rules of tokenising, the control tokens and the template.

    Two tokenizers of the same fingerprint render conversations into the same samples. The name of
    the tokenizer and where it was loaded from do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer.get_vocab()
    if backend is not None:
        rules = json.loads(backend.to_str())
        for call_setting in ("truncation", "padding"):  # of the latest call, not of the tokenizer
            rules.pop(call_setting, None)
    parts = {
        "rules": rules,
        "control": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
