"""Loading a configuration: a file and flags to sites that can be built."""

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torchtitan.tools.utils import device_type

from titan_ext.config.binder import Binder
from titan_ext.config.build import Built, build_config, dump_root, keys_by_name, section_names
from titan_ext.config.checks import outer_loop, values
from titan_ext.config.checks.machine import check_machine
from titan_ext.config.checks.run import model_checks, run_checks
from titan_ext.config.checks.sites import check_sites
from titan_ext.config.checks.unread import notes_on_unread
from titan_ext.config.dept import find_vocabulary
from titan_ext.config.findings import TO_BUILD, TO_TRAIN, Findings, Missing, Need
from titan_ext.config.headers import KnownNames, SitePlan, plan_sites, select
from titan_ext.config.layout import Layout, check_batch, check_layout, resolve_layout
from titan_ext.config.losses import notes_on_loss
from titan_ext.config.model import ModelChoice
from titan_ext.config.nodes import Nodes, notes_on, spread
from titan_ext.config.pairing import resolve_pairing
from titan_ext.config.settings import Origin, Settings, one_line, show
from titan_ext.semi_sync.plan.components import shares_sparse_rows
from titan_ext.semi_sync.plan.resolve import fill_defaults
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
    nodes: Nodes
    """Where the ranks are."""
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
    data: list[str] = field(default_factory=list)
    """What of each corpus is read, in a line; without those that are not on this machine."""
    weights: Path | None = None
    """Folder of the model's weights, where that is in Hugging Face's format and on this machine."""
    missing: list[Missing] = field(default_factory=list)
    """What the site needs and this machine lacks."""


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


def load_run(path: str | Path, overrides: Sequence[str] = (), needs: Collection[Need] = TO_BUILD) -> Run:
    """Load every site of a file and check them against each other; reads no corpus and writes nothing.

    Args:
        path: a TOML file, or the ``config.json`` that a run left.
        overrides: flags such as ``["--training.steps", "20"]``; they apply to every site.
        needs: what must be on this machine. What else is missing stands in the sites' ``missing``.

    Raises:
        UserError: all mistakes of the file, and what is missing, each with file, key, value and what is allowed.
    """
    with quiet():
        findings = Findings()
        plans = plan_sites(str(path), overrides, KnownNames(section_names(), keys_by_name()), findings)
        sites = [_build(plan, plans, sharing=len(plans)) for plan in plans]
        findings.take([plan.settings.findings for plan in plans])
        if not findings.mistakes:
            with findings.catch():
                check_sites(str(path), sites)
    findings.enforce(str(path), needs)
    return Run(str(path), sites)


def load_site(
    path: str | Path,
    name: str | None = None,
    overrides: Sequence[str] = (),
    needs: Collection[Need] = TO_BUILD,
    *,
    weights: Path | None = None,
) -> Site:
    """Load one site of a file without building the others, whose tokenizers may be elsewhere.

    Args:
        path: a TOML file, or the ``config.json`` that a run left.
        name: which site; not needed where the file has one.
        overrides: flags; they count for the other sites too when a corpus is shared out.
        needs: as in ``load_run``.
        weights: a folder in Hugging Face's format that the model is of, in place of the one that training starts from.

    Raises:
        UserError: as ``load_run``.
    """
    with quiet():
        findings = Findings()
        plans = plan_sites(str(path), overrides, KnownNames(section_names(), keys_by_name()), findings)
        site = _build(select(str(path), plans, name), plans, sharing=1, weights=weights)
        findings.take([plan.settings.findings for plan in plans])
    findings.enforce(str(path), needs)
    return site


def load_to_start(path: str | Path, names: Sequence[str | None] | None, overrides: Sequence[str]) -> list[Site]:
    """The sites that start on this machine, which must have all that they need.

    A site whose vocabulary is to be found in its text, and has not been, reads it here.

    Args:
        path: as in ``load_run``.
        names: which sites, without the others; a None among them is the only site of the file. None: all.
        overrides: as in ``load_run``.

    Raises:
        UserError: as ``load_run``; a vocabulary cannot be found.
    """

    def load() -> list[Site]:
        if names is None:
            return load_run(path, overrides, needs=()).sites
        return [load_site(path, name, overrides, needs=()) for name in names]

    sites = load()
    _require(path, sites, TO_TRAIN - {Need.VOCABULARY})
    found = [find_vocabulary(site) for site in sites]
    if any(found):
        sites = load()
    _require(path, sites, TO_TRAIN)
    return sites


def _require(path: str | Path, sites: Sequence[Site], needs: Collection[Need]) -> None:
    findings = Findings()
    findings.take([site.settings.findings for site in sites])
    findings.enforce(str(path), needs)


def _build(plan: SitePlan, plans: Sequence[SitePlan], *, sharing: int, weights: Path | None = None) -> Site:
    """The site; what is wrong with it, or missing, stands in its settings' findings."""
    settings, header = plan.settings, plan.header
    findings = settings.findings
    built = build_config(settings, plan.site, header, weights)
    config = built.config
    with findings.check():
        values.check_numbers(settings, config)
    with findings.check():
        values.check_sections(settings, config)
    notes, derived = list(built.notes), dict(built.derived)
    with findings.check():
        derived |= _fill_method(settings, config)
    layout, nodes = Layout.alone(), Nodes()
    with findings.check():
        layout = resolve_layout(settings, config, header.nproc, _devices() // sharing * header.nodes)
        nodes = spread(settings, header, layout, config.parallelism.pipeline_parallel_schedule)
    notes += notes_on(nodes, layout) + outer_loop.notes_on_quorum(config, plan.site.count)
    for check in (lambda: check_batch(settings, config, layout), *run_checks(settings, config, layout)):
        with findings.check():
            check()
    if config.model_spec is not None:
        more_notes, more = _check_whole(plan, plans, built, layout)
        notes, derived = notes + more_notes, derived | more
    notes += [
        f"{key} = {show(settings.get(key))} cannot be had on this machine"
        for key, origin in derived.items()
        if origin is Origin.PLATFORM and settings.get(key) is not None
    ]
    with findings.check():
        notes += notes_on_loss(config)
    notes += plan.notes + notes_on_unread(settings, config)
    data = check_machine(settings, config, layout)
    notes += [str(each) for each in findings.lacking([Need.VOCABULARY])]
    return Site(
        name=plan.site.name,
        index=plan.site.index,
        count=plan.site.count,
        weight=plan.site.weight,
        nproc=layout.ranks,
        config=config,
        model=built.model,
        layout=layout,
        nodes=nodes,
        tokenizer=header.tokenizer,
        vocabulary=built.vocabulary,
        dump_root=dump_root(settings),
        settings=settings,
        derived=derived,
        notes=notes,
        data=data,
        weights=built.source.folder if built.source is not None and built.source.recorded is None else None,
        missing=list(findings.missing.values()),
    )


def _check_whole(
    plan: SitePlan, plans: Sequence[SitePlan], built: Built, layout: Layout
) -> tuple[list[str], dict[str, Origin]]:
    """Checks that need the model, and the values that follow; notes, and the layer of those values."""
    settings, config, findings = plan.settings, built.config, plan.settings.findings
    notes: list[str] = []
    for check in (
        lambda: check_layout(settings, config, layout),
        lambda: values.check_max_length(settings, config),
        lambda: values.check_experts(settings, config, layout),
        lambda: values.check_export(settings, config),
        *model_checks(settings, config),
    ):
        with findings.check():
            check()
    if built.tokenizer is not None:
        with findings.check():
            notes += values.check_vocabulary(settings, config, built.model, built.tokenizer)
        notes += built.tokenizer.notes
    derived: dict[str, Origin] = {}
    with findings.check():
        notes += outer_loop.check_outer_loop(settings, config, plan.site.count)
        notes += outer_loop.notes_on_rounds(config, layout)
        notes += values.check_rounding(config) + values.check_switch(config)
        notes += values.check_warmup(config) + values.check_mix_changes(config) + values.check_lengths(config)
        derived |= _pair(config, plans)
        outer_loop.check_pairing(settings, config)
        outer_loop.check_rows(settings, config, layout)
        if config.semi_sync.method != "none" and config.semi_sync.pairing == "leader":
            notes.append("rank 0 of each site exchanges for all its ranks (semi_sync.pairing): layouts may differ")
    with findings.check():
        derived |= _adapt(settings, config)
    return notes, derived


def _fill_method(settings: Settings, config: Trainer.Config) -> dict[str, Origin]:
    """Check the outer loop's settings and write the method's own defaults into them, so that the config says everything."""
    given = config.semi_sync
    config.semi_sync = Binder(settings).guard("semi_sync", type(given), lambda: fill_defaults(given))
    return {
        f"semi_sync.{each.name}": Origin.METHOD
        for each in fields(given)
        if getattr(given, each.name) != getattr(config.semi_sync, each.name)
    }


def _pair(config: Trainer.Config, plans: Sequence[SitePlan]) -> dict[str, Origin]:
    """Settle who exchanges with whom, before any site has met another."""
    asked = config.semi_sync.pairing
    config.semi_sync.pairing = resolve_pairing(
        asked, plans, type(config.parallelism)(), shares_sparse_rows(config.semi_sync)
    )
    return {"semi_sync.pairing": Origin.LAYOUT} if asked == "auto" else {}


def _adapt(settings: Settings, config: Trainer.Config) -> dict[str, Origin]:
    """Let the platform settle what this machine cannot do otherwise.

    Raises:
        Missing: the model needs an accelerator.
    """
    before = {each.name: getattr(config.training, each.name) for each in fields(config.training)}
    try:
        adapt(config)
    except ValueError as error:
        name = settings.get("model.name", config.model_spec.name)
        raise settings.missing(Need.MODEL, "model.name", one_line(f"needs a GPU: {error}"), name) from None
    changed = [key for key, value in before.items() if getattr(config.training, key) != value]
    return {f"training.{key}": Origin.PLATFORM for key in changed}


def _devices() -> int:
    return torch.cuda.device_count() if device_type == "cuda" else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
