"""How long the inner steps of a site stand still for the outer loop, by method, over one stated link.

Sites train in virtual time (``titan_ext.lab``): the product's own outer loops, a simulated network, and for the model a
stand-in of the same parameters, so that a run takes seconds and gives the same figures everywhere. Every method has the period
``--sync-every`` and defaults otherwise; what differs is said in its line. Coding, summing and applying take no time here. LoRDO
and DeMo are not among them: what they exchange does not shrink with the stand-in.

  stalled    seconds that inner steps stood still, a round (of a fragment, where there are fragments) and an inner step; mean
             over sites and the run
  utilised   share of the time in which inner steps were taken
  bytes      that a site sends, by an inner step
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers

HELP = "seconds that sites stand still for the outer loop, by method (virtual time)"

_NUMBERS: Numbers = {
    # default, least, help
    "sites": (4, 2, "how many"),
    "step_seconds": (0.35, 0.001, "length of an inner step"),
    "sync_every": (32, 8, "inner steps between rounds"),
    "rounds": (4, 1, "periods of the run"),
    "seed": (0, 0, "of the steps' lengths"),
}
_FRAGMENTS, _DELAY = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Method:
    """One line: tables of a run's file."""

    semi_sync: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def _method(method: str, optimizer: Mapping[str, Any] | None = None, **settings: Any) -> _Method:
    return _Method(semi_sync={"method": method, **settings}, optimizer=optimizer or {"name": "AdamW"})


_METHODS = {
    "data parallelism": _method("local_sgd", sync_every=1),
    "FedAvg": _method("local_sgd"),
    "DiLoCo": _method("diloco"),
    f"Streaming DiLoCo, {_FRAGMENTS} fragments, delay {_DELAY}": _method(
        "diloco", num_fragments=_FRAGMENTS, fragment_sync_delay=_DELAY
    ),
    f"Decoupled DiLoCo, {_FRAGMENTS} fragments, delay {_DELAY}": _method(
        "decoupled_diloco", num_fragments=_FRAGMENTS, fragment_sync_delay=_DELAY
    ),
    "eager DiLoCo": _method("eager_diloco"),
    "MuLoCo, int4": _method("muloco", {"name": "Muon"}, codec="int4"),
    "Local Adam": _method("local_adam"),
    "DES-LOC": _method("des_loc"),
    "MT-DAO, one momentum": _method("mt_dao", {"name": "QHAdamW", "betas": [0.999, 0.999], "omegas": [0.95]}),
    "NoLoCo": _method("noloco"),
    "SPARTA": _method("sparta"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sites, their link, and the model."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _NUMBERS)
    parser.add_argument("--link", default="1gbit,40ms", help="between each two sites (default: 1gbit,40ms)")
    parser.add_argument("--flavor", default="125M", help="of llama3 (default: 125M)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rehearse every method, print the table, and return its figures.

    Raises:
        UserError: an option is out of range.
    """
    check_numbers(options, _NUMBERS)
    rows = [{"method": name, **_rehearse(method, options)} for name, method in _METHODS.items()]
    _print(options, rows)
    return {**{key: getattr(options, key) for key in (*_NUMBERS, "link", "flavor")}, "rows": rows}


def _rehearse(method: _Method, options: argparse.Namespace) -> dict[str, Any]:
    from titan_ext.lab.build import Request, make_script
    from titan_ext.lab.rehearsal import Rehearsal

    request = Request(sites=options.sites, links=[options.link], steps=[f"{options.step_seconds}s"], seed=options.seed)
    outcome = Rehearsal(make_script(_load(method, options), request)).run()
    traces = outcome.sites
    stalled = sum(trace.ended - trace.started - trace.training_seconds for trace in traces)
    steps, rounds = sum(trace.steps for trace in traces), sum(len(trace.rounds) for trace in traces)
    return {
        "bytes_a_step": round(sum(trace.sent_bytes for trace in traces) / steps),
        "stalled_a_round_seconds": round(stalled / rounds, 4),
        "stalled_a_step_seconds": round(stalled / steps, 4),
        "utilised": round(outcome.utilisation, 4),
    }


def _load(method: _Method, options: argparse.Namespace) -> Sequence[Any]:
    """The run's site, of which the laboratory makes copies."""
    from titan_ext.config.load import load_run
    from titan_ext.config.toml_text import toml_tables

    tree = {
        "site": [{"name": "site0", "data": "builtin:code"}],
        "model": {"name": "llama3", "flavor": options.flavor},
        "training": {"seq_len": 2048, "local_batch_size": 4, "steps": options.sync_every * options.rounds},
        "optimizer": method.optimizer,
        "semi_sync": {"sync_every": options.sync_every, **method.semi_sync},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.toml")
        path.write_text("\n".join(toml_tables(tree, {})), encoding="utf-8")
        return load_run(path, needs=()).sites


def _print(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from titan_ext.launcher.text import bytes_text, columns

    print(
        f"{options.sites} sites, {options.link}, llama3 {options.flavor}, inner steps of {options.step_seconds:g} s, "
        f"a round every {options.sync_every}"
    )
    body = [
        [
            row["method"],
            bytes_text(row["bytes_a_step"]),
            f"{row['stalled_a_round_seconds']:.2f} s",
            f"{row['stalled_a_step_seconds']:.3f} s",
            f"{row['utilised']:.1%}",
        ]
        for row in rows
    ]
    print(*columns([["method", "sent a step", "stalled a round", "stalled a step", "utilised"], *body]), sep="\n")
