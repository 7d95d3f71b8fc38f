"""Importing this module enables FSDP2 on the CPU, for which accelerate otherwise silently uses DDP."""

from accelerate.state import DistributedType, PartialState

create = PartialState.__init__


def __init__(self, *args, **kwargs):
    create(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = __init__
