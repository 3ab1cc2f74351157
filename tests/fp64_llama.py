"""A llama in fp64 throughout: stock transformers casts norms, rotary angles and softmax to fp32."""

from types import MethodType

import torch
from model_cases import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def fp64_llama():
    """A tiny llama in fp64 whose N-pass attention is SDPA, which computes fp64 in fp64."""
    model = tiny_model("llama").double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(_norm, module)
    rotary = model.model.rotary_emb
    exponents = torch.arange(0, model.config.head_dim, 2, dtype=torch.float64)
    theta = model.config.rope_parameters["rope_theta"]
    rotary.inv_freq = theta ** (-exponents / model.config.head_dim)
    rotary.forward = MethodType(_angles, rotary)
    model.loss_function = _loss
    return model


def _norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * hidden * scale


def _angles(self: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor):
    angles = position_ids[..., None].double() * self.inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _loss(logits, labels, *, shift_labels, num_items_in_batch, **_):
    """The sum of negative log-probabilities over the number of items, from the definition."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, shift_labels.clamp_min(0)[..., None])[..., 0]
    return -(chosen * (shift_labels != -100)).sum() / num_items_in_batch
