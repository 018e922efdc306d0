"""Codecs, inner optimizers and the outer loop on a device, in one process; torch alone is needed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from titan_ext import optim
from titan_ext.selftest.row import Row, compared, judged
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.codecs import CODECS

_SITES, _STEPS, _EVERY = 2, 6, 2
_FP32 = 1e-5
_ELEMENTS = 2**18
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "ADOPT": {},
    "QHAdamW": {"omegas": (0.9,), "betas": (0.99, 0.999)},
    "QHADOPT": {"omegas": (0.9,), "betas": (0.99, 0.999)},
    "QHSGDM": {},
    "Muon": {},
    "LowRankAdamW": {"rank": 8},
    "DeMo": {},
}
# Products of matrices in other orders of summation, and orthogonalisation by them.
_LOOSE = {"Muon": 5e-2, "LowRankAdamW": 5e-2, "DeMo": 5e-2}
_METHODS: dict[str, dict[str, Any]] = {
    "local_sgd": {"method": "local_sgd"},
    "diloco": {"method": "diloco"},
    "diloco, streaming": {"method": "diloco", "sync_every": 4, "num_fragments": 2, "fragment_sync_delay": 1},
    "diloco, outer adam": {"method": "diloco", "outer_optimizer": "adam", "outer_lr": 0.1},
    "local_adam": {"method": "local_adam"},
    "des_loc": {"method": "des_loc"},
    **{f"diloco, {codec}": {"method": "diloco", "codec": codec} for codec in ("bf16", "int8", "int4")},
}
# A rounding that falls to the other side moves an element by a level of its block.
_OF_CODEC = {"bf16": 1e-2, "int8": 2e-2, "int4": 0.3}


def codecs(device: str) -> Iterator[Row]:
    """Each codec writes on the device what the CPU reads, and reads there what the CPU wrote."""
    values = torch.randn(_ELEMENTS, generator=torch.Generator().manual_seed(1))
    for name in CODECS:
        codec = CODECS.get(name)()
        here, there = (_coded(codec, values.to(place)) for place in ("cpu", device))
        same = torch.equal(here[0], there[0].cpu())
        yield judged("codecs", f"{name}, bytes", same or not codec.lossless, "equal" if same else "differ")
        yield compared("codecs", f"{name}, values", there[1], here[1], 0.0 if same else _OF_CODEC.get(name, _FP32))


def _coded(codec: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    message = torch.empty(codec.wire_bytes(values.numel()), dtype=torch.uint8, device=values.device)
    codec.encode(values, message)
    decoded = torch.empty_like(values)
    codec.decode(message, decoded)
    return message, decoded


def optimizers(device: str) -> Iterator[Row]:
    """Some steps of each inner optimizer."""
    for name, settings in _OPTIMIZERS.items():
        here, there = (_stepped(name, settings, place) for place in ("cpu", device))
        yield compared("optimizers", name, there, here, _LOOSE.get(name, _FP32))


def _stepped(name: str, settings: dict[str, Any], device: str) -> torch.Tensor:
    model = _model(device)
    optimizer = _build(name, settings, model)
    for _ in range(_STEPS):
        _make_gradients(model, 1.0)
        optimizer.step()
    return _flat(model)


def _build(name: str, settings: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    names, parameters = zip(*model.named_parameters(), strict=True)
    build: Callable[..., torch.optim.Optimizer] = getattr(optim, name, None) or getattr(torch.optim, name)
    return build([{"params": list(parameters), "param_names": list(names)}], lr=1e-2, **settings)


def outer_loop(device: str) -> Iterator[Row]:
    """Methods and codecs at two sites; both hold the same bits afterwards, and about what the CPU has."""
    for name, settings in _METHODS.items():
        here, _ = _trained(settings, "cpu")
        there, digests = _trained(settings, device)
        yield compared("outer-loop", name, there, here, _OF_CODEC.get(settings.get("codec", ""), 1e-4))
        yield judged("outer-loop", f"{name}, hashes", len(digests) == 1, f"{len(digests)} among {_SITES} sites")


def off_load(device: str) -> Iterator[Row]:
    """The outer loop's copies in host memory change no bit of a method whose outer step rounds alike, and are pinned."""
    for name in ("local_sgd", "diloco"):
        here, _ = _trained({"method": name}, device)
        there, _ = _trained({"method": name, "outer_state_device": "cpu"}, device)
        yield compared("off-load", name, there, here, _FP32)
    if torch.device(device).type == "cuda":
        pinned = _pinned(device)
        yield judged("off-load", "pinned buffers", pinned, "pinned" if pinned else "pageable")
    else:
        yield Row(part="off-load", name="pinned buffers", verdict="skipped", figure="for CUDA alone")


def _pinned(device: str) -> bool:
    sites = InProcessSites(1)
    model = _model(device)
    settings = SemiSyncConfig(method="diloco", sync_every=1, outer_state_device="cpu")
    (outer,) = sites.outer_loops(settings, [model], [_build("AdamW", {}, model)])
    copies = list(outer.global_parameters().values())
    sites.close()
    return all(each.is_pinned() for each in copies)


def _trained(settings: dict[str, Any], device: str) -> tuple[torch.Tensor, set[str]]:
    """The first site's parameters after some rounds, and the sites' different hashes."""
    models = [_model(device) for _ in range(_SITES)]
    optimizers = [_build("AdamW", {}, model) for model in models]
    sites = InProcessSites(_SITES)
    outer = sites.outer_loops(SemiSyncConfig(**{"sync_every": _EVERY} | settings), models, optimizers)
    for _ in range(_STEPS):
        for site, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            _make_gradients(model, 1.0 if site == 0 else -0.5)
            optimizer.step()
        sites.at_once(lambda site: outer[site].step())
    sites.at_once(lambda site: outer[site].finish())
    digests = {each.shared_state_sha256() for each in outer}
    sites.close()
    return _flat(models[0]), digests


def _model(device: str) -> nn.Module:
    """Four layers whose values are drawn on the CPU: the same everywhere."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(96, 64) for _ in range(4))})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(device)


def _make_gradients(model: nn.Module, direction: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.sin(3 * parameter.detach()) * direction + 0.1 * parameter.detach()


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])
