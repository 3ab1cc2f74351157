"""What two processes do together, case by case: run by torchrun, read by test_trainers_distributed.

Writes to the file named first what each case gives: the parameters after three steps, or a loss.
"""

import sys
import tempfile

import torch
from fsdp_on_cpu import allow_fsdp_on_cpu
from model_cases import tiny_model
from test_trainers import lora_model
from trainer_cases import CONVERSATIONS, arguments, trees
from transformers import Trainer

from flexmask import FlexmaskError, TreeCollator, patch
from flexmask.model import loss as loss_module
from flexmask.training.trainer import TreeTrainer

HALF = {"per_device_train_batch_size": 2}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
TOKEN_METRICS = {"log_token_metrics": True}
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def train(
    model,
    kind=TreeTrainer,
    data=CONVERSATIONS,
    eval_dataset=None,
    group=None,
    options=None,
    **settings,
):
    trainer = kind(
        model=patch(model, sequence_group=group),
        args=arguments(tempfile.mkdtemp(), ddp_find_unused_parameters=False, **settings),
        train_dataset=data,
        eval_dataset=eval_dataset,
        data_collator=TreeCollator(pad_to_multiple_of=8 if group else 1),
        **options or {},
    )
    trainer.train()
    return trainer


def weights(model, adapter=None, **settings):
    trainer = train(model, **settings)
    if adapter is not None:
        trainer.save_model(adapter)
    state = trainer.accelerator.get_state_dict(trainer.model)  # gathered, where it is sharded
    names = {name for name, _ in model.named_parameters()}
    return {name: value.clone() for name, value in state.items() if name in names}


def evaluate(**settings):
    """The log, with eval_loss of three conversations: one process has more than the other."""
    held_out = {"eval_dataset": trees()[1:], "eval_on_start": True, "max_steps": 1, **HALF}
    trainer = train(tiny_model("llama"), per_device_eval_batch_size=1, **held_out, **settings)
    return trainer.state.log_history


def weights_at_the_loss(**settings):
    """Loss weights and divisors as they reach the loss, from all processes."""
    seen = []
    original = loss_module.weighted_causal_loss

    def spy(logits, labels, loss_weights, num_items):
        seen.append((float(loss_weights.double().sum()), float(num_items)))
        return original(logits, labels, loss_weights, num_items)

    loss_module.weighted_causal_loss = spy
    try:
        train(tiny_model("llama"), data=trees("conversation"), bf16=True, **HALF, **settings)
    finally:
        loss_module.weighted_causal_loss = original
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, seen)
    return gathered


def refusal(**settings):
    try:
        train(tiny_model("llama"), Trainer, trees("turn"), bf16=True, **HALF, **settings)
    except FlexmaskError as error:
        return str(error)
    return None


def main(path):
    results = {}
    for name, sharding in (("ddp", {}), ("fsdp2", FSDP)):
        if sharding:
            allow_fsdp_on_cpu()
        results[name, "plain"] = weights(tiny_model("llama"), **HALF, **sharding)
        results[name, "uneven"] = weights(
            tiny_model("llama"), data=CONVERSATIONS[:3], **HALF, **sharding
        )
        results[name, "stock Trainer"] = weights(
            tiny_model("llama"), kind=Trainer, **HALF, **sharding
        )
        results[name, "accumulated"] = weights(tiny_model("llama"), **ACCUMULATED, **sharding)
        results[name, "LoRA"] = weights(lora_model(), f"{path}-{name}", **HALF, **sharding)
        results[name, "turn"] = weights(
            tiny_model("llama"), data=trees("turn"), **ACCUMULATED, **sharding
        )
        results[name, "logs"] = evaluate(**sharding)
        results[name, "at the loss"] = weights_at_the_loss(**sharding)
    results["refusal"] = refusal(**FSDP)
    if torch.distributed.get_rank() == 0:
        torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
