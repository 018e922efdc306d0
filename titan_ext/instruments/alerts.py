"""Alerts: rules over a site's measures, read from TOML."""

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError, nearest, one_of
from titan_ext.instruments.measures import MEASURES, measure_all, standing
from titan_ext.instruments.run import Run
from titan_ext.instruments.site import SiteHistory

SEVERITIES = ("critical", "warning")
_BOUNDS = ("above", "below", "at_least")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertRule:
    """One ``[[alert]]`` of a file, see ``alerts.toml``."""

    name: str
    measure: str = ""
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    severity: str = "warning"
    text: str = "{value}"
    advice: str = ""
    off: bool = False

    def holds(self, value: float | None) -> bool:
        """Whether the measure is beyond the bound."""
        if value is None:
            return False
        if self.above is not None:
            return value > self.above
        return value < self.below if self.below is not None else value >= self.at_least


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that holds for a site."""

    rule: str
    site: str
    severity: str
    text: str
    advice: str


def load_rules(path: str | Path | None = None) -> list[AlertRule]:
    """The rules of the package, changed and extended by those of a file.

    Raises:
        UserError: the file cannot be read, or a rule in it is none.
    """
    own = files("titan_ext.instruments").joinpath("alerts.toml").read_text(encoding="utf-8")
    rules = {rule.name: rule for rule in _parse("alerts.toml", own)}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
            raise UserError(f"--alerts {path}: cannot be read: {reason}") from error
        for rule in _parse(f"--alerts {path}", text):
            if rule.off and rule.name not in rules:
                raise UserError(f"--alerts {path}: alert {rule.name}: off = true: {one_of(rule.name, rules)}")
            rules[rule.name] = rule
    return [rule for rule in rules.values() if not rule.off]


def raised(run: Run, rules: Sequence[AlertRule], now: float) -> list[Alert]:
    """The alerts of all sites, critical ones first, otherwise in the order of the rules."""
    found = [
        Alert(
            rule.name, name, rule.severity, rule.text.format(value=value, reason=_reason(run, site, now)), rule.advice
        )
        for name, site in sorted(run.sites.items())
        for measures in [measure_all(run, site, now)]
        for rule in rules
        if rule.holds(value := measures[rule.measure])
    ]
    places = {rule.name: place for place, rule in enumerate(rules)}
    return sorted(found, key=lambda each: (SEVERITIES.index(each.severity), places[each.rule], each.site))


def _reason(run: Run, site: SiteHistory, now: float) -> str:
    missed, why = run.missed_in_a_row(site.name)
    failure = site.failures[-1].get("error") if site.failed_in_a_row else None
    stretches = run.stretches(site.name)
    latest = f"round {stretches[-1].first}: {stretches[-1].cell.reason}" if stretches else None
    told = [site.problem, standing(site, now).text, why if missed else None, failure, latest]
    return next((each for each in told if each), "no reason given")


def _parse(name: str, text: str) -> list[AlertRule]:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name}: {error}") from error
    unknown = [key for key in found if key != "alert"]
    if unknown or not isinstance(found.get("alert", []), list):
        raise UserError(f"{name}: holds {unknown[0] if unknown else 'alert'}: must be [[alert]] tables only")
    rules = [_rule(name, place, table) for place, table in enumerate(found.get("alert", []), 1)]
    for rule, count in Counter(each.name for each in rules).items():
        if count > 1:
            raise UserError(f"{name}: alert {rule}: is there {count} times: names must differ")
    return rules


def _rule(file: str, place: int, table: Mapping[str, Any]) -> AlertRule:
    where = f"{file}: alert {table.get('name', place) if isinstance(table, Mapping) else place}"
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: must be a table")
    known = {each.name: each.type for each in fields(AlertRule)}
    for key, value in table.items():
        if key not in known:
            close = nearest(key, known)
            raise UserError(f"{where}: does not know {key}" + (f" (did you mean {close}?)" if close else ""))
        allowed = bool if key == "off" else (int, float) if key in _BOUNDS else str
        if not isinstance(value, allowed) or (key in _BOUNDS and isinstance(value, bool)):
            kind = "true or false" if key == "off" else "a number" if key in _BOUNDS else "a text"
            raise UserError(f"{where}: {key} = {value!r}: must be {kind}")
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{where}: {key} = nan: must be a number, or nothing is beyond it")
    if "name" not in table:
        raise UserError(f"{where}: must have a name")
    rule = AlertRule(**table)
    if not rule.off:
        _check(where, rule)
    return rule


def _check(where: str, rule: AlertRule) -> None:
    if not rule.measure:
        raise UserError(f"{where}: must have a measure; it takes the place of the whole alert of its name")
    if rule.measure not in MEASURES:
        close = nearest(rule.measure, MEASURES)
        hint = f" (did you mean {close}?)" if close else f"; there are {', '.join(MEASURES)}"
        raise UserError(f'{where}: measure = "{rule.measure}": there is no such measure{hint}')
    if sum(getattr(rule, bound) is not None for bound in _BOUNDS) != 1:
        raise UserError(f"{where}: must have one of {', '.join(_BOUNDS)}")
    if rule.severity not in SEVERITIES:
        raise UserError(f'{where}: severity = "{rule.severity}": must be one of {", ".join(SEVERITIES)}')
    try:
        rule.text.format(value=1.0, reason="")
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f'{where}: text = "{rule.text}": only {{value}} and {{reason}} can stand in it ({error})'
        ) from error
