"""What torch.cuda, dynamo, inductor and triton ask about a GPU, answered."""

import math
from types import SimpleNamespace

import torch
from torch._inductor.runtime import triton_heuristics
from triton.backends.nvidia import driver as nvidia

NAME = "stand-in for a GPU"
# multiprocessors, bytes of shared memory that a program can have
CHIPS = {
    80: (108, 163 * 1024),
    89: (128, 99 * 1024),
    90: (132, 227 * 1024),
    100: (148, 227 * 1024),
    120: (170, 99 * 1024),
}
# of torch._C, missing from its CPU build; one device, one stream
ANSWERS = {
    "_cuda_exchangeDevice": 0,
    "_cuda_getCurrentRawStream": 0,
    "_cuda_getDevice": 0,
    "_cuda_getDeviceCount": 1,
    "_cuda_isCurrentStreamCapturing": False,
    "_cuda_maybeExchangeDevice": 0,
    "_cuda_setDevice": None,
    "_cuda_synchronize": None,
    "_is_flash_attention_available": True,
}
KERNELS = torch.library.Library("aten", "IMPL")


def always(answer):
    return lambda *arguments, **options: answer


def properties(capability):
    """What torch.cuda.get_device_properties gives for a chip."""
    num_processors, shared = CHIPS[capability]
    found = object.__new__(torch.cuda._CudaDeviceProperties)  # which dynamo takes for a constant
    vars(found).update(
        name=NAME,
        type="cuda",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=num_processors,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        regs_per_multiprocessor=65536,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048 if capability in (80, 90, 100) else 1536,
        warp_size=32,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
    )
    return found


def install(capability):
    """Let torch and triton find one GPU of this compute capability."""
    chip = properties(capability)
    for name, answer in ANSWERS.items():
        setattr(torch._C, name, always(answer))
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided
    torch.storage._StorageBase.clone = _clone
    cuda = torch.cuda
    cuda._initialized = True
    cuda._get_device_properties = always(chip)
    cuda._exchange_device, cuda._maybe_exchange_device = always(0), always(0)  # dynamo knows each
    cuda.is_current_stream_capturing = always(False)
    cuda.manual_seed_all = always(None)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    utils = SimpleNamespace(
        get_device_properties=always(
            {
                "max_shared_mem": chip.shared_memory_per_block_optin,
                "multiprocessor_count": chip.multi_processor_count,
            }
        )
    )
    nvidia.CudaUtils = always(utils)
    for kernel in (_flash_attention_forward, _flash_attention_backward, histc):
        KERNELS.impl(kernel.__name__, kernel, "CUDA")
    triton_heuristics.cached_autotune = _with_largest_blocks(triton_heuristics.cached_autotune)


def _flash_attention_forward(*arguments, **options):
    """FlashAttention's operator, by the plain evaluation that backend `varlen` has on the CPU."""
    from flexmask.backends.varlen_plain import plain_forward

    out, lse = plain_forward(*arguments, **options)
    state = out.new_empty(2, dtype=torch.uint64)
    return out, lse, state, state.new_empty(()), out.new_empty(0)


def _flash_attention_backward(*arguments, **options):
    from flexmask.backends.varlen_plain import plain_backward

    return plain_backward(*arguments, **options)


def histc(x, *arguments):
    """Of integers too, which the CPU's kernel does not count."""
    return torch.histc(x.cpu().float(), *arguments).to(x)


def _empty_strided(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _clone(storage):
    """A copy of a storage, which torch's CPU build does not allocate on CUDA by itself."""
    memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device)
    return memory.untyped_storage().copy_(storage)


def _with_largest_blocks(cached_autotune):
    """Inductor's decorator of kernels, with the configuration first that has fewest programs.

    In the interpreter the first one is taken, and a program costs the same whatever its block.
    """

    def size(config):
        return math.prod(x for name, x in config.kwargs.items() if name.endswith("BLOCK"))

    def decorate(size_hints, configs, *arguments, **options):
        by_size = sorted(configs, key=size, reverse=True)
        return cached_autotune(size_hints, by_size, *arguments, **options)

    return decorate
