"""A tokenizer that writes conversations in Python, as those of DeepSeek V3.2 and V4 do.

DeepSeek ships an encoder in place of a Jinja template. This one follows the format that the README
of DeepSeek-V4-Flash's folder `encoding` describes (2026), without its instructions to the model.
"""
# ruff: noqa: RUF001 (the control tokens of DeepSeek are written with full-width bars)

import json
from typing import Any

from transformers import PreTrainedTokenizerFast

_EOS = "<｜end▁of▁sentence｜>"


class DeepSeekV4Tokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose `apply_chat_template` is its own; it has no template."""

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        thinking: bool = False,
        drop_thinking: bool = True,
        **unused: object,
    ) -> str:
        """Write a conversation; declared tools keep the thinking of all turns."""
        users = [i for i, message in enumerate(conversation) if message["role"] == "user"]
        kept = -1 if tools or not drop_thinking else max(users, default=-1)
        text = "<｜begin▁of▁sentence｜>"
        messages = [{"role": "system", "content": ""}, *conversation]
        if conversation[0]["role"] == "system":
            messages = conversation
        for index, message in enumerate(messages, start=len(conversation) - len(messages)):
            content = message["content"]
            if message["role"] == "assistant":
                thought = message.get("reasoning_content", "") if index > kept else ""
                text += "<｜Assistant｜>" + (
                    f"<think>{thought}</think>" if thinking and index > kept else "</think>"
                )
                text += content + _calls(message.get("tool_calls", [])) + _EOS
            elif message["role"] == "system":
                text += content + "".join(f"\n\n{json.dumps(tool)}" for tool in tools or [])
            else:
                result = message["role"] == "tool"
                text += "<｜User｜>" + (
                    f"<tool_result>{content}</tool_result>" if result else content
                )
        if conversation[-1]["role"] in ("user", "tool"):
            text += "<｜Assistant｜>" + ("<think>" if thinking else "</think>")
        return text


def _calls(calls: list[dict[str, Any]]) -> str:
    if not calls:
        return ""
    text = "\n\n<｜DSML｜tool_calls>\n"
    for call in calls:
        text += f'<｜DSML｜invoke name="{call["function"]["name"]}">\n'
        for key, value in call["function"]["arguments"].items():
            mark, written = (
                ("true", value) if isinstance(value, str) else ("false", json.dumps(value))
            )
            text += (
                f'<｜DSML｜parameter name="{key}" string="{mark}">{written}</｜DSML｜parameter>\n'
            )
        text += "</｜DSML｜invoke>\n"
    return text + "</｜DSML｜tool_calls>"
