"""What the papers lead one to expect of the rows of figures, and whether it came out so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp
from typing import Any

from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.launcher.text import number_text

Row = Mapping[str, Any]

# LoRDO's abstract: perplexity within 1% of low-rank data parallelism at about ten times fewer bytes.
_LORDO_PERPLEXITY, _LORDO_BYTES = 1.01, 10.0


def claims(rows: Sequence[Row], ddp_bytes_a_step: float) -> list[dict[str, Any]]:
    """Each claim on a row, in the rows' order; an interval around 0 counts as no difference.

    Args:
        rows: of figures.
        ddp_bytes_a_step: that a site sends under data parallelism.
    """
    judges: dict[str, Callable[[Row, Sequence[Row], float], Iterator[dict[str, Any]]]] = {
        "mt_dao": _mt_dao,
        "des_loc": _des_loc,
        "lordo": _lordo,
    }
    return [
        each
        for row in rows
        for prefix, judge in judges.items()
        if row["arm"].startswith(prefix)
        for each in judge(row, rows, ddp_bytes_a_step)
    ]


def _mt_dao(row: Row, rows: Sequence[Row], _: float) -> Iterator[dict[str, Any]]:
    name = _name(row)
    yield claim(f"{name} is not above DDP with Adam", _not_above(row, "gap"), _text(row, "gap"))
    yield claim(f"{name} is not above DDP with its own momenta", _not_above(row, "own_gap"), _text(row, "own_gap"))
    local = _local_adam(row, rows)
    if local is not None:
        differences = _between(row, local)
        yield claim(f"{name} is below Local Adam", _is_below(differences), _difference(differences))


def _des_loc(row: Row, rows: Sequence[Row], _: float) -> Iterator[dict[str, Any]]:
    local = _local_adam(row, rows)
    if local is not None:
        differences, share = _between(row, local), row["bytes_sent"] / local["bytes_sent"]
        level = differences is not None and abs(differences.mean) <= (differences.half_width or 0.0)
        # Without a last round of all states the moments of a run are averaged at whole periods only: half at most.
        text = f"{_difference(differences)}; {share:.3f} of the bytes"
        yield claim(f"{_name(row)} is level with Local Adam at half its bytes or less", level and share <= 0.5, text)


def _lordo(row: Row, _rows: Sequence[Row], ddp_bytes_a_step: float) -> Iterator[dict[str, Any]]:
    less = ddp_bytes_a_step * row["steps"] / row["bytes_sent"]
    ratio = None if row["own_gap"] is None else exp(row["own_gap"])
    holds = ratio is not None and ratio <= _LORDO_PERPLEXITY and less >= _LORDO_BYTES
    perplexity = "diverged" if ratio is None else f"perplexity {ratio - 1:+.2%}"
    text = f"{perplexity} ({_text(row, 'own_gap')}); {less:.1f} times fewer bytes than DDP"
    yield claim(f"{_name(row)} is within 1% of low-rank DDP's perplexity at 10 times fewer bytes", holds, text)


def _name(row: Row) -> str:
    return f"{row['part']}, batch {row['batch']}, decay {row['decay']:g}: {row['label']}"


def _local_adam(row: Row, rows: Sequence[Row]) -> Row | None:
    keys = ("part", "batch", "decay", "k")
    alike = [each for each in rows if all(each[key] == row[key] for key in keys)]
    return next((each for each in alike if each["arm"].startswith("local_adam")), None)


def _between(ours: Row, theirs: Row) -> SeedDifferences | None:
    if None in (*ours["losses"], *theirs["losses"]):
        return None
    return SeedDifferences.between(ours["losses"], theirs["losses"])


def _is_below(differences: SeedDifferences | None) -> bool:
    return differences is not None and differences.mean < -(differences.half_width or 0.0)


def _not_above(row: Row, key: str) -> bool:
    return row[key] is not None and row[key] <= (row[f"{key}_half_width"] or 0.0)


def _difference(differences: SeedDifferences | None) -> str:
    if differences is None:
        return "diverged"
    return f"{differences.mean:+.4f} +- {number_text(differences.half_width, '.4f')} nats"


def _text(row: Row, key: str) -> str:
    return f"{number_text(row[key], '+.4f')} +- {number_text(row[f'{key}_half_width'], '.4f')} nats"
