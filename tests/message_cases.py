"""Messages in their normal form, and records that are refused, each with the reason."""

USER = {"role": "user", "content": "What is 2 plus 2?"}
ANSWER = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
ANSWER_PARTS = ("Two ", "and two.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4"}]}

BAD = {
    "None": (None, "must be an object or a list, got NoneType"),
    "no-messages": ({"prompt": "x"}, "needs one of 'messages' .* got the keys .'prompt'."),
    "text": ({"text": "x"}, "'text'.; of 'text' alone it is not known what is context and what"),
    "completion-type": ({"prompt": "x", "completion": 4}, "completion must be a string, got int"),
    "prompt-trained": (
        {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": "4"},
        "message 1: 'weight' says to train it, 'train' not to",
    ),
    "two-outputs": ({"instruction": "x", "output": ["a", "b"]}, "output must be a string, got li"),
    "history": (
        {"instruction": "x", "output": "y", "history": [["a"]]},
        r"history must be a list of .question, answer., got .'a'.",
    ),
    "both": ({"messages": [USER], "conversations": [USER]}, "got 'messages' and 'conversations'"),
    "messages-type": (
        {"messages": "x"},
        "'messages' must be a list of messages or its JSON text, got",
    ),
    "messages-json": ({"messages": "[{]"}, "'messages' is not JSON"),
    "names": (
        {"chat": [USER, ANSWER]},
        r"got the keys \['chat'\]; where the data have other names",
    ),
    "nulls": ({"messages": None}, "got nulls alone"),
    "empty": ({"messages": []}, "'messages' is empty"),
    "message-type": (["x"], "message 0 must be an object, got str"),
    "role": ([USER, {"role": "bot", "content": "x"}], "message 1 has role 'bot'; roles are system"),
    "role-missing": (
        [{"content": "x"}],
        "message 0 has no 'role', got .*; where",
    ),
    "role-type": ([{"role": ["user"], "content": "x"}], r"message 0 has role \['user'\]"),
    "sender": ({"conversations": [{"from": "me", "value": "x"}]}, "message 0 is from 'me'; send"),
    "no-assistant": ([USER], "no assistant message; there is nothing to train on"),
    "untrained": ([USER, {**ANSWER, "train": False}], "every assistant message has train: false"),
    "first": ([ANSWER, USER], "every assistant message has .* or begins the conversation"),
    "says-nothing": ([USER, {"role": "assistant", "content": " "}], "message 1 .* no content, th"),
    "no-content": ([{"role": "user"}], "message 0 is from the user and has no 'content'"),
    "user-thinks": ([{**USER, "reasoning": "x"}], "message 0 is from the user; only the assist"),
    "content-type": ([{"role": "user", "content": 4}], "message 0: content must be a string, got"),
    "surrogate": (
        [{"role": "user", "content": "\ud800"}],
        "message 0: content holds half of a sur",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "message 0: content part 0 is of type 'image_url'; flexmask trains on text",
    ),
    "audio": ([{"role": "user", "content": [{"type": "audio"}]}], "part 0 is of type 'audio'"),
    "part-type": ([{"role": "user", "content": [4]}], "content part 0 is of type 'int'"),
    "late-thinking": (
        [USER, {"role": "assistant", "content": ["4", {"type": "thinking", "thinking": "x"}]}],
        "message 1: content part 1 is thinking after text",
    ),
    "open-think": ([USER, {"role": "assistant", "content": "<think>x"}], "never closed; add </th"),
    "two-thoughts": (
        [USER, {"role": "assistant", "content": "<think>x</think>4<think>y</think>"}],
        "message 1: content must hold one think block, at its beginning",
    ),
    "think-after-text": (
        [USER, {"role": "assistant", "content": "4 <think>x</think>"}],
        "message 1: content must hold one think block, at its beginning",
    ),
    "think-twice": ([USER, {**ANSWER, "content": "<think>x</think>4"}], "thinking is given twice"),
    "fields-differ": ([USER, {**ANSWER, "thinking": "x"}], "'thinking' hold different thinking"),
    "calls-type": ([USER, {**ANSWER, "tool_calls": "x"}], "message 1: tool_calls must be a list"),
    "call-type": ([USER, {**ANSWER, "tool_calls": ["x"]}], "message 1: tool call 0 must be an obj"),
    "call-name": ([USER, {**ANSWER, "tool_calls": [{}]}], "tool call 0 must have a function with"),
    "arguments": (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}],
        "message 1: tool call 0: arguments of 'f' is not JSON",
    ),
    "arguments-key": (
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "kwargs": {"a": 1}}}]}],
        "arguments of 'f' must stand under one of arguments, parameters, args, input, and noth",
    ),
    "arguments-twice": (
        [USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": {"a": 3}}]}],
        "arguments of 'add' must stand under one of arguments, parameters, args, input, and nothin",
    ),
    "arguments-type": (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
        "arguments of 'f' must be an object, got list",
    ),
    "function-call": (
        {"conversations": [{"from": "function_call", "value": "add(2)"}]},
        "message 0: the value of a function_call is not JSON",
    ),
    "arguments-text": (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": ["\ud800"]}}]}],
        "message 1: tool call 0: arguments of 'f' holds half of a surrogate pair",
    ),
    "surrogate-elsewhere": (
        [{**USER, "name": "\ud800"}, ANSWER],
        "message 0 holds half of a surrogate pair",
    ),
    "not-a-number": (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": [NaN]}'}]}],
        "arguments of 'f' must hold what JSON can write, got nan",
    ),
    "endless-number": (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "9" * 5000}]}],
        "arguments of 'f' holds a number that is too long",
    ),
    "train": (
        [USER, {**ANSWER, "train": "no"}],
        "message 1: train must be true, false, 0 or 1, got 'no",
    ),
    "weight": (
        [USER, {**ANSWER, "weight": -0.5}],
        r"weight must be true, false, 0 or 1e-30 to 1e\+30, got -0.5",
    ),
    "no-weight": ([USER, {**ANSWER, "loss": 0.5}], "loss must be true, false, 0 or 1, got 0.5"),
    "two-weights": (
        [USER, {**ANSWER, "weight": 0.5, "loss_scale": 2}],
        "message 1 has weight 0.5 and loss_scale 2; keep one",
    ),
    "user-weight": ([{**USER, "weight": 0.5}, ANSWER], "from the user and has weight 0.5; only"),
    "marks": (
        [USER, {**ANSWER, "loss": False, "weight": 1}],
        "message 1: 'weight' says to train it, 'loss' not to",
    ),
    "user-trained": (
        [{**USER, "trainable": True}, ANSWER],
        "message 0 is from the user and has tr",
    ),
    "train-detail": (
        [USER, {**ANSWER, "train_detail": [1]}],
        "'train_detail', but a message is tr",
    ),
    "refusal": ([USER, {**ANSWER, "refusal": "No."}], "'refusal', but what the model is to say is"),
    "text-key": (
        [{"role": "user", "content": [{"type": "text", "words": "x"}]}],
        r"part 0 has its text under none of 'text', 'value', 'content', but the keys \['type', 'wo",
    ),
    "more-text": (
        [{"role": "user", "content": [{"type": "text", "text": "x", "words": "y"}]}],
        r"content part 0 has text that is not read, under \['words'\]; remove it",
    ),
    "two-texts": (
        [{"role": "user", "content": [{"type": "text", "text": "x", "value": "y"}]}],
        "content part 0: 'text' and 'value' hold different texts",
    ),
    "inner-part": (
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": [4]}, "4"]}],
        "content part 0: thinking holds a part of type 'int'",
    ),
    "encrypted": (
        [USER, {**ANSWER, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}],
        "reasoning_details: block 0 is of type 'reasoning.encrypted', of which the words cannot",
    ),
    "blocks-type": (
        [USER, {**ANSWER, "thinking_blocks": "x"}],
        "must be a list of blocks, got str",
    ),
    "close-in-thought": (
        [USER, {**ANSWER, "reasoning_content": "I write </think> there."}],
        "message 1: the thinking holds </think>, at which it would end",
    ),
    "close-in-answer": (
        [USER, {"role": "assistant", "content": "Write </think> behind it."}],
        "content holds </think> without <think>; write <think> at its beginning if",
    ),
    "empty-and-close": (
        [USER, {**ANSWER, "reasoning_content": "", "content": "Two.\n</think>\n4"}],
        "the thinking is empty, and content holds the end of a thought",
    ),
    "cut": ([USER, {**ANSWER, "finish_reason": "length"}], "message 1 was cut .finish_reason 'len"),
    "cut-last": (
        {"messages": [USER, ANSWER], "finish_reason": "MAX_TOKENS"},
        "message 1 was cut .finish_reason 'MAX_TOKENS'.",
    ),
    "two-answers": (
        [USER, ANSWER, {**ANSWER, "reasoning_content": ""}],
        "messages 1 and 2 are both from the assistant and no one turn",
    ),
    "call-then-words": (
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "4"}],
        "messages 1 and 2 are both from",
    ),
    "half-a-turn-trained": (
        [USER, {**ANSWER, "train": False}, {"role": "assistant", "tool_calls": [CALL]}],
        "messages 1 and 2 are both from",
    ),
    "value-and-content": (
        {"conversations": [{"from": "human", "value": "x", "content": "y"}]},
        "message 0 has a 'value' and another 'content'",
    ),
    "images": (
        {"messages": [USER, ANSWER], "images": ["a"]},
        "the record has 'images', but flexmask t",
    ),
    "message-images": ([{**USER, "images": ["a"]}, ANSWER], "message 0 has 'images', but flexmask"),
    "text-after-use": (
        [USER, {"role": "assistant", "content": [USE, {"type": "text", "text": "x"}]}],
        "message 1 has another content part behind a tool_use",
    ),
    "uses-and-calls": (
        [USER, {"role": "assistant", "content": [USE], "tool_calls": [CALL]}],
        "message 1 has 'tool_calls' and parts of type tool_use",
    ),
    "late-result": (
        [{"role": "user", "content": ["x", RESULT]}],
        "message 0 has a tool_result behind another content part",
    ),
    "more-of-a-result": (
        [{"role": "user", "content": [{**RESULT, "text": "x"}]}],
        r"message 0 has a tool_result with more than its content: .'text'.",
    ),
    "result-image": (
        [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}],
        "message 0: content part 0 is of type 'image'",
    ),
    "kto": ({"instruction": "x", "output": "y", "kto_tag": False}, "kto_tag: false, an example"),
    "label": ({"messages": [USER, ANSWER], "label": False}, "label: false, an example of what not"),
    "pair": (
        {"chosen": [USER, ANSWER], "rejected": [USER]},
        "has 'chosen', but of a pair, only",
    ),
    "record-weight": (
        {"messages": [USER, ANSWER], "weight": 0.3},
        "record has weight 0.3; conversat",
    ),
    "settings": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": [1]},
        "chat_template_kwargs must be an object, got list",
    ),
    "functions": (
        {"messages": [USER, ANSWER], "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        "'tools' and 'functions' .their old name. differ",
    ),
    "tools": ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools must be a list or its JSON"),
    "tools-json": ({"messages": [USER, ANSWER], "tools": "{"}, "tools is not JSON"),
    "tool": ({"messages": [USER, ANSWER], "tools": [{}]}, "tool 0 must be a function schema with"),
    "system-twice": (
        {"system": "x", "messages": [{"role": "system", "content": "y"}, USER, ANSWER]},
        "the system message is given twice, and differently, as system and message 0",
    ),
}
