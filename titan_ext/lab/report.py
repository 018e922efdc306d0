"""A rehearsal's outcome as text, as plain values, and as the files that a run leaves."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError
from titan_ext.files import write_whole
from titan_ext.lab.faults import Fault
from titan_ext.lab.trace import Outcome, SiteTrace
from titan_ext.launcher.text import bytes_text, duration_text


def render(file: str, outcome: Outcome, faults: Sequence[Fault]) -> str:
    """The outcome in some lines."""
    steps = max(site.steps for site in outcome.sites)
    end = "" if outcome.finished else ": not to the end"
    width = max(len(site.name) for site in outcome.sites) + 2
    count = f"{len(outcome.sites)} site{'' if len(outcome.sites) == 1 else 's'}"
    lines = [
        f"{file}: {count}, {steps} steps in {duration_text(outcome.seconds)} of {outcome.clock} time{end}",
        f"  utilisation     {outcome.utilisation:.1%} (mean of the sites)",
        f"  participation   {outcome.participation:.1%} of the sites in a committed round",
        f"  faults          {_faults(faults, outcome.seconds)}",
        f"  heartbeats      {_silence(outcome.longest_silence)}",
        f"  shared state    {outcome.state_sha256[:16] or '-'}",
        "",
        f"  {'site':<{width}}{'starts':>7}{'steps':>8}{'utilisation':>13}{'committed':>11}{'failed':>8}{'healed':>8}{'sent':>13}",
    ]
    for site in outcome.sites:
        records = [record for _, record in site.rounds]
        failed, healed = sum(not each.committed for each in records), sum(each.healed for each in records)
        lines.append(
            f"  {site.name:<{width}}{site.lives:>7}{site.steps:>8}{site.utilisation:>13.1%}{site.committed:>11}{failed:>8}"
            f"{healed:>8}{bytes_text(site.sent_bytes):>13}" + (f"   ended: {site.error}" if site.error else "")
        )
    failures = list(_failures(outcome.sites))
    if failures:
        lines += ["", "  rounds that were not committed", *(f"    {line}" for line in failures)]
    return "\n".join(lines)


def plain(file: str, outcome: Outcome) -> dict[str, Any]:
    """The outcome for JSON."""
    return {
        "file": file,
        "seconds": outcome.seconds,
        "finished": outcome.finished,
        "utilisation": outcome.utilisation,
        "participation": outcome.participation,
        "state_sha256": outcome.state_sha256,
        "longest_silence_seconds": outcome.longest_silence,
        "sites": [
            {
                "name": site.name,
                "starts": site.lives,
                "steps": site.steps,
                "utilisation": site.utilisation,
                "committed_rounds": site.committed,
                "failed_rounds": len(site.rounds) - site.committed,
                "sent_bytes": site.sent_bytes,
                "error": site.error,
            }
            for site in outcome.sites
        ],
    }


def refuse_a_run(folder: str | Path, sites: Iterable[str]) -> None:
    """A rehearsal must not write over what a run, or another rehearsal, has left.

    Raises:
        UserError: a site has written into the folder already.
    """
    if any(Path(folder, site, "metrics.jsonl").exists() for site in sites):
        raise UserError(f"--out {folder}: holds a run already; name another folder")


def make_folders(folder: str, sites: Sequence[str]) -> None:
    """Make the sites' folders before the rehearsal, so that it is not in vain where they cannot be made.

    Raises:
        UserError: a site has written there already.
        OSError: naming what cannot be written.
    """
    refuse_a_run(folder, sites)
    for site in sites:
        Path(folder, site).mkdir(parents=True, exist_ok=True)


def write_journals(folder: str, outcome: Outcome) -> None:
    """Write ``metrics.jsonl`` for each site, in virtual time, as training does: for ``titan-ext plan --from``.

    Raises:
        OSError: naming what cannot be written.
    """
    for site in outcome.sites:
        lines = sorted(_lines(site), key=lambda line: line["time"])
        write_whole(Path(folder, site.name, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))


def _lines(site: SiteTrace) -> Iterator[dict[str, Any]]:
    for time, step in site.marks:
        yield {"kind": "step", "step": step, "time": round(time, 6)}
    for time, record in site.rounds:
        yield {"kind": "round", **record.as_dict(), "time": round(time, 6)}


def _faults(faults: Sequence[Fault], end: float) -> str:
    counts = Counter(fault.kind for fault in faults if fault.at <= end)
    late = len(faults) - counts.total()
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    return told + (f"; {late} more would have come after the end" if late else "")


def _silence(seconds: float | None) -> str:
    return "not seen" if seconds is None else f"came at the lighthouse at most {duration_text(seconds)} apart"


def _failures(sites: Sequence[SiteTrace]) -> Iterator[str]:
    """Each failed round once, with the sites that saw it fail."""
    found: dict[tuple[int, str], tuple[float, list[str]]] = {}
    for site in sites:
        for time, record in site.rounds:
            if not record.committed:
                found.setdefault((record.step, record.error or ""), (time, []))[1].append(site.name)
    for (step, error), (time, names) in sorted(found.items(), key=lambda each: each[1][0]):
        yield f"after {duration_text(time)}, inner step {step}: {error} (told by {', '.join(names)})"
