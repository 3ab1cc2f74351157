"""FSDP over gloo on CPU: accelerate turns it on for GPUs only, and takes DDP elsewhere.

Run as a script, it lets the program in its arguments meet that.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState


def allow_fsdp_on_cpu():
    """Let accelerate take processes on CPU for what it allows FSDP for."""
    original = PartialState.__init__

    def start(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
