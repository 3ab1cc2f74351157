"""From the options of `flexmask verify` to its report."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from tqdm import tqdm

from flexmask.backends.choice import BackendChoice, choose_backend, record_choices
from flexmask.data.files import BadLine, read_files
from flexmask.data.messages import Conversation
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.errors import DataError, TemplateError, first_of, one_line, pluralize
from flexmask.model.checks import check_vocabulary
from flexmask.model.load import load_model
from flexmask.model.structure import text_config
from flexmask.tools.verify.differences import Comparison
from flexmask.tools.verify.expected import expected_of, within
from flexmask.tools.verify.proof import WIDER, Chat, verify_model
from flexmask.tools.verify.report import Finding, VerifyReport
from flexmask.training.options import load_renderer
from flexmask.tree.sample import Sample

_SHOWN = 3  # messages that a template cannot write


def verify(options: argparse.Namespace, device: torch.device, group: Any = None) -> VerifyReport:
    """The report on the model, data and backend that the options name.

    Args:
        options: of the command.
        device: to compute on.
        group: whose processes share the tokens of each row, and all run this; or None.

    Raises:
        FlexmaskError: an input that cannot be used.
    """
    choose_backend(device, options.backend)  # a name that does not fit the device is refused now
    renderer = load_renderer(options, options.model)
    chats, refused = _read_chats(options, renderer)
    chats, left_out = within(chats, options.max_verify_tokens)
    samples = [sample for chat in chats for sample in chat.samples]
    written = f"{pluralize(len(samples), 'turn is', 'turns are')} written as at inference"
    if refused:
        written = "; ".join(first_of(refused, _SHOWN))
    finding = Finding("template", not refused, written)
    data = (
        f"{', '.join(options.data)}: {pluralize(len(chats), 'conversation')}, "
        f"{pluralize(len(samples), 'turn')}, {sum(map(len, samples)):,} tokens in N-pass, "
        f"{sum(len(chat.row) for chat in chats):,} in a single pass"
    )
    if left_out is not None:
        data += f"; {left_out}"
        print(f"flexmask: {left_out}", file=sys.stderr)
    about = {"thinking of earlier turns": renderer.thinking_text}
    if not chats:
        return VerifyReport(findings=[finding], checked={"data": data, **about})
    transformers.set_seed(options.seed)
    model = load_model(options.model, options.dtype, from_config=options.from_config)
    if model.dtype not in WIDER:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WIDER)
        raise DataError(f"{options.model}: dtype must be one of {names}, got {model.dtype}")
    torch.nn.Module.to(model, device)
    config = text_config(model)
    check_vocabulary(config.vocab_size, (sample.input_ids for sample in samples))
    progress = partial(tqdm, desc="verifying", unit="turn")
    chosen = {"backend": options.backend, "kernel_options": options.kernel_options}
    chosen["sequence_group"] = group
    if text := expected_of(model, chats):
        print(f"expected: {text}; fewer --max_verify_tokens take less", file=sys.stderr)
    with record_choices() as choices:
        report = verify_model(model, chats, **chosen, progress=progress, tell=_tell)
    report.findings.insert(0, finding)
    weights = "random weights" if options.from_config else "its own weights"
    report.checked = {
        "model": f"{options.model}: {type(model).__name__}, "
        f"{pluralize(config.num_hidden_layers, 'layer')}, "
        f"{model.num_parameters():,} parameters, {weights}",
        "in": f"{str(model.dtype).removeprefix('torch.')} on {model.device}, training mode; "
        f"N-pass attention: {config._attn_implementation}",
        "backend": describe_choices(choices),
        **({"rows": f"shared by {group.size()} processes"} if group is not None else {}),
        "data": data,
        **about,
    }
    return report


def _tell(turn: Comparison) -> None:
    """Say on stderr what was found at a turn, above the bar of progress."""
    worst = max(turn.gradients.values(), key=lambda difference: difference.by_bound)
    tqdm.write(
        f"{turn.place}: largest difference of gradients {worst.value:.1e}, "
        f"{worst.by_bound:.2f} of its bound",
        file=sys.stderr,
    )


def describe_choices(choices: Mapping[BackendChoice, int]) -> str:
    """The backends that were called, each with its first reason, and how often, if several."""
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for (name, reason), count in choices.items():
        counts[name] += count
        reasons.setdefault(name, reason)
    if len(counts) == 1:
        return "".join(f"{name}: {reason}" for name, reason in reasons.items())
    return "; ".join(
        f"{name} in {pluralize(count, 'call')}: {reasons[name]}" for name, count in counts.items()
    )


def _read_chats(options: argparse.Namespace, renderer: Renderer) -> tuple[list[Chat], list[str]]:
    """The first conversations, and what the chat template cannot write before their number is full.

    Raises:
        DataError: a file or a line of it cannot be used.
    """

    def use(conversation: Conversation) -> Chat | str:
        try:
            samples = renderer.samples(conversation)
            # The loss of an unpatched model knows no weights.
            plain = [Sample(one.input_ids, one.loss_weights > 0, one.key) for one in samples]
            return Chat(plain, conversation.where)
        except TemplateError as error:
            return str(error)

    chats: list[Chat] = []
    refused: list[str] = []
    skipped: list[str] = []
    files, columns = find_data_files(options.data, options.split), renderer.data_columns
    for item in read_files(files, use, on_bad_line=options.on_bad_line, columns=columns):
        if isinstance(item, BadLine):
            skipped.append(f"skipped {item.reason}")
        elif isinstance(item, str):
            refused.append(item)
        else:
            chats.append(item)
        if len(chats) + len(refused) == options.conversations:
            break
    for line in first_of(skipped):
        print(line, file=sys.stderr)
    return chats, refused


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default the GPU of this process, if there is one.

    Raises:
        DataError: there is no such device.
    """
    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name or (own if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name} cannot be used: {one_line(error)}") from None
    return device
