"""A switch of the inner optimizer's settings at one step, as MT-DAO's author makes it after warm-up.

Not confirmed in the paper (arXiv 2510.05361) but in its author's runs: plain momentum while the learning
rate warms up, then slow momenta from zero, and another learning rate.

A second moment that begins anew needs a step count that does: with the old one it would pass for the whole mean of
the squares, and the next steps would be too large by up to ``1 / sqrt(1 - beta)``. Momenta share that count, so they
begin anew with it. Momenta alone keep the count, as in the author's runs: they grow from zero without correction.
What is kept under another decay is scaled so that its bias-corrected value stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.optim.moments import Moment, moments, moments_by_parameter, named, set_steps, steps_of

_OTHER_STATES = ("error",)
"""States that are no moments and may begin anew at any time."""


@dataclass(kw_only=True, slots=True)
class SwitchConfig:
    """When and to what the inner optimizer's settings change; all sites share it."""

    step: int = 0
    """Inner steps before the switch; 0 is never."""

    betas: list[float] | None = None
    """New decay rates, as many as before."""

    omegas: list[float] | None = None
    """New weights of the momenta (quasi-hyperbolic optimizers), as many as before."""

    reset_states: list[str] = field(default_factory=list)
    """States set to zero, such as "exp_avg_0"; with a second moment all of a parameter's, and its step count with them."""

    lr_scale: float = 1.0
    """Factor on the learning rate from then on."""

    def validate(self) -> None:
        """Raises ValueError naming the key, its value and what is allowed."""
        if self.step < 0:
            raise ValueError(f"step = {self.step}: must be at least 0")
        if not self.lr_scale > 0:
            raise ValueError(f"lr_scale = {self.lr_scale}: must be above 0")
        for key in ("betas", "omegas", "reset_states"):
            if getattr(self, key) and self.step == 0:
                raise ValueError(f"step = 0: must be above 0 where {key} is given")
        for key in ("betas", "omegas"):
            given: Sequence[float] = getattr(self, key) or []
            if not all(0 <= each < 1 or (key == "omegas" and each == 1) for each in given):
                raise ValueError(f"{key} = {given}: must be numbers from 0 to below 1")
        if sum(self.omegas or []) > 1 + 1e-9:
            raise ValueError(f"omegas = {self.omegas}: must sum to at most 1")

    def validate_lengths(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Refuse lists of another length than the optimizer's.

        Args:
            groups: hyper-parameters of the optimizer's groups.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        groups = list(groups)
        for key in ("betas", "omegas"):
            given: Sequence[float] | None = getattr(self, key)
            lengths = {len(group[key]) for group in groups if key in group}
            if given is not None and not lengths:
                raise ValueError(f"{key} = {given}: must be left out: the optimizer has no {key}")
            if given is not None and lengths != {len(given)}:
                raise ValueError(f"{key} = {given}: must be {' or '.join(map(str, sorted(lengths)))} number(s)")

    def changes_nothing(self) -> bool:
        """Whether there is a step and nothing that changes at it."""
        return self.step > 0 and self.lr_scale == 1 and not (self.betas or self.omegas or self.reset_states)


class Switch:
    """Makes the switch when its step comes, also in a run that resumes or joins behind it.

    Args:
        config: what changes, and when.
        optimizers: the inner optimizers.
        schedulers: their learning rate schedules (``LambdaLR``), one each; none leaves rates to the caller.

    Raises:
        ValueError: a setting is out of range, an optimizer has not as many decay rates or weights, or no
            optimizer keeps a state.
    """

    def __init__(self, config: SwitchConfig, optimizers: Iterable[Optimizer], schedulers: Iterable[Any] = ()) -> None:
        config.validate()
        self._config = config
        self._optimizers = list(optimizers)
        self._schedulers = list(schedulers)
        self._made = config.step == 0
        if not self._made:
            self._check()

    @torch.no_grad()
    def before_step(self, taken: int) -> None:
        """Call before each inner step.

        Args:
            taken: inner steps so far.
        """
        if self._made or taken < self._config.step:
            return
        self._made = True
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                before = [moments(optimizer, group, name, each.shape) for name, each in named(group)]
                for key in ("betas", "omegas"):
                    if getattr(self._config, key) is not None and key in group:
                        group[key] = tuple(getattr(self._config, key))
                if taken == self._config.step:  # later, states are those of a run that has switched
                    for (name, parameter), old in zip(named(group), before, strict=True):
                        new = moments(optimizer, group, name, parameter.shape)
                        self._take_over(optimizer.state.get(parameter, {}), old, new)
        for scheduler in self._schedulers:
            scheduler.base_lrs = [rate * self._config.lr_scale for rate in scheduler.base_lrs]
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
            for base, factor, group in rates:
                _set_rate(group, base * factor(scheduler.last_epoch))
            # What is logged as the rate of the step that comes now.
            scheduler._last_lr = [float(group["lr"]) for group in scheduler.optimizer.param_groups]

    def _take_over(self, state: dict[str, Any], old: Mapping[str, Moment], new: Mapping[str, Moment]) -> None:
        steps = steps_of(state)
        for key, value in state.items():
            if key in self._config.reset_states:
                value.zero_()
            elif key in new and old[key].decay != new[key].decay and steps:
                value.mul_(new[key].mass(steps) / old[key].mass(steps))
        if steps is not None and _begin_anew(self._config.reset_states, new):
            set_steps(state, 0)

    def _check(self) -> None:
        kept = (each for optimizer in self._optimizers for _, each in moments_by_parameter(optimizer))
        check_reset(self._config.reset_states, kept)
        self._config.validate_lengths(group for optimizer in self._optimizers for group in optimizer.param_groups)


def check_reset(given: Sequence[str], kept: Iterable[Mapping[str, Moment]]) -> None:
    """Refuse states that nobody keeps, and a second moment that would share its step count with older momenta.

    Args:
        given: names of states to be set to zero.
        kept: for each parameter its moments.

    Raises:
        ValueError: naming what is allowed.
    """
    kept = list(kept)
    states = sorted({key for each in kept for key in each})
    unknown = [key for key in given if key not in [*states, *_OTHER_STATES]]
    if unknown and states:
        raise ValueError(f"reset_states = {given}: {unknown[0]!r} must be one of {', '.join(states)}")
    for each in kept:
        missing = [repr(key) for key in sorted(each) if key not in given]
        if _begin_anew(given, each) and missing:
            raise ValueError(
                f"reset_states = {given}: must name {' and '.join(missing)} too, for a second moment that begins anew "
                "takes the step count with it"
            )


def _begin_anew(given: Sequence[str], kept: Mapping[str, Moment]) -> bool:
    return any(moment.order == 2 and key in given for key, moment in kept.items())


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
