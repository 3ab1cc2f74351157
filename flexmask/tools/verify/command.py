"""`flexmask verify`: prove on one's own model, data and backend that one pass equals N."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, TemplateError, pluralize
from flexmask.tools.options import add_json, add_options, at_least, print_report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from flexmask.data.messages import Conversation
    from flexmask.tools.verify.proof import Chat
    from flexmask.tools.verify.report import VerifyReport

USAGE = "verify DATA... --model PATH_OR_ID"
HELP = "prove on your model, data and backend that the single pass equals N-pass"

_SHOWN = 3  # messages that a template cannot write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.description = "Exit code 0: proved; 1: not, the report says why; 2: unusable input."
    add_options(parser, "data", "model", "tokenizer", "chat_template", "chat_template_kwargs")
    add_options(parser, "on_bad_line", "backend", "from_config", "dtype")
    add = parser.add_argument
    add(
        "--conversations",
        type=int,
        action=at_least(1),
        default=3,
        metavar="N",
        help="check the first N; default: 3",
    )
    add("--device", metavar="DEVICE", help="such as cpu or cuda:0; default: cuda if there is one")
    add("--seed", type=int, default=0, help="of random weights")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Verify, print the report and write what was asked for; returns the exit code."""
    report = _verify(options)
    print_report(options, report.to_json(), str(report))
    return 0 if report.is_proved else 1


def _verify(options: argparse.Namespace) -> VerifyReport:
    from tqdm import tqdm

    from flexmask.backends.choice import choose_backend
    from flexmask.model.checks import check_vocabulary
    from flexmask.model.load import load_tokenizer
    from flexmask.model.structure import text_config
    from flexmask.tools.verify.proof import verify_model
    from flexmask.tools.verify.report import Finding, VerifyReport

    device = _device(options.device)
    choice = choose_backend(device, options.backend)
    tokenizer = load_tokenizer(options.tokenizer or options.model, options.chat_template)
    chats, refused = _read_chats(options, tokenizer)
    if refused:
        more = f" (and {len(refused) - _SHOWN} more)" if len(refused) > _SHOWN else ""
        finding = Finding("template", False, "; ".join(refused[:_SHOWN]) + more)
    else:
        written = pluralize(sum(len(chat.samples) for chat in chats), "turn is", "turns are")
        finding = Finding("template", True, f"{written} written as at inference")
    checked = {"data": _data_text(options, chats)}
    if not chats:
        return VerifyReport(findings=[finding], checked=checked)
    model = _load_model(options, device)
    size = text_config(model).vocab_size
    check_vocabulary(size, (sample.input_ids for chat in chats for sample in chat.samples))
    report = verify_model(
        model,
        chats,
        backend=options.backend,
        progress=partial(tqdm, desc="verifying", unit="turn", file=sys.stderr),
    )
    report.findings.insert(0, finding)
    backend = {"backend": f"{choice.name}: {choice.reason}"}
    report.checked = _model_text(options, model) | backend | checked
    return report


def _read_chats(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Chat], list[str]]:
    """The first conversations, and what the chat template cannot write before their number is full.

    Raises:
        DataError: a file or a line of it cannot be used.
    """
    from flexmask.data.files import BadLine, find_data_files, read_files
    from flexmask.data.trees import Renderer
    from flexmask.tools.verify.proof import Chat

    renderer = Renderer(tokenizer, chat_template_kwargs=options.chat_template_kwargs)

    def use(conversation: Conversation) -> Chat | str:
        try:
            return Chat.of(renderer.samples(conversation), conversation.where)
        except TemplateError as error:
            return str(error)

    chats: list[Chat] = []
    refused: list[str] = []
    for item in read_files(find_data_files(options.data), use, on_bad_line=options.on_bad_line):
        if isinstance(item, BadLine):
            print(f"skipped {item.reason}", file=sys.stderr)
        elif isinstance(item, str):
            refused.append(item)
        else:
            chats.append(item)
        if len(chats) + len(refused) == options.conversations:
            break
    return chats, refused


def _load_model(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model to check, in its data type, on its device.

    Raises:
        DataError: it cannot be loaded, or has a data type without a wider one to compare with.
    """
    import torch
    import transformers

    from flexmask.model.load import load_model
    from flexmask.tools.verify.proof import WIDER

    transformers.set_seed(options.seed)
    model = load_model(options.model, options.dtype, from_config=options.from_config)
    if model.dtype not in WIDER:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WIDER)
        raise DataError(f"{options.model}: dtype must be one of {names}, got {model.dtype}")
    torch.nn.Module.to(model, device)
    return model


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {name} cannot be used: {reason}") from None
    return device


def _model_text(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, str]:
    from flexmask.model.structure import text_config

    config = text_config(model)
    weights = "random weights" if options.from_config else "its own weights"
    return {
        "model": f"{options.model}: {type(model).__name__}, "
        f"{pluralize(config.num_hidden_layers, 'layer')}, "
        f"{model.num_parameters():,} parameters, {weights}",
        "in": f"{str(model.dtype).removeprefix('torch.')} on {model.device}, training mode; "
        f"N-pass attention: {config._attn_implementation}",
    }


def _data_text(options: argparse.Namespace, chats: list[Chat]) -> str:
    turns = sum(len(chat.samples) for chat in chats)
    npass = sum(len(sample) for chat in chats for sample in chat.samples)
    single = sum(len(chat.row) for chat in chats)
    return (
        f"{', '.join(options.data)}: {pluralize(len(chats), 'conversation')}, "
        f"{pluralize(turns, 'turn')}, {npass:,} tokens in N-pass, {single:,} in a single pass"
    )
