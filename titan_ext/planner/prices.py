"""What a run costs in money: a file of prices by site."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError, one_of

FORM = 'currency = "EUR", a table [default], and tables [sites.NAME] for sites that differ; their keys: '


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Prices of a site; a key that is not given is free."""

    gpu_hour: float = 0.0
    """One rank for an hour."""
    egress_gb: float = 0.0
    """10**9 bytes that leave the site."""
    site_hour: float = 0.0
    """All else of the site for an hour: storage, a leased line."""

    def of(self, hours: float, ranks: int, sent: float) -> float:
        """The price of a site for ``hours`` that sends ``sent`` bytes."""
        return hours * (self.gpu_hour * ranks + self.site_hour) + self.egress_gb * sent / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """A file of prices."""

    currency: str
    by_site: Mapping[str, Price]


def load_prices(path: str, sites: Sequence[str]) -> Prices:
    """Read a file of prices.

    Raises:
        UserError: the file cannot be read, or a key, site or number is wrong.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--price {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--price {path}: not TOML: {error}") from None
    for key in tables:
        if key not in ("currency", "default", "sites"):
            raise UserError(f"{path}: {key}: {one_of(key, ('currency', 'default', 'sites'))}")
    currency = tables.get("currency", "")
    if not isinstance(currency, str):
        raise UserError(f"{path}: currency = {currency!r}: must be a text")
    own = _table(path, "sites", tables.get("sites", {}))
    for name in own:
        if name not in sites:
            raise UserError(f"{path}: sites.{name}: {one_of(name, sites)}")
    default = _table(path, "default", tables.get("default", {}))
    by_site = {
        name: _price(path, f"sites.{name}", {**default, **_table(path, name, own.get(name, {}))}) for name in sites
    }
    return Prices(currency=currency, by_site=by_site)


def _table(path: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        names = ", ".join(each.name for each in fields(Price))
        raise UserError(f"{path}: {key} = {value!r}: must be a table; the file has {FORM}{names}")
    return value


def _price(path: str, where: str, table: Mapping[str, Any]) -> Price:
    names = [each.name for each in fields(Price)]
    for key, value in table.items():
        if key not in names:
            raise UserError(f"{path}: {where}.{key}: {one_of(key, names)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"{path}: {where}.{key} = {value!r}: must be a number, at least 0")
    return Price(**table)
