"""Every method and codec, one after the other, on the model parts that torchtitan made of a layout.

Inner steps take made-up gradients that depend on a parameter's values alone, so what comes out does not
depend on the layout either, and a method costs milliseconds where a training run would cost seconds.
"""

import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

STEPS = 6
CASES = {
    "local_sgd": {"sync_every": 2},
    "local_sgd overlapped": {"method": "local_sgd", "sync_every": 2, "fragment_sync_delay": 1},
    "diloco": {"sync_every": 2},
    "diloco streaming": {
        "method": "diloco",
        "sync_every": 4,
        "num_fragments": 2,
        "fragment_sync_delay": 1,
        "fragment_update_alpha": 0.5,
    },
    "diloco adam": {"method": "diloco", "sync_every": 2, "outer_optimizer": "adam", "outer_lr": 0.1},
    "local_adam": {"sync_every": 2},
    "des_loc": {"sync_every": 1},
    "eager_diloco": {"sync_every": 2},
    "decoupled_diloco": {"sync_every": 4, "num_fragments": 2, "fragment_sync_delay": 1},
    "des_loc adopt": {"method": "des_loc", "sync_every": 1, "inner": "ADOPT"},
    "mt_dao": {
        "sync_every": 2,
        "settings": {"mt_dao": {"momentum_sync_every": [2, 4]}},
        "inner": "QHAdamW",
        "betas": [0.9, 0.99, 0.999],
        "omegas": [0.3, 0.5],
    },
    "lordo": {"sync_every": 2, "inner": "LowRankAdamW", "rank": 8, "basis_from": "outer"},
    "muloco": {"sync_every": 2, "inner": "Muon"},
    "noloco": {"sync_every": 2},
    "sparta": {"sync_every": 4, "settings": {"sparta": {"sparta_fraction": 0.1}}},
    "demo": {"inner": "DeMo"},
    "sparsyfed": {"sync_every": 2, "settings": {"sparsyfed": {"sparsity": 0.9}}},
    "worldlm": {"sync_every": 2, "settings": {"worldlm": {"federations": 0}}},
    **{
        f"{codec} codec": {"method": "diloco", "sync_every": 2, "codec": codec}
        for codec in ("bf16", "int8", "int4", "topk")
    },
    "all of topk": {"method": "diloco", "sync_every": 2, "codec": "topk", "settings": {"topk": {"density": 1.0}}},
    "des_loc int8": {"method": "des_loc", "sync_every": 2, "codec": "int8"},
    "eager int4": {"method": "eager_diloco", "sync_every": 2, "codec": "int4"},
}
ANY_LAYOUT_ONE_RESULT = [
    name
    for name in CASES
    if not any(
        word in name for word in ("sparta", "demo", "decoupled", "muloco", "lordo", "worldlm", "codec", "int8", "int4")
    )
]
"""Cases whose arithmetic is elementwise from end to end: equal bits on every layout."""


def run_cases(config: Path, site_name: str, folder: Path, resumed: Collection[str] = ()) -> None:
    """All cases at one rank; rank 0 leaves the results in ``<folder>/<site>.json``.

    Those that are ``resumed`` run once more, stopped in the middle of a round and taken up by fresh objects.
    """
    torch.set_num_threads(1)
    from titan_ext.config import load_site
    from titan_ext.replica import Replica

    site = load_site(config, site_name, [f"--dump_folder={folder}"])
    trainer = site.config.build()
    rank = torch.distributed.get_rank()
    results = {name: _run_case(trainer, name, dict(settings)) for name, settings in CASES.items()}
    for name in resumed:
        results[name]["resumed"] = _run_case(trainer, name, dict(CASES[name]), stop_after=3)["sha256"]
    if rank == 0:
        (folder / f"{site_name}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    assert Replica  # imported before the clock of a round runs
    os._exit(0)


def _run_case(trainer, name: str, settings: dict, stop_after: int | None = None) -> dict:
    site = trainer.config.site.name
    _reset(trainer.model_parts)
    inner, kwargs = inner_of(settings)
    settings = {"method": name, **settings}
    records = []

    def build():
        return _build(trainer, inner, kwargs, settings, records)

    optimizers, outer = build()
    outer.join()
    for step in range(STEPS):
        if step == stop_after:
            optimizers, outer = _stopped_and_resumed(trainer, optimizers, outer, build)
            outer.join()
        _make_gradients(trainer.model_parts, 1.0 if site == "a" else -0.5)
        optimizers.step()
        outer.step()
    outer.finish()
    assert records and all(record.committed and record.participants == 2 for record in records), records
    whole = [_whole(value) for value in outer.global_parameters().values()]
    largest = max((value.abs().max().item() for value in whole if value.numel()), default=0.0)
    return {
        "sha256": outer.shared_state_sha256(),
        "bytes": sum(record.bytes_sent for record in records),
        "sample": [value.flatten()[:64].tolist() for value in whole],
        "largest": largest,
    }


def _build(trainer, inner: str, kwargs: dict, settings: dict, records: list):
    from torchtitan.components.optimizer import ParamGroupConfig

    from titan_ext.semi_sync import SemiSync
    from titan_ext.trainer.optimizers import OptimizersContainer

    group = ParamGroupConfig(pattern=".*", optimizer_name=inner, optimizer_kwargs={"lr": 1e-2, **kwargs})
    optimizers = OptimizersContainer.Config(param_groups=[group], implementation="foreach").build(
        model_parts=trainer.model_parts
    )
    outer = SemiSync.Config(**settings).build(
        model_parts=trainer.model_parts,
        optimizers=optimizers,
        manager=trainer.replica,
        on_round=records.append,
        register=False,
    )
    return optimizers, outer


def _stopped_and_resumed(trainer, optimizers, outer, build):
    """What a checkpoint of this moment gives back to objects that know nothing."""
    from titan_ext.semi_sync.state.views import materialize_state

    def copied(tree):
        return tree_map(lambda each: each.detach().clone() if isinstance(each, torch.Tensor) else each, tree)

    saved = copied(outer.state_dict())
    states = [copied(each.state_dict()) for each in optimizers.optimizers]
    parameters = [copied(dict(part.named_parameters())) for part in trainer.model_parts]
    outer._in_flight.close()
    _reset(trainer.model_parts)
    optimizers, outer = build()
    with torch.no_grad():
        for part, values in zip(trainer.model_parts, parameters):
            for name, parameter in part.named_parameters():
                parameter.copy_(values[name])
    for optimizer, state in zip(optimizers.optimizers, states):
        materialize_state(optimizer)
        optimizer.load_state_dict(state)
    outer.load_state_dict(saved)
    return optimizers, outer


def inner_of(settings: dict) -> tuple[str, dict]:
    """Take the inner optimizer's name and settings out of a case's."""
    kwargs = {key: settings.pop(key) for key in ("betas", "omegas", "rank", "basis_from") if key in settings}
    return settings.pop("inner", "AdamW"), kwargs


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().float()


def _reset(parts) -> None:
    from titan_ext.semi_sync.site.shards import piece_of
    from titan_ext.semi_sync.state.views import canonical_name, local_tensor

    for part in parts:
        for name, parameter in part.named_parameters():
            seed = zlib.crc32(canonical_name(name).encode())
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            local_tensor(parameter).copy_(piece_of(parameter).take(whole))


def _make_gradients(parts, direction: float) -> None:
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = torch.sin(3 * parameter.detach()) * direction + 0.1 * parameter.detach()
