"""Lines as sites write them, for made-up runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(number: int, time: float, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 4.0, "tokens": 100 * number, "time": time} | values


def round_(number: int, time: float, contributors: Iterable[str], **values: Any) -> dict[str, Any]:
    names = list(contributors)
    line = {"kind": "round", "round": number, "step": 10 * number, "participants": len(names), "contributors": names}
    line |= {"bytes_sent": 1000, "bytes_received": 1000, "seconds_quorum": 0.5, "seconds_reduce": 1.0}
    return line | {"seconds_apply": 0.5, "committed": True, "healed": False, "error": None, "time": time} | values


def commit(
    number: int, time: float, contributors: Iterable[str], sites: Iterable[str], **values: Any
) -> dict[str, Any]:
    line = {"run": "r", "generation": 0, "round": number, "step": 10 * number, "contributors": list(contributors)}
    return line | {"sites": list(sites), "tokens": 0, "digest": f"d{number}", "time": time} | values


def trained(folder: Path, name: str, rounds: Iterable[int], contributors: Iterable[str], begin: float = 0.0) -> None:
    """Ten steps of a second each before each of the rounds, in which ``contributors`` took part."""
    for number in rounds:
        steps = range(10 * number - 9, 10 * number + 1)
        append(folder / name / "metrics.jsonl", *(step(each, begin + each) for each in steps))
        append(folder / name / "metrics.jsonl", round_(number, begin + 10 * number, contributors))
        append(folder / name / "commits.jsonl", commit(number, begin + 10 * number, contributors, contributors))
