"""What inductor makes of FlexAttention, compiled for the stand-in's chip and not run."""

from contextlib import contextmanager
from unittest import mock

import torch
from backend_cases import mask_from_depths, random_inputs
from torch._inductor import config
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton_compile import binary_of

from flexmask.backends import flex


@contextmanager
def generated():
    """Yields the templates that inductor generates in here, whose launches do nothing."""
    templates = []

    def keep(kernel, **options):
        if kernel.heuristic_type == HeuristicType.TEMPLATE:
            templates.append(kernel)

    with (
        mock.patch.object(CachingAutotuner, "precompile", keep),
        mock.patch.object(CachingAutotuner, "run"),
        config.patch(compile_threads=1, force_disable_caches=True),
    ):
        yield templates


def flex_kernels(length, width, *, dtype=torch.bfloat16, is_static=False):
    """FlexAttention's kernels for a row, forward and backward: a list of two `Binary`.

    Args:
        length: tokens of the row.
        width: of the heads, 8 of queries and 2 of keys.
        dtype: of queries, keys and values.
        is_static: compile for this length alone, not as users do.
    """
    end = mask_from_depths([*range(length)]).subtree_end.cuda()
    shape = {"heads": 8, "kv_heads": 2, "width": width, "value_width": width}
    *inputs, dout = random_inputs(mask_from_depths([*range(length)]), dtype=dtype, **shape)
    leaves = [x.cuda().requires_grad_() for x in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(flex._attend, dynamic=not is_static, fullgraph=True)
    with generated() as templates, mock.patch.object(flex, "_compiled", return_value=compiled):
        out = flex.flex_backend(*leaves, end, None, scale=width**-0.5)
        torch.autograd.grad(out, leaves, dout.cuda())
    major, minor = torch.cuda.get_device_capability()
    return [
        binary_of(kernel._precompile_config(kernel.configs[0]).kernel, 10 * major + minor)
        for kernel in templates
    ]
