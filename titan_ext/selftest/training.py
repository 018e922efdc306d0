"""A real run of two sites on the device, beside the same on the CPU; compiled layers; step times and memory.

Inside a site the device's own collectives work (NCCL on CUDA, with one rank each: both sites share the device), and
Gloo between the sites.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from titan_ext.selftest.row import Row, compared, judged
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

_STEPS, _SITES = 6, ("a", "b")
_PATIENCE_SECONDS = 300
_LOSS_TOLERANCE = 5e-2  # a GPU computes in bf16, a CPU in fp32
_REPEATS = 10
_FILE = f"""
[model]
name = "llama3"
flavor = "tiny"
[training]
seq_len = 64
local_batch_size = 4
steps = {_STEPS}
[optimizer]
name = "AdamW"
lr = 1e-3
[lr_scheduler]
warmup_steps = 1
[metrics]
enable_tensorboard = false
[semi_sync]
method = "diloco"
sync_every = 2
[replica]
min_sites = 2
[[site]]
name = "a"
data = "builtin:code"
[[site]]
name = "b"
data = "builtin:docs"
"""


def training(device: str) -> Iterator[Row]:
    """Two sites of real processes: equal hashes, falling losses, and about the CPU's losses."""
    lacking = [each for each in ("torchtitan", "torchft") if importlib.util.find_spec(each) is None]
    if lacking:
        yield Row(part="training", name="two sites", verdict="skipped", figure=f"{lacking[0]} is not installed")
        return
    found = _run(device)
    if isinstance(found, str):
        yield judged("training", "two sites", False, found)
        return
    digests = {summary["shared_state_sha256"] for summary in found.values()}
    yield judged("training", "two sites, hashes", len(digests) == 1, f"{len(digests)} among {len(found)} sites")
    falls = all(summary["final_loss"] < summary["first_loss"] for summary in found.values())
    losses = ", ".join(f"{each['first_loss']:.3f} to {each['final_loss']:.3f}" for each in found.values())
    yield judged("training", "two sites, losses", falls, losses)
    if device == "cpu":
        return
    wanted = _run("cpu")
    if isinstance(wanted, str):
        yield judged("training", "two sites on the CPU", False, wanted)
        return
    ours, theirs = (torch.tensor([each[site]["final_loss"] for site in _SITES]) for each in (found, wanted))
    yield compared("training", "last losses", ours, theirs, _LOSS_TOLERANCE)


def _run(device: str) -> dict[str, dict] | str:
    """The summaries of both sites; or, in a line, why there are none."""
    os.environ.setdefault("RUST_LOG", "error")  # before torchft is loaded: it tells of every quorum
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=len(_SITES), join_timeout_ms=60_000)
    url = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    try:
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "run.toml").write_text(_FILE, encoding="utf-8")
            processes = {site: _start(folder, site, url, device) for site in _SITES}
            return _finished(folder, processes)
    finally:
        server.shutdown()


def _start(folder: Path, site: str, url: str, device: str) -> "subprocess.Popen[bytes]":
    """One rank of a site, as torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHFT_LIGHTHOUSE": url,
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "titan_ext.train", "--config", str(folder / "run.toml"), "--site", site]
    with open(folder / f"{site}.txt", "wb") as log:
        return subprocess.Popen(
            [*command, f"--dump_folder={folder / 'run'}"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _finished(folder: Path, processes: "dict[str, subprocess.Popen[bytes]]") -> dict[str, dict] | str:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        for site, process in processes.items():
            code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
            if code:
                lines = (folder / f"{site}.txt").read_text(errors="replace").strip().splitlines()
                return f"site {site} ended with {code}: {lines[-1] if lines else ''}"
    except subprocess.TimeoutExpired:
        return f"a site takes more than {_PATIENCE_SECONDS} s"
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {site: json.loads((folder / "run" / site / "summary.json").read_text()) for site in processes}


def compiled(device: str) -> Iterator[Row]:
    """A compiled layer beside the same one as it is, forward and backward."""
    layer = _layer().to(device)
    try:
        found, wanted = (_gradient(each, layer, device) for each in (torch.compile(layer), layer))
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way
        yield judged("compile", "a layer", False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return
    yield compared("compile", "a layer, gradients", found, wanted, 1e-4)


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))


def _gradient(call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, device: str) -> torch.Tensor:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device)
    layer.zero_grad()
    call(inputs).square().mean().backward()
    return torch.cat([each.grad.flatten() for each in layer.parameters() if each.grad is not None])


def ratios(device: str) -> Iterator[Row]:
    """What the outer loop adds to a step and to the device's memory, with its copies there and in host memory.

    The three take turns, so that all see the same machine.
    """
    sites = [InProcessSites(1) for _ in _PLACES]
    held = [_allocated(device)]
    steps = []
    for each, place in zip(sites, _PLACES.values(), strict=True):
        steps.append(_training_step(each, place, device))
        steps[-1]()
        held.append(_allocated(device))
    turns = [[_timed(step, device) for step in steps] for _ in range(_REPEATS)]
    plain, *others = (median(taken) for taken in zip(*turns, strict=True))
    own, *memory = (after - before for before, after in pairwise(held))
    yield Row(part="ratios", name="inner step", verdict="measured", figure=f"{1e3 * plain:.2f} ms")
    for name, seconds, size in zip(list(_PLACES)[1:], others, memory, strict=True):
        figure = f"{seconds / plain:.2f} times an inner step" + (f", {size / own:.2f} times its memory" if own else "")
        yield Row(part="ratios", name=name, verdict="measured", figure=figure)
    for each in sites:
        each.close()


_PLACES = {"inner step": None, "round at every step": "same", "… off-loaded": "cpu"}


def _training_step(sites: InProcessSites, place: str | None, device: str) -> Callable[[], None]:
    """A step of a small model, with a round of one site after it where ``place`` says where the copies lie."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(256, 512, device=device)
    outer = None
    if place is not None:
        settings = SemiSyncConfig(method="diloco", sync_every=1, outer_state_device=place)  # type: ignore[arg-type]
        (outer,) = sites.outer_loops(settings, [model], [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if outer is not None:
            outer.step()

    return step


def _timed(step: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _allocated(device: str) -> int:
    """Bytes on the device; 0 where nobody counts them."""
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0
