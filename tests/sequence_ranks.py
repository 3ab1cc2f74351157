"""What processes do that share the tokens of a row, case by case; read by test_sequence_parallel.

Run by torchrun; writes to the file named first what each case gives.
"""

import copy
import sys
from dataclasses import replace

import torch
from model_cases import (
    doubled,
    fp64_model,
    gradients,
    largest_error,
    npass,
    packed,
    single_pass,
    tiny_model,
)
from sample_cases import random_samples
from torch import distributed

from flexmask import FlexmaskError, patch
from flexmask.model.load import meta_model
from flexmask.model.loss import as_bits
from flexmask.packing.rows import stack_rows
from flexmask.tools.plan.memory import saved_bytes, saved_bytes_per_token

_HEADS = {"6 heads of 3 keys": (6, 3), "3 heads of 1 key": (3, 1)}
CASES = {
    **{name: (name, {}) for name in ("llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3")},
    "llama4_text": ("llama4_text", {}),
    **{
        f"gpt_oss, {name}": (
            "gpt_oss",
            {"num_attention_heads": heads, "num_key_value_heads": keys},
        )
        for name, (heads, keys) in _HEADS.items()
    },
}


def shared(model, row, *, is_reversed=False, checkpointed=False, compiled=False):
    """Logits by sample, loss and gradients, as `single_pass` gives them, of all ranks together."""
    size = distributed.get_world_size()
    model = patch(model, sequence_group=distributed.group.WORLD)
    if is_reversed:  # the control: shards in the wrong order
        state = model._flexmask
        wrong = replace(state.sequence_group, rank=size - 1 - state.sequence_group.rank)
        for holder in (state, state.loss, *state.layers):
            holder.sequence_group = wrong
    if checkpointed:
        model.gradient_checkpointing_enable()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    output = run(**stack_rows([row], pad_to_multiple_of=2 * size))
    output.loss.backward()
    parts = [torch.empty_like(output.logits) for _ in range(size)]
    distributed.all_gather(parts, output.logits.detach())
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)
        weight.grad /= size
    logits = torch.cat(parts, dim=1)[0, : len(row)]
    return row.gather(logits), output.loss.item(), gradients(model)


def errors(family, settings, make=tiny_model, **how):
    """Those of the shared pass against N-pass; see `largest_error`."""
    model, samples = make(family, **settings), random_samples(1)
    theirs = npass(copy.deepcopy(model), samples)
    row, _ = packed(samples)
    return largest_error(shared(model, row, **how), theirs)


def errors_with_auxiliary_loss(family):
    """Those of the shared pass with the auxiliary loss of experts against one process."""
    model, samples = tiny_model(family, output_router_logits=True), random_samples(1)
    theirs = single_pass(patch(copy.deepcopy(model)), samples)
    row, _ = packed(samples)
    return largest_error(shared(model, row), theirs)


def kept_bytes(**settings):
    """What autograd keeps on this rank for a row, as predicted from shapes, and found."""
    size = distributed.get_world_size()
    model = tiny_model("qwen3", vocab_size=300, **settings)
    per_token = saved_bytes_per_token(meta_model(model.config, torch.float32), size)
    row, _ = packed(random_samples(0, num_samples=9))
    batch = stack_rows([row], pad_to_multiple_of=2 * size)
    patch(model, backend="cpu", sequence_group=distributed.group.WORLD)
    found = saved_bytes(model, lambda: model(**batch).loss)
    return per_token * batch["input_ids"].shape[1] / size, found


def weighted_losses():
    """The loss with weights, as floats and as bits, and that of one process."""
    model = tiny_model("llama")
    row, _ = packed(random_samples(1))
    batch = stack_rows([row], pad_to_multiple_of=2 * distributed.get_world_size())
    weights = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    alone = patch(copy.deepcopy(model))(**batch, loss_weights=weights).loss.item()
    patch(model, sequence_group=distributed.group.WORLD)
    forms = (weights, as_bits(weights))
    return alone, *(model(**batch, loss_weights=form).loss.item() for form in forms)


def ordinary_batches(model):
    """Whether a patched model does with those what it did before."""
    ids = torch.arange(3, 9)[None]
    before = model(ids, labels=ids)
    after = patch(model, sequence_group=distributed.group.WORLD)(ids, labels=ids)
    return bool((after.logits == before.logits).all()) and bool(after.loss == before.loss)


def refusal(family="llama", settings=None, *, labels=True, **changes):
    """What a model says to a batch with some of it changed."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    row, _ = packed(random_samples(1))
    batch = stack_rows([row], pad_to_multiple_of=2 * size)
    try:
        model = tiny_model(family, **settings or {})
        if "loss_function" in changes:
            model.loss_function = changes.pop("loss_function")
        patch(model, sequence_group=distributed.group.WORLD)
        if "forward" in changes:
            model.forward = changes.pop("forward")(model)
        if changes.get("rows") == "too short":
            batch = {name: x[:, :size] for name, x in stack_rows([row]).items()}
            batch["subtree_end"] = batch["subtree_end"].clamp_max(size)
        elif changes.get("rows") == "other":
            batch["input_ids"] = batch["input_ids"] + (rank == size - 1)
        model(**batch)
    except FlexmaskError as error:
        return str(error)
    return None


def fused(model):
    """A forward pass that computes its loss by itself, as Liger's does."""
    inner = model.forward

    def forward(labels=None, shift_labels=None, **kwargs):
        output = inner(**kwargs)
        output.loss = output.logits.sum()
        return output

    return forward


def main(path):
    results = {}
    for name, (family, settings) in CASES.items():
        results[name] = errors(family, settings)
        with doubled():
            results[name, "fp64"] = errors(family, settings, make=fp64_model)
    for family in ("qwen3_moe", "gpt_oss"):
        results[family, "auxiliary"] = errors_with_auxiliary_loss(family)
    results["reversed"] = errors("llama", {}, is_reversed=True)
    results["checkpointed"] = errors("gpt_oss", {}, checkpointed=True)
    if distributed.get_world_size() == 2:
        results["compiled"] = errors("llama", {}, compiled=True)
    results["kept"] = kept_bytes()
    results["kept, 3 heads"] = kept_bytes(num_attention_heads=3, num_key_value_heads=1)
    results["weights"] = weighted_losses()
    results["ordinary"] = ordinary_batches(tiny_model("llama"))
    results["refused"] = {
        "too short": refusal(rows="too short"),
        "other": refusal(rows="other"),
        "mixers": refusal("lfm2"),
        "loss": refusal(loss_function=lambda logits, labels, **_: logits.sum()),
        "fused": refusal(forward=fused),
    }
    if distributed.get_rank() == 0:
        torch.save(results, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    main(sys.argv[1])
