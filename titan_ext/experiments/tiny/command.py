"""Whether papers' claims hold for a small model, and what decides it: MT-DAO, DES-LOC and LoRDO.

A model of some ten thousand parameters tells the next character of real text. All arms begin with the same
warm-up, data parallelism with Adam, as the authors' runs do; then each has its own optimizer, and between its sites the
real outer loop. Every arm is tuned over a grid of as many learning rates on the first seed, widened where the best
lies at its edge, and run at its best one with all seeds.

  loss         on documents that no site trains on, after the last step
  gap          to data parallelism with Adam on the same tokens: mean over the seeds and 95% interval (Student's t)
  own gap      to data parallelism with the same optimizer (LoRDO: to low-rank data parallelism of its rank)

--parts chooses the questions:
  cause        MT-DAO, K 32, beta 0.999: is it the momentum or the rare averages, the warm-up, the second momentum
  constant     MT-DAO, Local Adam and data parallelism at a constant learning rate, as in the authors' runs
  decay        the same with a learning rate that falls to 0 over the last tenth
  ratio        K against the half-life of the slow momentum
  noise        batches of a quarter and of four times the size; half as many steps
  des_loc      DES-LOC against Local Adam
  methods      DiLoCo and FedAvg against Local Adam
  short        DiLoCo and FedAvg with rounds of few steps; a quarter of the steps
  others       Streaming, Decoupled and eager DiLoCo, NoLoCo, SPARTA, MuLoCo and DeMo beside DiLoCo; half as many steps
  low_rank     LoRDO and low-rank data parallelism, each with a fast and a slow momentum; half as many steps
  bases        LoRDO's rank, first bases, error feedback and renewals of the bases; half as many steps

Runs of one shape are trained together, as rows of one tensor. With --out each is kept when it ends, and the same command
goes on where it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag
from titan_ext.experiments import command
from titan_ext.experiments.tiny.arms import MEASUREMENTS, Arm, Result, Settings
from titan_ext.experiments.tiny.parts import PARTS

HELP = "claims of MT-DAO, DES-LOC and LoRDO with a tiny model, and what decides whether they hold"

_EXAMPLES = """\
examples:
  titan-ext bench tiny --out runs/tiny                                   all questions
  titan-ext bench tiny --out runs/tiny --parts cause --seeds 1           a first look at one
  titan-ext bench tiny --device cuda --dim 128 --batch 64 --steps 38400    the length of the author's runs
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (32, 1, "width of the model"),
    "steps": (5120, 1, f"inner steps after the warm-up, a multiple of {MEASUREMENTS} rounds"),
    "warmup": (512, 2, "steps of the warm-up"),
    "sites": (4, 2, "number of sites"),
    "batch": (8, 1, "windows of text a site and step"),
    "seeds": (3, 1, "runs of each arm at its best learning rate"),
    "warmup_lr": (1e-2, 1e-9, "learning rate of the warm-up"),
    "beta2": (0.999, 0.0, "decay of the second moment"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, questions, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    command.add_learning_rates(parser, "grid of every arm", "4e-3,1.2e-2,3.6e-2")
    parser.add_argument(
        "--corpus", default="builtin:code", help="file, folder, glob or built-in (default: builtin:code)"
    )
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, parts, grid = _checked(options)
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes
    from titan_ext.experiments.tiny.judged import claims
    from titan_ext.experiments.tiny.outcome import Place, draw, print_figures, rows
    from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

    found: dict[Place, dict[str, TunedOutcome[Result]]] = {}
    parameters = 0
    for place, arms in _by_place(settings, parts).items():
        done = _train(options, replace(settings, batch=place[0], decay=place[1], steps=place[2]), arms, grid)
        found[place] = tuned_outcomes(TunedOutcome, arms, options.seeds, done)
        parameters = next(iter(done.values())).parameters
    figures = {
        "parameters": parameters,
        **asdict(settings),
        "seeds": options.seeds,
        "ddp_bytes_a_step": ring_all_reduce_bytes(4 * parameters, settings.sites),
        "hypotheses": {name: PARTS[name].hypothesis for name in parts},
        "rows": [row for name in parts for row in rows(name, _places(settings, name), PARTS[name].arms, found)],
    }
    figures["claims"] = claims(figures["rows"], figures["ddp_bytes_a_step"])
    print_figures(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], options.plot))
    return figures


def _train(
    options: argparse.Namespace, settings: Settings, arms: Mapping[str, Arm], grid: Sequence[float]
) -> Mapping[Any, Result]:
    from titan_ext.experiments.tiny.cohorts import CohortPool
    from titan_ext.experiments.tiny.train import train

    return command.train_missing(
        options,
        settings,
        {name: list(grid) for name in arms},
        train=train,
        arguments=(settings, arms),
        result_type=Result,
        describe=lambda name: arms[name].describe(),
        pool=partial(CohortPool, shape=lambda run: _shape(arms[run.method])),
    )


def _shape(arm: Arm) -> tuple[bool, bool]:
    """What runs that are trained together have in common."""
    return arm.sync_every is None, arm.from_scratch


def _places(settings: Settings, part: str) -> list[tuple[int, float, int]]:
    """Batches, decays and lengths of a part."""
    own = PARTS[part]
    batches = [max(1, round(settings.batch * each)) for each in own.batches]
    return [(batch, decay, round(settings.steps * own.length)) for batch in batches for decay in own.decays]


def _by_place(settings: Settings, parts: Sequence[str]) -> dict[tuple[int, float, int], dict[str, Arm]]:
    """The arms of all parts that are trained at a place; parts share them."""
    found: dict[tuple[int, float, int], dict[str, Arm]] = {}
    for part in parts:
        for place in _places(settings, part):
            found.setdefault(place, {}).update(PARTS[part].arms)
    return found


def _checked(options: argparse.Namespace) -> tuple[Settings, list[str], list[float]]:
    """The settings, the parts and the learning rates, before anything is trained."""
    check_numbers(options, _SIZES)
    require_flag(options.beta2 < 1, "beta2", options.beta2, "from 0 to below 1")
    parts = command.chosen(options.parts, "parts", list(PARTS))
    for part in map(PARTS.__getitem__, parts):
        multiple = round(MEASUREMENTS * max(arm.sync_every or 1 for arm in part.arms.values()) / part.length)
        require_flag(options.steps % multiple == 0, "steps", options.steps, f"a multiple of {multiple}: whole rounds")
    command.check_run_arguments(options)
    grid = command.learning_rates(options.learning_rates)
    given = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name != "decay"}
    settings = Settings(**given, decay=0.0)
    from titan_ext.experiments.tiny.train import check_text

    check_text(settings)
    return settings, parts, grid
