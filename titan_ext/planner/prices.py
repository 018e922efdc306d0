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


_KEYS = tuple(each.name for each in fields(Price))


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
    given = {"default": tables.get("default", {})} | {f"sites.{name}": table for name, table in own.items()}
    read = {where: _checked(path, where, _table(path, where, table)) for where, table in given.items()}
    if not any(read.values()):
        raise UserError(f"--price {path}: holds no price; it has {FORM}{', '.join(_KEYS)}")
    by_site = {name: Price(**read["default"] | read.get(f"sites.{name}", {})) for name in sites}
    return Prices(currency=currency, by_site=by_site)


def _table(path: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} = {value!r}: must be a table; the file has {FORM}{', '.join(_KEYS)}")
    return value


def _checked(path: str, where: str, table: dict[str, Any]) -> dict[str, Any]:
    for key, value in table.items():
        if key not in _KEYS:
            raise UserError(f"{path}: {where}.{key}: {one_of(key, _KEYS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"{path}: {where}.{key} = {value!r}: must be a number, at least 0")
    return table
