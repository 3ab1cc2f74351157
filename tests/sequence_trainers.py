"""What four processes do that share rows two by two; read by test_sequence_trainers.

Run by torchrun; writes to the file named first what each case gives: the parameters after three
steps, or logs.
"""

import sys

import torch
from accelerate import PartialState
from fsdp_on_cpu import allow_fsdp_on_cpu
from model_cases import tiny_model
from test_trainers import lora_model
from trainer_cases import arguments, trees
from transformers import Trainer
from two_processes import ACCUMULATED, FSDP, HALF, TOKEN_METRICS, evaluate, train, weights

from flexmask import FlexmaskError, TreeBatchSampler
from flexmask.training.sequence_parallel import make_group


def refusal(**settings):
    try:
        train(tiny_model("llama"), **HALF, **settings)
    except FlexmaskError as error:
        return str(error)
    return None


def main(path):
    PartialState(cpu=True)
    group = make_group(arguments(path), 2)
    apart = torch.distributed.new_subgroups_by_enumeration([[0, 2], [1, 3]])[0]
    results = {
        "apart": refusal(group=apart),
        "other batches": refusal(group=group, kind=Trainer),
        "metrics": refusal(
            group=group,
            options={"compute_metrics": lambda _: {}},
            eval_dataset=trees(),
            eval_on_start=True,
        ),
    }
    experts = tiny_model("qwen3_moe", output_router_logits=True)
    results["experts"] = weights(experts, group=make_group(arguments(path), 4))
    longest = max(tree.num_tokens for tree in trees())
    sampler = TreeBatchSampler(trees(), max_tokens=2 * longest, num_processes=2, rows_per_batch=9)
    turns = {"data": trees("turn"), **ACCUMULATED}
    results["ddp", "turn, accumulated"] = weights(tiny_model("llama"), group=group, **turns)
    results["ddp", "bf16"] = weights(tiny_model("llama"), group=group, bf16=True, **HALF)
    results["ddp", "rows of a sampler"] = weights(
        tiny_model("llama"), data=trees(), options={"batch_sampler": sampler}, group=group
    )
    results["ddp", "logs"] = evaluate(options=TOKEN_METRICS, group=group)
    allow_fsdp_on_cpu()
    shared = {"group": group, **FSDP}
    results["fsdp2", "turn, accumulated"] = weights(tiny_model("llama"), **turns, **shared)
    results["fsdp2", "LoRA, checkpointed"] = weights(
        lora_model(), gradient_checkpointing=True, **HALF, **shared
    )
    results["fsdp2", "logs"] = evaluate(options=TOKEN_METRICS, **shared)
    if torch.distributed.get_rank() == 0:
        torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
