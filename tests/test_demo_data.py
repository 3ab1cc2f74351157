"""The demo's conversations are true, and its tokenizer and template behave.

Answers are worked out a second time here from the student's numbers, with fractions and
`datetime`.
"""

import ast
import calendar
import json
import math
import operator
import re
from datetime import date, datetime, timedelta
from fractions import Fraction

import pytest

from flexmask.demo import CONFIG_PATH, DATA_PATH, TOKENIZER_PATH

RECORDS = [json.loads(line) for line in DATA_PATH.read_text(encoding="utf-8").splitlines()]
NUMBER = r"-?\d+(?:\.\d+)?"
EQUATION = re.compile(
    rf"(?<![\w.,])(\(?{NUMBER}(?: [-+*/%] \(?{NUMBER}\)?)*) = ({NUMBER})(?![\w]|\.\d)"
)
MONTHS = "|".join(calendar.month_name[1:])
DATE = rf"(?:{MONTHS}) \d{{1,2}}, \d{{4}}"
CONSTANTS = {"0", "1", "2", "4", "7", "60", "100"}  # halves, weeks, hours, percent, a mean of four


def parse_date(text):
    return datetime.strptime(text, "%B %d, %Y").date()


def minutes(text):
    hours, rest = text.split(":")
    return Fraction(60 * int(hours) + int(rest))


def clock(value):
    assert 0 <= value < 24 * 60
    return f"{value // 60}:{value % 60:02}"


FUNCTIONS = {
    "date": parse_date,
    "days": lambda start, end: Fraction((end - start).days),
    "plus": lambda day, number: day + timedelta(int(number)),
    "weekday": lambda day: calendar.day_name[day.weekday()],
    "day": lambda day: Fraction(day.day),
    "month_end": lambda day: Fraction(calendar.monthrange(day.year, day.month)[1]),
    "day_of_year": lambda day: Fraction(day.timetuple().tm_yday),
    "minutes": minutes,
    "clock": lambda value: clock(int(value)),
    "gcd": lambda a, b: Fraction(math.gcd(int(a), int(b))),
    "ceil": lambda value: Fraction(math.ceil(value)),
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def evaluate(formula):
    def visit(node):
        match node:
            case ast.Expression(body=body):
                return visit(body)
            case ast.Constant(value=str() as text):
                return text
            case ast.Constant():
                return Fraction(ast.get_source_segment(formula, node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -visit(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](visit(left), visit(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name](*map(visit, args))
        raise ValueError(f"{formula}: unexpected {ast.dump(node)}")

    return visit(ast.parse(formula, mode="eval"))


def same(value, text):
    """Whether the text of an answer says the value."""
    match value:
        case date():
            return parse_date(text) == value
        case str():
            return text == value
    return Fraction(text) == value


def texts(message):
    return [message.get("reasoning_content", ""), message["content"]]


def assistants():
    return [m for record in RECORDS for m in record["messages"] if m["role"] == "assistant"]


def test_every_answer_equals_its_formula():
    for record in RECORDS:
        for answer in record["answers"]:
            assert same(evaluate(answer["formula"]), answer["value"]), (record["id"], answer)


def test_every_answer_is_in_its_reply():
    for record in RECORDS:
        for answer in record["answers"]:
            reply = record["messages"][answer["message"]]
            assert reply["role"] == "assistant"
            found = re.search(
                rf"(?<![\d.:]){re.escape(answer['value'])}(?!\d|[.:]\d)", reply["content"]
            )
            assert found, (record["id"], answer)


def test_every_formula_uses_the_students_numbers():
    for record in RECORDS:
        for answer in record["answers"]:
            said = " ".join(
                m["content"] for m in record["messages"][: answer["message"]] if m["role"] == "user"
            )
            for quoted in re.findall(r'"([^"]+)"', answer["formula"]):
                assert quoted in said, (record["id"], answer)
            numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r'"[^"]+"', "", answer["formula"]))
            known = set(re.findall(r"\d+(?:\.\d+)?", said)) | CONSTANTS
            assert set(numbers) <= known, (record["id"], answer)


def test_every_reply_to_a_question_has_an_answer():
    for record in RECORDS:
        answered = {answer["message"] for answer in record["answers"]}
        last = len(record["messages"]) - 1
        for index, message in enumerate(record["messages"]):
            if message["role"] == "assistant" and "tool_calls" not in message and index != last:
                assert index in answered, (record["id"], index)


def test_every_equation_is_true():
    for message in assistants():
        for text in texts(message):
            found = EQUATION.findall(text)
            assert text.count("=") == len(found), text
            for left, right in found:
                assert evaluate(left) == Fraction(right), (left, right, text)


def test_every_statement_about_the_calendar_is_true():
    for record in RECORDS:
        for text in (text for m in record["messages"] for text in texts(m)):
            for month, year, length in re.findall(rf"({MONTHS}) (\d{{4}}) has (\d+) days", text):
                number = list(calendar.month_name).index(month)
                assert calendar.monthrange(int(year), number)[1] == int(length), text
            for day, weekday in re.findall(rf"({DATE})(?:,| is) a (\w+day)", text):
                assert calendar.day_name[parse_date(day).weekday()] == weekday, text


def test_every_tool_result_is_true():
    for record in RECORDS:
        calls = {
            c["id"]: c["function"] for m in record["messages"] for c in m.get("tool_calls", [])
        }
        results = [m for m in record["messages"] if m["role"] == "tool"]
        assert len(calls) == len(results)
        for message in results:
            call, result = calls[message["tool_call_id"]], json.loads(message["content"])
            arguments = call["arguments"]
            match call["name"]:
                case "calculator":
                    assert evaluate(arguments["expression"]) == Fraction(result["result"])
                case "add_days":
                    day = date.fromisoformat(arguments["date"]) + timedelta(arguments["days"])
                    weekday = calendar.day_name[day.weekday()]
                    assert result == {"date": day.isoformat(), "weekday": weekday}
                case "days_between":
                    start, end = (date.fromisoformat(arguments[k]) for k in ("start", "end"))
                    assert result == {"days": (end - start).days}
                case name:
                    pytest.fail(f"unknown tool {name}")


def test_has_the_variety_that_it_promises():
    turns = [sum(m["role"] == "user" for m in record["messages"]) for record in RECORDS]
    thinking = [bool(m.get("reasoning_content")) for m in assistants()]
    assert len(RECORDS) >= 300
    assert set(turns) == set(range(2, 13))
    assert 5 <= sum(turns) / len(turns) <= 6.5
    assert 0.2 < sum("tools" in record for record in RECORDS) / len(RECORDS) < 0.4
    assert 0.3 < sum(r["messages"][0]["role"] == "system" for r in RECORDS) / len(RECORDS) < 0.6
    assert 0.1 < 1 - sum(thinking) / len(thinking) < 0.25
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)
    openings = [next(m["content"] for m in r["messages"] if m["role"] == "user") for r in RECORDS]
    assert len(set(openings)) > 0.98 * len(openings)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER_PATH)


def render(tokenizer, record, end, **kwargs):
    return tokenizer.apply_chat_template(
        record["messages"][:end], tools=record.get("tools"), tokenize=False, **kwargs
    )


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=["thinking", "without"])
def test_each_completion_continues_its_generation_prompt(tokenizer, options):
    for record in RECORDS[:120]:
        for index, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                prompt = render(tokenizer, record, index, add_generation_prompt=True, **options)
                full = render(tokenizer, record, index + 1, **options)
                assert full.startswith(prompt)
                assert full.endswith("<|im_end|>\n")


def test_template_keeps_thinking_after_the_last_question_only(tokenizer):
    call = {
        "type": "function",
        "function": {"name": "calculator", "arguments": {"expression": "1 + 1"}},
    }
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "reasoning_content": "old", "content": "one"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "reasoning_content": "plan", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "reasoning_content": "done", "content": "two"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nfirst<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nfirst<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nplan\n</think>\n\n"
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1 + 1"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\n2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ndone\n</think>\n\ntwo<|im_end|>\n"
    )


def test_tokenizer_gives_text_back(tokenizer):
    odd = "naïve 東京 🙂  two  spaces\n\ttab <think> 1,234.50 </think>"
    for text in [odd, *(render(tokenizer, record, None) for record in RECORDS[:40])]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_and_config_agree(tokenizer):
    config = pytest.importorskip("transformers").AutoConfig.from_pretrained(CONFIG_PATH)
    assert len(tokenizer) == config.vocab_size == 1792
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.encode("<think>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<think>")
    ]


def test_thinking_is_longer_than_the_reply(tokenizer):
    final = [m for m in assistants() if m.get("reasoning_content") and "tool_calls" not in m]
    thinking = [len(tokenizer.encode(m["reasoning_content"])) for m in final]
    reply = [len(tokenizer.encode(m["content"])) for m in final]
    assert sum(thinking) > 3 * sum(reply)
    assert max(len(tokenizer.encode(render(tokenizer, r, None))) for r in RECORDS) <= 4096
