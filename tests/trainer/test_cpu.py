"""What torchtitan finds on a machine without an accelerator."""

import ctypes
import subprocess
import sys

import pytest
import torch

from titan_ext import memory
from titan_ext.trainer.cpu import adapt, finish, on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="this machine has an accelerator")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "first",
    [
        "titan_ext",
        "titan_ext.semi_sync",
        *(
            pytest.param(module, marks=pytest.mark.slow)
            for module in ("titan_ext.models.llama3", "titan_ext.data.loader", "titan_ext.config.load")
        ),
    ],
)
def test_torchtitan_settles_on_the_cpu_whichever_module_comes_first(first):
    done = run_python(f"import {first}\nfrom torchtitan.tools.utils import device_type; print(device_type)")
    assert done.stdout.strip() == "cpu", done.stderr


def test_torchtitan_imported_too_early_is_refused_where_it_matters():
    too_early = "import torchtitan.tools.utils\nimport titan_ext.semi_sync\n"
    done = run_python(too_early)
    assert done.returncode == 0, done.stderr
    done = run_python(too_early + "import titan_ext.trainer.trainer")
    assert done.returncode != 0
    assert "import titan_ext first" in done.stderr


def test_memory_is_what_the_process_really_holds():
    memory.reset_peak()  # earlier tests may have held more
    before = memory.memory_stats()["reserved_bytes.all.peak"]
    block = torch.ones(32 * 2**20)  # 128 MiB, touched
    during = memory.memory_stats()["reserved_bytes.all.peak"]
    assert during - before > 100 * 2**20
    assert memory.HostProperties().total_memory > during
    del block
    memory.reset_peak()
    assert memory.memory_stats()["active_bytes.all.peak"] <= during


def test_freed_memory_goes_back_to_the_system():
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        pytest.skip("the C library has no malloc_trim")
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    block, size = 64 * 2**10, 64 * 2**20
    blocks = [library.malloc(block) for _ in range(size // block)]
    for address in blocks:
        ctypes.memset(address, 1, block)
    for address in blocks[:-1]:  # the last keeps the arena's end where it is
        library.free(address)
    before = memory._status("VmRSS")
    memory.release_free_memory()
    assert before - memory._status("VmRSS") > size // 2
    library.free(blocks[-1])


def test_monitor_of_torchtitan_reports_it():
    from torchtitan.components.metrics import build_device_memory_monitor

    monitor = build_device_memory_monitor()
    stats = monitor.get_peak_stats()
    assert stats.max_reserved_gib > 0.1
    assert 0 < stats.max_reserved_pct < 100


def test_configuration_is_adapted_and_fsdp_told_to_divide():
    from torch.distributed.fsdp import FSDPModule

    from titan_ext.models import get_model_spec
    from titan_ext.models.attention import PackedAttention
    from titan_ext.trainer.trainer import Trainer

    config = Trainer.Config(model_spec=get_model_spec("llama3", "tiny"))
    adapt(config)
    assert config.training.disable_cuda_graphs
    assert all(
        isinstance(layer.attention.inner_attention, PackedAttention.Config) for layer in config.model_spec.model.layers
    )

    class Sharded(FSDPModule, torch.nn.Linear):
        forced = False

        def __new__(cls, *args, **kwargs):
            return torch.nn.Module.__new__(cls)

        def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
            self.forced = enable

    inner = Sharded(2, 2)
    finish([torch.nn.Sequential(inner)])
    assert inner.forced
