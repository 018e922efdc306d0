"""Makes torchtitan 0.3.0 train on a CPU.

torchtitan picks its device when it is imported and asks that device's module for things which
``torch.cpu`` does not have. Importing this module gives it both; ``import_hook`` does so in time.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from titan_ext import memory


def on_cpu() -> bool:
    """Whether this machine has no accelerator."""
    return not torch.accelerator.is_available()


def prepare() -> None:
    """Make ``torch.cpu`` what torchtitan expects of a device; calling it again is free.

    Raises:
        RuntimeError: torchtitan was imported first and has settled on a device that is not there.
    """
    if not on_cpu() or getattr(torch.cpu, "memory_stats", None) is memory.memory_stats:
        return
    tools = sys.modules.get("torchtitan.tools.utils")
    if tools is not None and tools.device_type != "cpu":
        raise RuntimeError(
            "torchtitan was imported before titan_ext and has settled on a device that is not there: "
            "import titan_ext first"
        )
    cpu: Any = torch.cpu
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu.get_device_name = lambda device=None: memory.processor_name()
    cpu.get_device_properties = lambda device=None: memory.HostProperties()
    cpu.memory_stats = memory.memory_stats
    cpu.reset_peak_memory_stats = lambda device=None: memory.reset_peak()
    cpu.empty_cache = lambda: None
    # torch.cpu.current_device() is the string "cpu", which barrier(device_ids=…) refuses.
    cpu.current_device = lambda: 0


def adapt(config) -> None:
    """Set what a CPU cannot do otherwise in a torchtitan ``Trainer.Config``, in place."""
    if not on_cpu():
        return
    from titan_ext.models.attention import use_packed_attention
    from titan_ext.models.experts import use_wide_experts

    config.training.disable_cuda_graphs = True
    # A CPU emulates bfloat16; the mixed-precision copy would only cost time.
    config.training.mixed_precision_param = "float32"
    if config.model_spec is not None:
        use_wide_experts(config.model_spec.model)
        config.model_spec = replace(config.model_spec, model=use_packed_attention(config.model_spec.model))


def finish(model_parts: Iterable[nn.Module]) -> None:
    """Call once the model is parallelized: Gloo has no pre-multiplied sum, so FSDP must divide itself."""
    if not on_cpu():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


prepare()
