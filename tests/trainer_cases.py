"""Three steps of SGD by hand on separate sequences, which every trainer has to equal."""

import copy
from functools import cache

import torch
from model_cases import padded, tiny_model
from strategies import random_samples
from transformers import TrainingArguments

from flexmask.data.samples import weigh_samples
from flexmask.model.loss import weighted_causal_loss
from flexmask.model.npass import npass_batches
from flexmask.packing.collator import TreeCollator

LEARNING_RATE = 0.1
NUM_STEPS = 3
# All of them make one step, so that neither the order nor the number of processes matters; no two
# have the same number of trained tokens.
CONVERSATIONS = [
    random_samples(seed, num_samples=2 + seed, stem=4 + seed, tail=3 + seed) for seed in range(4)
]


def arguments(folder, kind=TrainingArguments, **settings):
    """Full batches, SGD, a constant rate, no clipping: a step is linear in its gradient."""
    return kind(
        **{
            "output_dir": str(folder),
            "num_train_epochs": NUM_STEPS,
            "per_device_train_batch_size": len(CONVERSATIONS),
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "remove_unused_columns": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        | settings
    )


def trees(weighting="token"):
    collator = TreeCollator(weighting=weighting)
    return [collator.tree(samples) for samples in CONVERSATIONS]


@cache
def npass_weights(weighting="token"):
    """Parameters of the tiny model before and after three steps of N-pass, by name."""
    model = tiny_model("llama")
    before = parameters(model)
    return before, train_npass(model, weighting)


def train_npass(model, weighting="token", conversations=CONVERSATIONS):
    """Its parameters after three steps by hand, divided by the weights of a whole step."""
    samples = [s for group in conversations for s in weigh_samples(group, weighting)]
    total = sum(float(sample.loss_weights[1:].sum()) for sample in samples)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        for batch in npass_batches(samples):
            logits = model(batch["input_ids"]).logits
            loss = weighted_causal_loss(
                logits, batch["shift_labels"], batch.get("loss_weights"), total
            )
            loss.backward()
        if getattr(model.config, "output_router_logits", False):
            auxiliary = model(**padded(samples), use_cache=False).aux_loss
            (model.config.router_aux_loss_coef * auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def parameters(model):
    return {name: p.detach().clone() for name, p in copy.copy(model).named_parameters()}


def assert_same_weights(ours, before, theirs):
    """Every parameter has moved as in N-pass: to 1e-5 of its way, in fp64 to 1e-10.

    A step of SGD is linear in the gradient, and gradients are held to 1e-5 of N-pass, those that
    are zero but for rounding to 1e-5 of a tenth of the largest (`model_cases.largest_error`); so
    the ways are, too. Beside that each step rounds each weight once, by at most 2^-24 of it.

    It holds for later steps where the rate times the curvature is small: a step multiplies the
    error before it by up to 1 - rate * eigenvalue of the Hessian. The largest of rate * eigenvalue
    is 0.3 for the tiny llama, 86 for the tiny Gemma 4 and 1,300 for that inside a model of images.
    There N-pass in fp32 ends 3e-5 and 6e-4 of its way from N-pass in fp64, so they run in fp64.
    """
    assert ours.keys() == theirs.keys()
    ways = {name: theirs[name] - before[name] for name in theirs}
    largest = max(way.abs().max().item() for way in ways.values())
    assert largest > 1e-3
    for name, way in ways.items():
        error = (ours[name] - theirs[name]).norm()
        rounding = NUM_STEPS * torch.finfo(way.dtype).eps / 2 * theirs[name].norm()
        part = 1e-10 if way.dtype == torch.float64 else 1e-5
        bound = part * way.norm().clamp_min(0.1 * largest) + rounding
        assert error <= bound, f"{name}: moved {way.norm():.1e}, differs by {error:.1e}"


def difference(ours, theirs):
    """The distance of all weights together, 2-norm."""
    return torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm().item()
