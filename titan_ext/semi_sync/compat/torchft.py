"""torchft's ``LocalSGD`` and ``DiLoCo`` on our engine: change the import, keep the script.

Constructors, context-manager use and the keys in the manager's state are torchft 0.2.0's, and so is
what happens after a failed commit. What differs: the sites also meet once before the first step, so
the manager's step is one ahead; buckets are ours, so ``use_bucketization`` changes nothing; with
``should_quantize`` values travel as int8 on any device, without Triton.
"""

from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchft.manager import Manager

from titan_ext.semi_sync.compat.torchft_manager import quorum_is_asynchronous
from titan_ext.semi_sync.engine import SemiSync

_MIB = 32.0


class _OnOptimizerHooks:
    """Runs an outer loop from the hooks of the inner optimizer."""

    def __init__(self, manager: Manager, optimizer: Optimizer) -> None:
        if quorum_is_asynchronous(manager):
            raise ValueError(
                f"{type(self).__name__} needs a synchronous quorum: build the manager with use_async_quorum=False"
            )
        self._manager = manager
        self._optimizer = optimizer
        self._outer: SemiSync
        self._joined = False
        self._hooks: list[RemovableHandle] = []

    def __enter__(self):
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return False

    def _before_step(self, *_: Any) -> None:
        if not self._joined:
            self._outer.join()
            self._joined = True
        # The step changes tensors that a peer may be reading.
        self._manager.disallow_state_dict_read()

    def _after_step(self, *_: Any) -> None:
        self._manager.allow_state_dict_read()
        self._outer.step()


class LocalSGD(_OnOptimizerHooks):
    """torchft's ``LocalSGD``: parameters averaged every ``sync_every`` steps; a failed round is skipped.

    Args:
        manager: a manager with a synchronous quorum.
        model: the model.
        optimizer: its optimizer, on whose steps this hangs.
        sync_every: steps between two averages.

    Raises:
        ValueError: the manager's quorum is asynchronous, or ``sync_every`` is below 1.
    """

    def __init__(self, manager: Manager, model: nn.Module, optimizer: Optimizer, sync_every: int) -> None:
        super().__init__(manager, optimizer)
        self._outer = SemiSync.Config(method="local_sgd", sync_every=sync_every).build(
            model_parts=[model], optimizers=optimizer, manager=manager
        )


class DiLoCo(_OnOptimizerHooks):
    """torchft's ``DiLoCo`` and Streaming DiLoCo; after a failed round the global parameters come back.

    Args:
        manager: a manager with a synchronous quorum.
        model_fragments: the parts of the model, synced in turn.
        inner_optimizer: on whose steps this hangs.
        outer_optimizer: one for all fragments, or one for each, over the fragments' parameters.
        sync_every: inner steps between two syncs of the same fragment.
        backup_device: where the global copy lives; None is host memory.
        pin_memory: accepted for torchft's sake.
        use_bucketization: accepted for torchft's sake; values always travel in buckets.
        bucket_cap_mb: largest bucket in MiB.
        should_quantize: send int8.
        fragment_sync_delay: inner steps that overlap an exchange (tau).
        fragment_update_alpha: share of the local parameters kept (alpha).

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        manager: Manager,
        model_fragments: list[nn.Module],
        inner_optimizer: Optimizer,
        outer_optimizer: Optimizer | list[Optimizer],
        sync_every: int,
        backup_device: torch.device | None = None,
        pin_memory: bool = True,
        use_bucketization: bool = False,
        bucket_cap_mb: int | None = None,
        should_quantize: bool = False,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
    ) -> None:
        super().__init__(manager, inner_optimizer)
        several = outer_optimizer if isinstance(outer_optimizer, list) else [outer_optimizer] * len(model_fragments)
        if len(several) != len(model_fragments):
            raise ValueError(f"outer_optimizer: {len(several)} optimizers for {len(model_fragments)} model fragments")
        self._optimizers = several
        whole = nn.Module()
        for index, fragment in enumerate(model_fragments):
            whole.add_module(str(index), fragment)
        config = SemiSync.Config(
            method="diloco",
            sync_every=sync_every,
            fragments=[[str(index)] for index in range(len(model_fragments))],
            fragment_sync_delay=fragment_sync_delay,
            fragment_update_alpha=fragment_update_alpha,
            codec="int8" if should_quantize else "fp32",
            bucket_mib=bucket_cap_mb or _MIB,
            outer_state_device="cpu" if backup_device is None or backup_device.type == "cpu" else "same",
        )
        self._outer = config.build(
            model_parts=[whole],
            optimizers=inner_optimizer,
            manager=manager,
            outer_optimizers=self._optimizers,
            keep_local_work=False,
            register=False,
        )
        self._arriving: dict[str, Any] = {}
        # In torchft's order: a peer's state is complete when its last fragment has come.
        manager.register_state_dict_fn("titan_ext", self._load_counters, self._save_counters)
        for index in range(len(model_fragments)):
            self._register_fragment(index, last=index == len(model_fragments) - 1)

    def _save_counters(self) -> dict[str, Any]:
        """All but the fragments' parameters."""
        state = self._outer.shared_state()
        return {
            **state,
            "states": {key: each for key, each in state["states"].items() if not key.startswith("params/")},
        }

    def _load_counters(self, state: dict[str, Any]) -> None:
        self._arriving = {**state, "states": dict(state["states"])}

    def _register_fragment(self, index: int, *, last: bool) -> None:
        key, prefix = f"params/{index}", f"{index}."

        def save() -> dict[str, Any]:
            shared = self._outer.shared_state()["states"][key]
            originals = {name.removeprefix(prefix): values["global"] for name, values in shared.items()}
            return {"outer_optimizer": self._optimizers[index].state_dict(), "original_parameters": originals}

        def load(state: dict[str, Any]) -> None:
            self._optimizers[index].load_state_dict(state["outer_optimizer"])
            own = self._outer.shared_state()["states"][key]
            originals = {prefix + name: value for name, value in state["original_parameters"].items()}
            self._arriving["states"][key] = {
                name: {**own[name], "global": value} for name, value in originals.items() if name in own
            }
            if last:
                self._outer.receive_shared_state(self._arriving)

        self._manager.register_state_dict_fn(f"StreamingDiLoCoFragment_{index}", load, save)
