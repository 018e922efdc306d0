"""README.md's tables of results, from the records: methods, distance and faults beside torchft, and the lane against its
nightly build."""

from collections.abc import Iterable, Mapping
from typing import Any

from titan_ext.experiments.records import Record
from titan_ext.experiments.tables import interval, markdown

_PARTS = ("constant", "des_loc", "methods", "others")
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
        for name, section in (("tiny", _methods), ("wan", _distance), ("rejoin", _faults), ("nightly", _nightly))
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
    lines = [[*line, stalls.get(line[0].split(",")[0].split(":")[0], "")] for line in body]
    return [
        f"Loss: {figures['parameters']:,} parameters, {figures['sites']} sites, {figures['steps']:,} steps at a constant "
        f"learning rate, {figures['seeds']} seeds, 95% intervals; data parallelism sends "
        f"{figures['ddp_bytes_a_step']:,.0f} bytes a step. `{record.command}`; the "
        "[page of results](titan_ext/experiments/results/README.md) has the rest.",
        *_stall_text(records),
        "",
        *markdown([*titles, "stalled a step"], lines),
    ]


def _arms(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of methods, each as it is in the first part that has it."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        of_method = row["part"] in _PARTS or (row["part"] == "bases" and row["arm"] in _LOW_RANK)
        if row["k"] is not None and of_method:
            found.setdefault(row["label"], row)
    return list(found.values())


def _label(row: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    same = row["steps"] == figures["steps"]
    return row["label"] if same else f"{row['label']}; {row['steps']:,} steps"


def _bytes(row: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    sent = row["bytes_sent"] / row["steps"]
    return f"{sent:,.0f} ({sent / figures['ddp_bytes_a_step']:.1%})"


def _stalls(records: Mapping[str, Record]) -> dict[str, str]:
    """By method its stall."""
    if "stall" not in records:
        return {}
    return {
        row["method"].split(",")[0]: f"{row['stalled_a_step_seconds']:.3f} s"
        for row in records["stall"].figures["rows"]
    }


def _stall_text(records: Mapping[str, Record]) -> list[str]:
    if "stall" not in records:
        return []
    record = records["stall"]
    figures = record.figures
    return [
        f"Stall: llama3 {figures['flavor']}, {figures['sites']} sites, "
        f"{figures['link']}, inner steps of {figures['step_seconds']:g} s, a round every {figures['sync_every']}, in virtual "
        f"time; under data parallelism {_stalls(records)[_BY_METHOD]} a step. `{record.command}`."
    ]


def _distance(record: Record, _: Mapping[str, Record]) -> list[str]:
    figures = record.figures
    codecs = [key for key in figures["rows"][0] if key.endswith("_x_fp32")]
    body = [
        [
            f"{row['rate_mbit']:g} Mbit/s, {row['rtt']:g} ms",
            f"{row['seconds']:.2f}",
            *(f"{row[key]:.2f}" for key in ("x_plain_tcp", "x_torchft", *codecs)),
            "" if row["empty_round_trips"] is None else f"{row['empty_round_trips']:.1f}",
        ]
        for row in figures["rows"]
    ]
    titles = ["rate of sending, round-trip time", "seconds", "of plain TCP's", "of torchft's DiLoCo's"]
    titles += [f"{codec.removesuffix('_x_fp32')}, of fp32's" for codec in codecs]
    return [
        f"A round of {figures['parameters']:,.0f} fp32 parameters between {figures['sites']} sites, as a share of the seconds "
        "that plain TCP takes for as many bytes over as many connections as are fastest, and of torchft's; medians of "
        f"{figures['rounds']} in one run on {record.machine['cores']} core(s), and the round trips of a round without bytes. "
        f"`{record.command}`.",
        "",
        *markdown([*titles, "round trips, empty"], body),
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
