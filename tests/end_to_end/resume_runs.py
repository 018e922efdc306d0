"""A run that goes on with other settings: many pairs of before and after, at one rank of a real site.

The trainer is built once; each pair makes optimizers, outer loops and a checkpoint of its own for its model, and inner
steps take made-up gradients, so that a pair costs milliseconds where two runs would cost seconds.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.end_to_end.method_runs import _make_gradients, _reset

STEPS = 4
NO_OUTER = {"method": "none"}
LOCAL, DILOCO = {"method": "local_sgd", "sync_every": 3}, {"method": "diloco", "sync_every": 3}
STREAMING = {"method": "diloco", "sync_every": 4, "num_fragments": 2}
ADAMW, SGD = {"name": "AdamW"}, {"name": "SGD", "momentum": 0.9}

PAIRS: dict[str, tuple[dict, dict]] = {
    "the same": ({"outer": DILOCO}, {"outer": DILOCO}),
    "none to diloco": ({"outer": NO_OUTER}, {"outer": DILOCO}),
    "none to streaming": ({"outer": NO_OUTER}, {"outer": STREAMING}),
    "local_sgd to diloco": ({"outer": LOCAL}, {"outer": DILOCO}),
    "diloco to local_sgd": ({"outer": DILOCO}, {"outer": LOCAL}),
    "diloco to none": ({"outer": DILOCO}, {"outer": NO_OUTER}),
    "diloco to local_adam": ({"outer": DILOCO}, {"outer": {"method": "local_adam", "sync_every": 3}}),
    "diloco to streaming": ({"outer": DILOCO}, {"outer": STREAMING}),
    "streaming to diloco": ({"outer": STREAMING}, {"outer": DILOCO}),
    "diloco to noloco": ({"outer": DILOCO}, {"outer": {"method": "noloco", "sync_every": 3}}),
    "noloco to diloco": ({"outer": {"method": "noloco", "sync_every": 3}}, {"outer": DILOCO}),
    "diloco to int4": ({"outer": DILOCO}, {"outer": DILOCO | {"codec": "int4"}}),
    "nesterov to adam": ({"outer": DILOCO}, {"outer": DILOCO | {"outer_optimizer": "adam", "outer_lr": 0.1}}),
    "AdamW to SGD": ({"inner": ADAMW}, {"inner": SGD}),
    "AdamW to plain SGD": ({"inner": ADAMW}, {"inner": {"name": "SGD"}}),
    "SGD to AdamW": ({"inner": SGD}, {"inner": ADAMW}),
    "AdamW to other settings": ({"inner": ADAMW}, {"inner": ADAMW | {"weight_decay": 0.3, "betas": (0.8, 0.9)}}),
    "model only": ({"outer": DILOCO, "model_only": True}, {"outer": DILOCO}),
    "model only, none": ({"model_only": True}, {}),
    "Hugging Face": ({"huggingface": True}, {"outer": DILOCO}),
}


def run_pairs(config: Path, name: str, folder: Path) -> None:
    """All pairs at one rank; rank 0 leaves what came of them in ``<folder>/<name>.json``."""
    torch.set_num_threads(1)
    from titan_ext.config import load_site

    trainer = load_site(
        config, name, [f"--dump_folder={folder}", "--checkpoint.enable", "--checkpoint.last_save_in_hf"]
    ).config.build()
    found = {pair: _run_pair(trainer, pair, folder) for pair in PAIRS}
    if torch.distributed.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def _run_pair(trainer, pair: str, folder: Path) -> dict[str, Any]:
    before, after = PAIRS[pair]
    place = str(folder / pair.replace(" ", "_"))
    _reset(trainer.model_parts)
    first = Run(trainer, place, **before)
    first.start()
    for _ in range(STEPS):
        first.step()
    first.save()
    saved, shared, states = first.parameters(), first.shared(), first.moments()
    if first.outer is not None:
        first.outer._in_flight.close()
    _reset(trainer.model_parts)
    first.optimizers.zero_grad()
    second = Run(trainer, place, **after)
    second.load()
    second.start()
    loaded = second.parameters()
    result = {
        "notes": second.checkpointer.notes,
        "step": second.clock.step,
        "parameters": all(torch.equal(saved[key], loaded[key]) for key in saved),
        "shared": _compared(second.shared(), shared),
        "from_local": _compared(second.shared(), loaded),
        "moments": second.moments() == states,
        "moments_zero": all(value == 0.0 for value in second.moments().values()),
        "changed": second.optimizers.changed_since_saved(),
        "groups": [{key: group.get(key) for key in ("weight_decay", "betas", "momentum")} for group in second.groups()],
        "epoch": second.schedulers.schedulers[0].last_epoch,
    }
    for _ in range(STEPS):
        second.step()
    result["finite"] = all(bool(torch.isfinite(value).all()) for value in second.parameters().values())
    return result


class Run:
    """One attempt of a run, as its trainer would make it."""

    def __init__(
        self, trainer, place: str, outer: dict | None = None, inner: dict | None = None, **saving: bool
    ) -> None:
        from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

        from titan_ext.semi_sync import SemiSync
        from titan_ext.trainer.optimizers import OptimizersContainer

        self._parts = trainer.model_parts
        inner = dict(inner or ADAMW)
        group = ParamGroupConfig(pattern=".*", optimizer_name=inner.pop("name"), optimizer_kwargs={"lr": 1e-2, **inner})
        config = OptimizersContainer.Config(param_groups=[group], implementation="foreach")
        self.optimizers = config.build(model_parts=self._parts)
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=0).build(
            optimizers=self.optimizers, training_steps=100
        )
        self.clock = Clock()
        self.outer = None
        if outer and outer["method"] != "none":
            self.outer = SemiSync.Config(**outer).build(
                model_parts=self._parts, optimizers=self.optimizers, manager=trainer.replica, register=False
            )
        self.checkpointer = self._checkpointer(trainer, place, **saving)

    def _checkpointer(self, trainer, place: str, model_only: bool = False, huggingface: bool = False):
        settings = {"last_save_model_only": model_only or huggingface, "last_save_in_hf": huggingface}
        config = type(trainer.config.checkpoint)(
            enable=True, folder="checkpoint", initial_load_model_only=False, keep_latest_k=0, **settings
        )
        states = {"train_state": self.clock} | ({"semi_sync": self.outer} if self.outer is not None else {})
        checkpointer = config.build(
            dataloader=trainer.dataloader,
            model_parts=self._parts,
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states=states,
            sd_adapter=trainer.checkpointer.sd_adapter,
            base_folder=place,
        )
        checkpointer.model_config = trainer.checkpointer.model_config
        checkpointer.description = trainer.checkpointer.description
        return checkpointer

    def start(self) -> None:
        if self.outer is not None:
            self.outer.inner_step = max(self.outer.inner_step, self.clock.step)
            self.outer.join()

    def step(self) -> None:
        self.clock.step += 1
        _make_gradients(self._parts, 1.0)
        self.optimizers.step()
        self.schedulers.step()
        if self.outer is not None:
            self.outer.step()

    def save(self) -> None:
        self.checkpointer.save(self.clock.step, last_step=True)

    def load(self) -> None:
        assert self.checkpointer.load()

    def groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def parameters(self) -> dict[str, torch.Tensor]:
        from titan_ext.semi_sync.state.views import canonical_name

        return {canonical_name(name): _whole(value) for part in self._parts for name, value in part.named_parameters()}

    def shared(self) -> dict[str, torch.Tensor]:
        return (
            {} if self.outer is None else {key: _whole(value) for key, value in self.outer.global_parameters().items()}
        )

    def moments(self) -> dict[str, float]:
        """A sum over each state of each parameter."""
        names = {value: name for part in self._parts for name, value in part.named_parameters()}
        return {
            f"{names[parameter]}.{key}": _whole(value).double().abs().sum().item()
            for each in self.optimizers
            for parameter, state in each.state.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }


class Clock:
    """The trainer's counts."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _compared(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _whole(value: torch.Tensor) -> torch.Tensor:
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().clone()
