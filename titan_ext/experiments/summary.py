"""README.md's tables of results, from the records: methods, faults beside torchft, and the lane against its nightly build."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from titan_ext.experiments.records import Record
from titan_ext.experiments.tables import interval, markdown

_PARTS = ("constant", "des_loc", "methods")
"""Parts of ``titan-ext bench tiny`` whose arms are methods; an arm of several is in it once."""
_LOW_RANK = ("lordo_r4_k32", "lordo_r16_k32")
"""Arms of part "bases" that are methods too."""

_BY_METHOD = "data parallelism"
_REJOIN = {
    "rejoin": "back after, s",
    "longest": "longest stall of a survivor, s",
    "wasted": "stalled and lost, s",
    "lost": "inner steps lost",
}


def readme_lines(records: Mapping[str, Record]) -> list[str]:
    """Everything between README.md's marks; nothing of records that are not there."""
    sections = [
        section(records[name], records)
        for name, section in (("tiny", _methods), ("rejoin", _faults), ("nightly", _nightly))
        if name in records
    ]
    return ["", "## Results", *(line for section in sections for line in ("", *section)), ""] if sections else []


def _methods(record: Record, records: Mapping[str, Record]) -> list[str]:
    figures = record.figures
    stalls = _stalls(records)
    titles = [
        "method",
        "loss against data parallelism with Adam, nats",
        "against data parallelism with its own optimizer",
        "bytes a step",
    ]
    body = [
        [_label(row, figures), interval(row, "gap"), interval(row, "own_gap"), _bytes(row, figures)]
        for row in _arms(figures["rows"])
    ]
    named = {line[0].split(",")[0].split(":")[0] for line in body}
    trained = [[*line, stalls.get(line[0].split(",")[0].split(":")[0], {}).get("stalled", "")] for line in body]
    others = [
        [row["method"], "not trained", "", row["share"], row["stalled"]]
        for name, row in stalls.items()
        if name not in (*named, _BY_METHOD)
    ]
    return [
        f"Loss: {figures['parameters']:,} parameters, {figures['sites']} sites, {figures['steps']:,} steps at a constant "
        f"learning rate, {figures['seeds']} seeds, 95% intervals; data parallelism sends "
        f"{figures['ddp_bytes_a_step']:,.0f} bytes a step. `{record.command}`; the "
        "[page of results](titan_ext/experiments/results/README.md) has the rest.",
        *_stall_text(records),
        "",
        *markdown([*titles, "stalled a step"], [*trained, *others]),
    ]


def _arms(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of methods, each once."""
    chosen = (
        row
        for row in rows
        if row["k"] is not None and (row["part"] in _PARTS or (row["part"] == "bases" and row["arm"] in _LOW_RANK))
    )
    return list({row["label"]: row for row in chosen}.values())


def _label(row: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    same = row["steps"] == figures["steps"]
    return row["label"] if same else f"{row['label']}; {row['steps']:,} steps"


def _bytes(row: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    sent = row["bytes_sent"] / row["steps"]
    return f"{sent:,.0f} ({sent / figures['ddp_bytes_a_step']:.1%})"


def _stalls(records: Mapping[str, Record]) -> dict[str, dict[str, str]]:
    """By method: its line's name, its stall, and its bytes as a share of data parallelism's."""
    if "stall" not in records:
        return {}
    rows: Sequence[Mapping[str, Any]] = records["stall"].figures["rows"]
    whole = next(row["bytes_a_step"] for row in rows if row["method"] == _BY_METHOD)
    return {
        row["method"].split(",")[0]: {
            "method": row["method"],
            "stalled": f"{row['stalled_a_step_seconds']:.3f} s",
            "share": f"({row['bytes_a_step'] / whole:.1%})",
        }
        for row in rows
    }


def _stall_text(records: Mapping[str, Record]) -> list[str]:
    if "stall" not in records:
        return []
    record = records["stall"]
    figures = record.figures
    return [
        f"Stall, and bytes of methods that are not trained: llama3 {figures['flavor']}, {figures['sites']} sites, "
        f"{figures['link']}, inner steps of {figures['step_seconds']:g} s, a round every {figures['sync_every']}, in virtual "
        f"time; under data parallelism {_stalls(records)[_BY_METHOD]['stalled']} a step. `{record.command}`."
    ]


def _faults(record: Record, _: Mapping[str, Record]) -> list[str]:
    figures = record.figures
    body = [[row["killed"], row["method"], *(f"{row[key]:.2f}" for key in _REJOIN)] for row in figures["rows"]]
    return [
        f"A site of {figures['sites']} is killed between two rounds (inner) or within one (reduce), and comes back; by "
        f"torchft's DiLoCo and by ours, in turns in one run on {record.machine['cores']} core(s), so that lines compare; "
        f"seconds depend on what else the machine does. `{record.command}`.",
        "",
        *markdown(["killed", "method", *_REJOIN.values()], body),
    ]


def _nightly(record: Record, _: Mapping[str, Record]) -> list[str]:
    figures = record.figures
    states = "; ".join(
        f"{row['check']} {'passes' if row['passes'] else 'FAILS'} ({row['detail']})" for row in figures["rows"]
    )
    return [
        f"The weekly lane (`.ci/weekly`, allowed to fail) against torchft-nightly {figures['nightly']}, beside the release "
        f"{figures['release']}: {states}. `{record.command}`."
    ]
