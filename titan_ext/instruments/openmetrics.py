"""A run's numbers as OpenMetrics text, for Prometheus and its like."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from titan_ext.instruments.measures import MEASURES, State

_GAUGES = {
    "step": "Inner steps taken.",
    "loss": "Loss of the latest step.",
    "tokens_per_second": "Tokens a second of the latest step.",
    "lr": "Learning rate of the latest step.",
    "grad_norm": "Norm of the gradient of the latest step.",
    "round": "Committed rounds.",
    "failed_rounds": "Rounds that were not committed, as far back as they are kept.",
}
_COUNTERS = {
    "tokens": "Tokens trained on.",
    "bytes_sent": "Bytes put on the wire by rounds.",
    "bytes_received": "Bytes taken from the wire by rounds.",
    "control_bytes_sent": "Bytes of tables of statuses and weights.",
    "wire_bytes_sent": "Bytes of all frames, headers and repetitions included.",
    "healing_bytes_sent": "Bytes of the frames that gave other sites the shared state.",
}


def openmetrics(shot: Mapping[str, Any]) -> str:
    """The text of a snapshot; what is not known is left out."""
    sites = {site["name"]: site for site in shot["sites"]}
    lines: list[str] = []
    for key, text in _GAUGES.items():
        lines += _family(key, "gauge", text, {name: site[key] for name, site in sites.items()})
    for key, text in _COUNTERS.items():
        lines += _family(key, "counter", text, {name: site[key] for name, site in sites.items()})
    for key, (_, text) in MEASURES.items():
        values = {name: site["measures"][key] for name, site in sites.items()}
        lines += _family(key if key not in _GAUGES else f"{key}_in_a_row", "gauge", _sentence(text), values)
    lines += _rounds(sites)
    lines += ["# TYPE titan_ext_state stateset", "# HELP titan_ext_state What the site does."]
    lines += [
        f'titan_ext_state{{site="{_escaped(name)}",titan_ext_state="{state}"}} {int(site["state"] == state)}'
        for name, site in sites.items()
        for state in State
    ]
    lines += ["# TYPE titan_ext_alert gauge", "# HELP titan_ext_alert Alerts that hold."]
    lines += [
        f'titan_ext_alert{{site="{_escaped(each["site"])}",alert="{_escaped(each["rule"])}",severity="{each["severity"]}"}} 1'
        for each in shot["alerts"]
    ]
    return "\n".join([*lines, "# EOF", ""])


def _rounds(sites: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Every number of each site's latest round, whatever its line holds."""
    latest = {
        name: {key: values[-1] for key, values in site["ledger"]["series"].items() if values}
        for name, site in sites.items()
    }
    for key in dict.fromkeys(key for record in latest.values() for key in record if key != "step"):
        values = {name: record.get(key) for name, record in latest.items()}
        name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
        yield from _family(f"round_{name}", "gauge", f"{key} of the latest committed round.", values)


def _family(key: str, kind: str, text: str, values: Mapping[str, float | None]) -> list[str]:
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return []
    name, ending = f"titan_ext_{key}", "_total" if kind == "counter" else ""
    return [
        f"# TYPE {name} {kind}",
        f"# HELP {name} {text}",
        *(f'{name}{ending}{{site="{_escaped(site)}"}} {value:.10g}' for site, value in known.items()),
    ]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
