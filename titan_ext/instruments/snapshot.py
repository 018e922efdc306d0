"""A run at one moment as plain values: what the terminal draws, the page is sent and a report keeps."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from titan_ext.instruments.alerts import Alert, AlertRule, raised
from titan_ext.instruments.lines import number
from titan_ext.instruments.measures import OVER, State, measure_all, stall_of, standing
from titan_ext.instruments.run import Mark, Run
from titan_ext.instruments.site import SiteHistory

LETTERS = {
    Mark.CONTRIBUTED: "c",
    Mark.RETRIED: "r",
    Mark.JOINED: "j",
    Mark.LEFT_OUT: "l",
    Mark.ABSENT: "a",
    Mark.BEFORE: "b",
    Mark.UNKNOWN: "u",
}
"""Of the marks in a timeline's row."""

_SERIES = ("step", "time", "loss", "tokens", "bytes_sent", "tokens_per_second")


def snapshot(
    run: Run,
    rules: Sequence[AlertRule],
    now: float,
    *,
    points: int = 400,
    rounds: int = 240,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """The run as JSON values; None is what is not known.

    Args:
        run: as far as it has been read.
        rules: of alerts.
        now: seconds of the clock.
        points: of a curve, at most.
        rounds: of the timeline, the latest ones.
        problems: places that cannot be reached.
    """
    alerts = raised(run, rules, now)
    shown = list(run.rounds)[-rounds:]
    return {
        "name": run.name,
        "time": now,
        "verdict": _verdict(run, alerts, now, problems),
        "alerts": [asdict(each) for each in alerts],
        "told": _told(alerts),
        "problems": list(problems),
        "sites": [_site(run, run.sites[name], now, points, shown) for name in run.names],
        "timeline": _timeline(run, shown),
        "settings": settings_of({name: site.config for name, site in run.sites.items() if site.config is not None}),
    }


def _verdict(run: Run, alerts: Sequence[Alert], now: float, problems: Sequence[str]) -> dict[str, str]:
    """The run in one sentence, for whoever looks for five seconds."""
    states = Counter(standing(site, now).state for site in run.sites.values())
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    step = max((site.last.step for site in run.sites.values() if site.last is not None), default=None)
    where = [f"step {step}"] if step is not None else []
    where += [f"round {max(run.rounds)}"] if run.rounds else []
    state = f"{counts or 'no site has written anything yet'}{'; ' if where else ''}{', '.join(where)}"
    over = bool(states) and all(each in OVER for each in states)
    if not alerts and not problems and all(each is State.NO_DATA for each in states):
        return {"level": "over", "text": "nothing has been written yet", "state": state}
    if not alerts:
        level = "warning" if problems else "over" if over else "ok"
        return {"level": level, "text": problems[0] if problems else "all well", "state": state}
    worst = alerts[0]
    rest = len({each.site for each in alerts} - {worst.site})
    more = f" (and {rest} other site{'' if rest == 1 else 's'})" if rest else ""
    return {"level": worst.severity, "text": f"{worst.site}: {worst.text}{more}", "state": state}


def _told(alerts: Sequence[Alert]) -> list[dict[str, str]]:
    """The alerts for people: one that several sites have, and that differs in numbers alone, once."""
    same: dict[tuple[str, str], list[Alert]] = {}
    for each in alerts:
        same.setdefault((each.rule, re.sub(r"[\d.]+", "", each.text)), []).append(each)
    return [asdict(group[0]) | {"site": ", ".join(each.site for each in group)} for group in same.values()]


def _site(run: Run, site: SiteHistory, now: float, points: int, shown: Sequence[int]) -> dict[str, Any]:
    stands, last = standing(site, now), site.last
    curve = site.curve.points(points)
    return {
        "name": site.name,
        "state": stands.state,
        "text": stands.text,
        "over": stands.state in OVER,
        "steps": site.setting("training", "steps"),
        **{key: getattr(last, key, None) for key in ("step", "loss", "tokens", "tokens_per_second", "lr", "grad_norm")},
        "is_finite": last.is_finite if last is not None else True,
        "round": max(site.rounds) if site.rounds else None,
        **site.bytes,
        "restarts": site.restarts if site.phase is not None else None,
        "steps_repeated": site.curve.steps_repeated,
        "failed_rounds": len(site.failures),
        "last_time": site.last_time,
        "measures": measure_all(run, site, now),
        "curve": {key: [_rounded(getattr(each, key)) for each in curve] for key in _SERIES},
        "validation": site.validation[-points:],
        "ledger": _ledger(site, [each for each in shown if each in site.rounds]),
        "last_round": site.last_round,
        "events": [asdict(each) for each in list(site.events)[-30:]],
        "summary": site.summary,
    }


def _ledger(site: SiteHistory, shown: Sequence[int]) -> dict[str, Any]:
    """Every number of the site's rounds, whatever its line holds, as a series over the rounds."""
    records = [_numbers(site.rounds[each]) for each in shown]
    keys = dict.fromkeys(key for record in records for key in record if key not in ("round", "time"))
    # Not every round is measured.
    layers = next((found for each in reversed(shown) if (found := site.rounds[each].get("norms_by_layer"))), None)
    return {
        "round": list(shown),
        "time": [record.get("time") for record in records],
        "stalled": [stall_of(site, record) for record in records],
        "series": {key: [_rounded(record.get(key)) for record in records] for key in keys},
        "layers": layers,
    }


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round's line, those of one level of tables among them too, by dotted key."""
    found: dict[str, float] = {}
    for key, value in record.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
        found |= {name: each for name, each in inner.items() if number(each) is not None}
    return found


def _timeline(run: Run, shown: Sequence[int]) -> dict[str, Any]:
    first = shown[0] if shown else 0
    return {
        "rounds": list(shown),
        "steps": [run.rounds[each].step for each in shown],
        "times": [run.rounds[each].time for each in shown],
        "rows": {name: "".join(LETTERS[run.timeline(name)[each].mark] for each in shown) for name in run.names},
        "stretches": [
            {
                "site": each.site,
                "first": each.first,
                "last": each.last,
                "mark": LETTERS[each.cell.mark],
                "what": each.cell.mark,
                "reason": each.cell.reason,
                "time": each.time,
            }
            for name in run.names
            for each in run.stretches(name)
            if each.last >= first
        ],
    }


def settings_of(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings by dotted key: those that are equal everywhere, and those that are not, by name of the owner."""
    flat = {name: dict(_flattened(config)) for name, config in configs.items()}
    keys = list(dict.fromkeys(key for each in flat.values() for key in each))
    differing = {
        key: {name: each.get(key) for name, each in flat.items()}
        for key in keys
        if len({repr(each.get(key)) for each in flat.values()}) > 1
    }
    some = next(iter(flat.values()), {})
    return {"equal": {key: some[key] for key in keys if key not in differing and key in some}, "differing": differing}


def _flattened(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        if prefix == "site" and len(value) == 1:
            value = value[0]
        else:
            value = {str(place): each for place, each in enumerate(value)}
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [pair for key, each in value.items() for pair in _flattened(each, f"{prefix}.{key}" if prefix else str(key))]


def _rounded(value: Any) -> Any:
    """Fewer digits on the wire."""
    return float(f"{value:.6g}") if isinstance(value, float) and value < 1e8 else value
