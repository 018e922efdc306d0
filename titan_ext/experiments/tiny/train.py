"""Runs of one shape trained together: a warm-up that the runs of a seed share, then each arm's momenta and outer loop."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from titan_ext.experiments.tiny.arms import FAST, MEASUREMENTS, Arm, Result, Settings
from titan_ext.experiments.tiny.model import TinyModel
from titan_ext.experiments.tiny.stack import RowSettings, Stack, StackedRun
from titan_ext.experiments.tiny.text import VOCABULARY, Windows, validation_windows
from titan_ext.experiments.tuning import Run
from titan_ext.optim import DeMo, LowRankAdamW, Muon, QHAdamW
from titan_ext.optim.switch import Switch, SwitchConfig
from titan_ext.semi_sync import SemiSyncConfig

_VALIDATION_WINDOWS = 8192
_STEPS_OF_TEXT = 64  # drawn together


def check_text(settings: Settings) -> None:
    """Raises UserError if the corpus cannot be read, or has too little text."""
    _validation(settings)
    _text(settings, seed=0, part=0)


def train(settings: Settings, arms: Mapping[str, Arm], runs: Sequence[Run]) -> list[Result]:
    """Train runs together; all are data parallel or none is, and all begin from scratch or none does.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    started = time.perf_counter()
    cohort = _Cohort(settings, [(run, arms[run.method]) for run in runs])
    if cohort.from_scratch:
        cohort.advance(part=0, steps=settings.warmup)
    cohort.advance(part=1, steps=settings.steps)
    cohort.close()
    seconds = (time.perf_counter() - started) / len(runs)
    return [cohort.result(place, seconds) for place in range(len(runs))]


class _Cohort:
    """Runs that are trained together."""

    def __init__(self, settings: Settings, runs: Sequence[tuple[Run, Arm]]) -> None:
        self._settings = settings
        self._runs = runs
        arm = runs[0][1]
        self.from_scratch = arm.from_scratch
        self._sites = 1 if arm.sync_every is None else settings.sites
        begun = [_begin(settings, run.seed, scratch=self.from_scratch) for run, _ in runs]
        flat = torch.stack([each for each, _ in begun]).repeat_interleave(self._sites, 0)
        self._stack = Stack(_model(settings), flat)
        self._stacked = [
            _placed(settings, self._stack, arm, place * self._sites, self._sites, state)
            for place, ((_, arm), (_, state)) in enumerate(zip(runs, begun, strict=True))
        ]
        self._hashes = {run.seed: hashlib.sha256() for run, _ in runs}
        self._steps: list[int] = []
        self._losses: list[list[float]] = []
        self._fine = torch.ones(len(flat), dtype=torch.bool, device=flat.device)

    def advance(self, part: int, steps: int) -> None:
        """Train on part 0 of the text, before the constant learning rate, or on part 1, and measure there."""
        settings = self._settings
        texts = {seed: _windows(settings, seed, part, steps) for seed in self._hashes}
        for step in range(steps):
            windows = {seed: next(text) for seed, text in texts.items()}
            for seed, each in windows.items() if part else ():
                self._hashes[seed].update(each.to(torch.uint8).numpy().data)
            factor = _factor(step, steps, settings.decay) if part else (step + 1) / steps
            for (run, _), stacked in zip(self._runs, self._stacked, strict=True):
                _set_rate(stacked, run.lr * factor)
            batch = torch.cat([_for_sites(windows[run.seed], self._sites) for run, _ in self._runs])
            self._fine &= self._stack.backward(batch.to(settings.device)).isfinite()
            for stacked in self._stacked:
                stacked.step()
            if part and (step + 1) % (steps // MEASUREMENTS) == 0:
                self._measure(step + 1)

    def close(self) -> None:
        """End the outer loops."""
        for stacked in self._stacked:
            stacked.close()

    def result(self, place: int, seconds: float) -> Result:
        """Of one run."""
        return Result(
            steps=self._steps,
            losses=[each[place] if math.isfinite(each[place]) else None for each in self._losses],
            bytes_sent=self._stacked[place].bytes_sent(),
            parameters=self._stack.model.parameters,
            tokens_sha256=self._hashes[self._runs[place][0].seed].hexdigest(),
            seconds=seconds,
        )

    def _measure(self, step: int) -> None:
        runs = [stacked.rows for stacked in self._stacked]
        found = self._stack.validate(runs, _validation(self._settings).to(self._settings.device))
        fine = self._fine.view(len(runs), -1).all(1).tolist()
        self._steps.append(step)
        self._losses.append([loss if each else math.nan for loss, each in zip(found, fine, strict=True)])


def _begin(settings: Settings, seed: int, *, scratch: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    if scratch:
        return _model(settings).initial(seed).to(settings.device), None
    return _warmed_up(settings, seed)


def _warmed_up(settings: Settings, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # What comes after the warm-up does not matter to it.
    return _warm(replace(settings, steps=0, decay=0.0), seed)


@lru_cache(maxsize=16)
def _warm(settings: Settings, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Parameters and optimizer state after the warm-up: Adam on the mean gradient of all sites."""
    stack = Stack(_model(settings), _model(settings).initial(seed).to(settings.device).unsqueeze(0))
    run = StackedRun(stack, 0, 1, _optimizer(settings, (FAST,), (1.0,)))
    rises = settings.warmup // 2
    for step, windows in enumerate(_windows(settings, seed, 0, settings.warmup)):
        _set_rate(run, settings.warmup_lr * min(1.0, (step + 1) / rises))
        stack.backward(_for_sites(windows, 1).to(settings.device))
        run.step()
    return stack.flat[0].clone(), run.state()


def _placed(
    settings: Settings, stack: Stack, arm: Arm, first: int, sites: int, state: Mapping[str, torch.Tensor] | None
) -> StackedRun:
    """A run in its rows, with its optimizer and the outer loop between its sites."""
    run = _optimized(settings, stack, arm, range(first, first + sites), state)
    if arm.sync_every is not None:
        outer = dict(arm.outer)
        if arm.low_rank is not None:
            outer["settings"] = {"lordo": {"first_basis": arm.low_rank.first_basis}}
        run.synchronise(SemiSyncConfig(method=arm.method, sync_every=arm.sync_every, **outer))
    return run


def _optimized(
    settings: Settings, stack: Stack, arm: Arm, rows: range, state: Mapping[str, torch.Tensor] | None
) -> StackedRun:
    place = stack, rows[0], len(rows)
    if arm.low_rank is not None:
        return StackedRun(*place, _low_rank(settings, arm))
    if arm.inner:
        return StackedRun(*place, _INNER[arm.inner](settings))
    if arm.method != "mt_dao":
        return StackedRun(*place, _adam(settings), _as_adam(state))
    if not arm.switches:
        return StackedRun(*place, _optimizer(settings, arm.betas, arm.omegas), state)
    # As the warm-up was: all weight on the fast momentum.
    betas, omegas = (FAST, *arm.betas[1:]), (1.0, *(0.0 for _ in arm.omegas[1:]))
    run = StackedRun(*place, _optimizer(settings, betas, omegas), state)
    switch = SwitchConfig(
        step=settings.warmup,
        betas=[*arm.betas, settings.beta2],
        omegas=list(arm.omegas),
        reset_states=[f"exp_avg_{place}" for place in range(len(arm.betas))],
    )
    Switch(switch, run.optimizers).before_step(settings.warmup)
    return run


def _optimizer(settings: Settings, betas: Sequence[float], omegas: Sequence[float]) -> RowSettings:
    make = partial(QHAdamW, betas=(*betas, settings.beta2), omegas=tuple(omegas))
    return RowSettings(make, elementwise=True)


def _adam(settings: Settings) -> RowSettings:
    make = partial(torch.optim.AdamW, betas=(FAST, settings.beta2), weight_decay=0.0, fused=True)
    return RowSettings(make, elementwise=True)


def _as_adam(state: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor] | None:
    """The state of QHAdamW with one momentum under the keys of torch's AdamW."""
    return None if state is None else {key.removesuffix("_0"): value for key, value in state.items()}


def _low_rank(settings: Settings, arm: Arm) -> RowSettings:
    """With the bases of the outer loop, or of each gradient where there is none."""
    own = arm.low_rank
    assert own is not None
    make = partial(
        LowRankAdamW,
        rank=own.rank,
        betas=(own.beta, settings.beta2),
        omega=own.omega,
        error_feedback=own.error_feedback,
        adamw_betas=(FAST, settings.beta2),
        basis_from="gradient" if arm.sync_every is None else None,
        refresh_every=1,
    )
    return RowSettings(make, elementwise=False)


def _muon(settings: Settings) -> RowSettings:
    return RowSettings(partial(Muon, betas=(FAST, settings.beta2), weight_decay=0.0), elementwise=False)


def _demo(settings: Settings) -> RowSettings:
    return RowSettings(DeMo, elementwise=False)


_INNER = {"Muon": _muon, "DeMo": _demo}


def _set_rate(run: StackedRun, rate: float) -> None:
    for group in run.groups:
        group["lr"] = rate


def _factor(step: int, steps: int, share: float) -> float:
    """Factor on the learning rate of a step, the first being 0, whose last ``share`` falls to 0."""
    decay = max(1, round(share * steps))
    return 1 - math.sqrt(max(0, step - (steps - decay)) / decay)


def _model(settings: Settings) -> TinyModel:
    return TinyModel(VOCABULARY, settings.dim)


def _text(settings: Settings, seed: int, part: int) -> Windows:
    return Windows(settings.corpus, settings.sites, settings.batch, _model(settings).context + 1, 2 * seed + part)


def _windows(settings: Settings, seed: int, part: int, steps: int) -> Iterator[torch.Tensor]:
    """For each step the windows of all sites, ``[sites, batch, context + 1]``."""
    text = _text(settings, seed, part)
    for start in range(0, steps, _STEPS_OF_TEXT):
        yield from text.take(min(_STEPS_OF_TEXT, steps - start))


def _for_sites(windows: torch.Tensor, sites: int) -> torch.Tensor:
    return windows if sites > 1 else windows.flatten(0, 1).unsqueeze(0)


def _validation(settings: Settings) -> torch.Tensor:
    return validation_windows(settings.corpus, _VALIDATION_WINDOWS, _model(settings).context + 1)
