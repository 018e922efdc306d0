"""torchft's ``LocalSGD`` and ``DiLoCo`` on our engine: change the import, keep the script.

Constructors, use as context managers, quorums, votes, the manager's step and the keys in its state are torchft 0.2.0's.
So are the parameters after each step, also where a vote fails or a replica joins late. All replicas of a run change the
import together. A mock of the manager is asked what torchft's classes would ask it, as a site alone.

What differs:

- Values travel in one flat buffer, and beside it two small all-reduces: what each site is about to exchange, and its
  weight. ``use_bucketization`` and ``TORCHFT_USE_BUCKETIZATION`` change nothing but how often a mock is asked.
- ``should_quantize`` sends int8 on any device, without Triton. What that loses is added to the next contribution.
- The copy of the global parameters is fp32, and pinned where it is in host memory and the model on a GPU;
  ``pin_memory`` changes nothing.
- Buffers that a checkpoint keeps become their mean. A site whose values are not finite is left out of a round.
- One outer optimizer for several fragments steps the fragment whose turn it is, without the others' inner gradients.
- What was loaded into the model before its first step is what it starts from.
- Sites whose arguments, models or loaded weights differ are refused; one whose global parameters are not those of the
  others takes theirs. Where the script registers no model with the manager, the local ones follow.
- Refused are an asynchronous quorum, spares (``WorldSizeMode.FIXED_WITH_SPARES``), a ``backup_device`` that is neither
  the host nor where the model is, a parameter in two fragments, and an outer optimizer over other parameters than its
  fragments'.
- torchft's privates (``_fragments`` and all below it) and ``extract_local_tensor`` are missing.
"""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchft.manager import Manager

from titan_ext.errors import require
from titan_ext.semi_sync.compat.scripted_loop import ScriptedLoop
from titan_ext.semi_sync.compat.torchft_manager import manager_of_script
from titan_ext.semi_sync.config import SemiSyncConfig

_MIB = 32.0
_REST = "titan_ext"
"""Key in the manager's state of all that torchft's classes do not have."""


class _OnOptimizerHooks:
    """Runs an outer loop from the hooks of the inner optimizer."""

    def __init__(self, manager: Manager, optimizer: Optimizer, outer: ScriptedLoop) -> None:
        self._manager = manager
        self._optimizer = optimizer
        self._outer = outer
        self._local_step = 0
        """Inner steps since the last sync."""
        self._hooks: list[RemovableHandle] = []
        self._keys: list[str] = []

    def __enter__(self) -> Self:
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
        self._outer.begin()
        # The step changes tensors that a peer may be reading.
        self._manager.disallow_state_dict_read()

    def _after_step(self, *_: Any) -> None:
        self._manager.allow_state_dict_read()
        self._local_step += 1
        if self._local_step == self._outer.launch_step:
            self._launch()
        if self._local_step >= self._outer.spacing:
            self._land()
            self._local_step = 0

    def _launch(self) -> None:
        self._outer.stand_at_commits()
        self._manager.start_quorum()
        self._outer.launch()

    def _land(self) -> None:
        self._outer.land()

    def _register(self, key: str, load: Callable[[Any], None], save: Callable[[], dict[str, Any]]) -> None:
        self._keys.append(key)
        self._manager.register_state_dict_fn(key, load, save)


class LocalSGD(_OnOptimizerHooks):
    """torchft's ``LocalSGD``: parameters averaged every ``sync_every`` steps; a failed round is skipped.

    Args:
        manager: a manager with a synchronous quorum, or a mock.
        model: the model.
        optimizer: its optimizer, on whose steps this hangs.
        sync_every: steps between two averages.

    Raises:
        ValueError: the manager's quorum is asynchronous, or ``sync_every`` is below 1.
    """

    def __init__(self, manager: Manager, model: nn.Module, optimizer: Optimizer, sync_every: int) -> None:
        _check_period(sync_every)
        config = SemiSyncConfig(method="local_sgd", sync_every=sync_every, outlier_threshold=0.0)
        site = manager_of_script(manager, mock_arguments={})
        super().__init__(manager, optimizer, ScriptedLoop(config, model, optimizer, site, keep_local_work=True))
        self._register(_REST, self._load, self._save)

    def sync(self) -> None:
        """Average the parameters now."""
        self._outer.begin()
        self._launch()
        self._local_step = 0

    def _save(self) -> dict[str, Any]:
        states = self._outer.states(parameters=False) | self._outer.states(parameters=True)
        return {**self._outer.facts(), "states": states}

    def _load(self, state: dict[str, Any]) -> None:
        self._outer.take_facts(state)
        self._outer.take_states(state["states"], registered=self._keys)


class DiLoCo(_OnOptimizerHooks):
    """torchft's ``DiLoCo`` and Streaming DiLoCo; after a failed round the global parameters come back.

    Args:
        manager: a manager with a synchronous quorum, or a mock.
        model_fragments: the parts of the model, synced in turn.
        inner_optimizer: on whose steps this hangs.
        outer_optimizer: one for all fragments, or one for each, over the fragments' parameters. From now on it works
            on the global copy of these.
        sync_every: inner steps between two syncs of the same fragment.
        backup_device: where the global copy lives: where the parameters do, or in host memory, for which None stands.
        pin_memory: accepted for torchft's sake.
        use_bucketization: accepted for torchft's sake; values always travel in buckets.
        bucket_cap_mb: largest bucket in MiB; None is 32.
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
        _check_period(sync_every)
        require(len(model_fragments) > 0, "model_fragments", model_fragments, "at least one module")
        several = outer_optimizer if isinstance(outer_optimizer, list) else [outer_optimizer] * len(model_fragments)
        if len(several) != len(model_fragments):
            raise ValueError(f"outer_optimizer: {len(several)} optimizers for {len(model_fragments)} model fragments")
        self._optimizers = several
        self._stepped = [_parameters_of(each) for each in several]
        """For each fragment the model's parameters of its outer optimizer."""
        _check_homes(model_fragments, self._stepped, one_for_all=not isinstance(outer_optimizer, list))
        site = manager_of_script(
            manager, mock_arguments={"should_quantize": should_quantize}, mock_buckets=use_bucketization
        )
        config = SemiSyncConfig(
            method="diloco",
            sync_every=sync_every,
            fragments=[[str(index)] for index in range(len(model_fragments))],
            fragment_sync_delay=fragment_sync_delay,
            fragment_update_alpha=fragment_update_alpha,
            outlier_threshold=0.0,
            # A mock is told to quantize.
            codec="int8" if should_quantize and site.process_group is not None else "fp32",
            bucket_mib=_MIB if bucket_cap_mb is None else bucket_cap_mb,
            outer_state_device=_outer_state_device(backup_device, model_fragments),
        )
        whole = nn.ModuleList(model_fragments)
        outer = ScriptedLoop(
            config, whole, inner_optimizer, site, outer_optimizers=self._optimizers, keep_local_work=False
        )
        super().__init__(manager, inner_optimizer, outer)
        self._register(_REST, self._load_rest, self._save_rest)
        for index in range(len(model_fragments)):
            self._register_fragment(index)

    def _land(self) -> None:
        fragment = self._outer.fragment
        super()._land()
        # As torchft, whose pseudo-gradients lie there.
        for parameter in self._stepped[fragment]:
            parameter.grad = None

    def _save_rest(self) -> dict[str, Any]:
        return {**self._outer.facts(), "states": self._outer.states(parameters=False)}

    def _load_rest(self, state: dict[str, Any]) -> None:
        self._outer.take_facts(state)
        self._outer.take_states(state["states"], registered=self._keys)

    def _register_fragment(self, index: int) -> None:
        rule, prefix = f"params/{index}", f"{index}."

        def save() -> dict[str, Any]:
            shared = self._outer.states(parameters=True)[rule]
            originals = {name.removeprefix(prefix): values["global"] for name, values in shared.items()}
            return {"outer_optimizer": self._optimizers[index].state_dict(), "original_parameters": originals}

        def load(state: dict[str, Any]) -> None:
            self._optimizers[index].load_state_dict(state["outer_optimizer"])
            own = self._outer.states(parameters=True)[rule]
            originals = {prefix + name: value for name, value in state["original_parameters"].items()}
            arrived = {name: {**own[name], "global": value} for name, value in originals.items() if name in own}
            self._outer.take_states({rule: arrived}, registered=self._keys)

        self._register(f"StreamingDiLoCoFragment_{index}", load, save)


def _check_period(sync_every: int) -> None:
    require(isinstance(sync_every, int) and sync_every >= 1, "sync_every", sync_every, "a number from 1")


def _check_homes(
    fragments: Sequence[nn.Module], stepped: Sequence[Sequence[torch.Tensor]], *, one_for_all: bool
) -> None:
    """Refuse what an outer optimizer would not find among the global parameters: it would step the local ones instead.

    Args:
        fragments: of the model.
        stepped: for each fragment the parameters of its outer optimizer.
        one_for_all: whether that is one and the same.

    Raises:
        ValueError: a parameter is in two fragments, or an outer optimizer has others than its fragment.
    """
    home: dict[int, int] = {}
    for index, fragment in enumerate(fragments):
        for name, parameter in fragment.named_parameters():
            first = home.setdefault(id(parameter), index)
            if first != index:
                raise ValueError(f"model_fragments[{index}]: {name} is in model_fragments[{first}] already")
    for index, parameters in enumerate(stepped):
        allowed = home.keys() if one_for_all else {key for key, place in home.items() if place == index}
        if not {id(each) for each in parameters} <= allowed:
            place = "outer_optimizer" if one_for_all else f"outer_optimizer[{index}]"
            raise ValueError(f"{place}: has a parameter that is in no model fragment of its own")


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _outer_state_device(wanted: torch.device | None, fragments: Iterable[nn.Module]) -> Literal["same", "cpu"]:
    device = torch.device(wanted or "cpu")
    if device.type == "cpu":
        return "cpu"
    places = {parameter.device for fragment in fragments for parameter in fragment.parameters()}
    same = all(place.type == device.type and device.index in (None, place.index) for place in places)
    require(
        same, "backup_device", str(device), f"where the parameters are ({', '.join(map(str, places))}), or the host"
    )
    return "same"
