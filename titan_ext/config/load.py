"""Loading a configuration: a file and flags to sites that can be built."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.utils import device_type

from titan_ext.config import checks
from titan_ext.config.build import build_config, dump_root, keys_by_name, section_names
from titan_ext.config.headers import KnownNames, SitePlan, plan_sites, select
from titan_ext.config.layout import Layout, check_layout, resolve_layout
from titan_ext.config.model import ModelChoice
from titan_ext.config.pairing import resolve_pairing
from titan_ext.config.settings import Origin, Settings, show
from titan_ext.semi_sync.plan.resolve import fill_defaults, shares_sparse_rows
from titan_ext.trainer.cpu import adapt
from titan_ext.trainer.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Site:
    """One site of a run, ready to be started."""

    name: str
    index: int
    """Place among the sites, from 0."""
    count: int
    """Sites of the run."""
    weight: float
    """Weight in a round's mean under ``semi_sync.weighting = "site"``."""
    nproc: int
    """Ranks to start."""
    config: Trainer.Config
    """Everything the trainer needs; its ``dump_folder`` is the site's own."""
    model: ModelChoice
    layout: Layout
    tokenizer: str
    """``byte``, or the path that the user gave."""
    vocabulary: str
    """File of the part of the tokenizer's vocabulary that the site holds; empty for all of it."""
    dump_root: str
    """The run's ``dump_folder``, which holds a folder for each site."""
    settings: Settings
    """What the user set, with where each value came from."""
    derived: dict[str, Origin]
    """Layer of the values that neither the user nor torchtitan chose, by dotted key."""
    notes: list[str] = field(default_factory=list)
    """What a user should know though it is no mistake."""
    weights: Path | None = None
    """Folder of the model's weights, where that is in Hugging Face's format and on this machine."""
    lacks: list[str] = field(default_factory=list)
    """What training needs and this machine has not."""


@dataclass(frozen=True, slots=True)
class Run:
    """All sites of a file."""

    path: str
    sites: list[Site]

    @property
    def dump_folder(self) -> str:
        """Folder that holds one folder for each site."""
        return self.sites[0].dump_root

    def site(self, name: str) -> Site:
        """The site of that name."""
        return next(each for each in self.sites if each.name == name)


def load_run(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Run:
    """Load every site of a file and check them against each other.

    Args:
        path: a TOML file, or the ``config.json`` that a run left.
        overrides: flags such as ``["--training.steps", "20"]``; they apply to every site.
        elsewhere: it is not to be trained here; what this machine lacks is in the sites' ``lacks``, and no error.

    Raises:
        UserError: one line with file, key, value and what is allowed.
    """
    with _quiet():
        plans = plan_sites(str(path), overrides, KnownNames(section_names(), keys_by_name()))
        sites = [_build(plan, plans, sharing=len(plans), elsewhere=elsewhere) for plan in plans]
        checks.check_sites(str(path), sites)
    return Run(str(path), sites)


def load_site(
    path: str | Path,
    name: str | None = None,
    overrides: Sequence[str] = (),
    *,
    weights: Path | None = None,
    elsewhere: bool = False,
) -> Site:
    """Load one site of a file without building the others, whose tokenizers may be elsewhere.

    Args:
        path: a TOML file, or the ``config.json`` that a run left.
        name: which site; not needed where the file has one.
        overrides: flags; they count for the other sites too when a corpus is shared out.
        weights: a folder in Hugging Face's format that the model is of, in place of the one that training starts from.
        elsewhere: as in ``load_run``.

    Raises:
        UserError: one line with file, key, value and what is allowed.
    """
    with _quiet():
        plans = plan_sites(str(path), overrides, KnownNames(section_names(), keys_by_name()))
        return _build(select(str(path), plans, name), plans, sharing=1, weights=weights, elsewhere=elsewhere)


def _build(
    plan: SitePlan, plans: Sequence[SitePlan], *, sharing: int, weights: Path | None = None, elsewhere: bool = False
) -> Site:
    settings, header = plan.settings, plan.header
    built = build_config(settings, plan.site, header, weights)
    if built.lacks and not elsewhere:
        raise settings.error("", built.lacks[0])
    config = built.config
    checks.check_numbers(settings, config)
    layout = resolve_layout(settings, config, header.nproc, _devices() // sharing)
    check_layout(settings, config, layout, device_type)
    checks.check_max_length(settings, config)
    checks.check_export(settings, config)
    notes = built.notes + checks.check_vocabulary(settings, config, built.model, built.tokenizer)
    notes += built.tokenizer.notes
    notes += checks.check_outer_loop(settings, config)
    derived = built.derived | _fill_method(config) | _pair(config, plans) | _adapt(config)
    checks.check_pairing(settings, config)
    checks.check_rows(settings, config, layout)
    if config.semi_sync.method != "none" and config.semi_sync.pairing == "leader":
        notes.append("rank 0 of each site exchanges for all its ranks (semi_sync.pairing): layouts may differ")
    notes += [
        f"{key} = {show(settings.get(key))} cannot be had on this machine"
        for key, origin in derived.items()
        if origin is Origin.PLATFORM and settings.get(key) is not None
    ]
    return Site(
        name=plan.site.name,
        index=plan.site.index,
        count=plan.site.count,
        weight=plan.site.weight,
        nproc=layout.ranks,
        config=config,
        model=built.model,
        layout=layout,
        tokenizer=header.tokenizer,
        vocabulary=built.vocabulary,
        dump_root=dump_root(settings),
        settings=settings,
        derived=derived,
        notes=notes,
        weights=built.source.folder if built.source is not None and built.source.recorded is None else None,
        lacks=built.lacks,
    )


def _fill_method(config: Trainer.Config) -> dict[str, Origin]:
    """Write the method's own defaults into the config, so that the resolved one says everything."""
    given, config.semi_sync = config.semi_sync, fill_defaults(config.semi_sync)
    return {
        f"semi_sync.{each.name}": Origin.METHOD
        for each in fields(given)
        if getattr(given, each.name) != getattr(config.semi_sync, each.name)
    }


def _pair(config: Trainer.Config, plans: Sequence[SitePlan]) -> dict[str, Origin]:
    """Settle who exchanges with whom, before any site has met another."""
    asked = config.semi_sync.pairing
    config.semi_sync.pairing = resolve_pairing(asked, plans, type(config.parallelism)(), shares_sparse_rows(config.semi_sync))
    return {"semi_sync.pairing": Origin.LAYOUT} if asked == "auto" else {}


def _adapt(config: Trainer.Config) -> dict[str, Origin]:
    """Let the platform settle what this machine cannot do otherwise."""
    before = {each.name: getattr(config.training, each.name) for each in fields(config.training)}
    adapt(config)
    changed = [key for key, value in before.items() if getattr(config.training, key) != value]
    return {f"training.{key}": Origin.PLATFORM for key in changed}


def _devices() -> int:
    return torch.cuda.device_count() if device_type == "cuda" else 0


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Mute torchtitan's warnings about dataclasses that only carry its defaults for a moment."""
    root = logging.getLogger()
    hush = _BelowError()
    handlers = [*root.handlers] or [logging.lastResort]
    for handler in handlers:
        handler.addFilter(hush)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hush)


class _BelowError(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
