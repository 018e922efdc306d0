"""From a run's file to the file of its rehearsal: the same run, on one machine."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from titan_ext.config.source import read_file
from titan_ext.error_text import unwritable
from titan_ext.lab.report import refuse_a_run

_ELSEWHERE = {
    "replica": (
        *("hostname", "interface", "lighthouse", "region_lighthouse", "manager_port", "state_port"),
        *("tls_certificate", "tls_key", "tls_authority"),
    ),
    "metrics": ("serve_port", "enable_wandb"),
}
"""What speaks of other machines, or of names that the rehearsal's sites do not have, by section."""
_OF_NODES = ("rendezvous_port", "nodes", "nproc_per_node")
_FILE = "rehearsal.json"


def derive(
    path: str, folder: Path, *, copies: int | None, addresses: Sequence[str], ranks: Sequence[int], streams: int | None
) -> str:
    """Write the file of a rehearsal into its folder.

    Args:
        path: of the run's file.
        folder: in which the sites' folders will be.
        copies: that many of the file's first site; None: the file's sites.
        addresses: of the sites.
        ranks: of the sites, each on one node.
        streams: connections for each pair of ranks; None: as the file says, or by the distance.

    Returns:
        The path of the new file.

    Raises:
        UserError: there is a run in the folder already, or it cannot be written to.
    """
    tables = deepcopy(read_file(path))
    sites = tables.get("site") or [{"name": "site0"}]
    if copies is not None:
        first = {key: value for key, value in sites[0].items() if key not in ("index", "count")}
        sites = [{**deepcopy(first), "name": f"site{place}"} for place in range(copies)]
    for table in (tables, *sites, *_tables(tables.get("region", []))):
        for section, keys in _ELSEWHERE.items():
            if isinstance(table.get(section), dict):
                table[section] = {key: value for key, value in table[section].items() if key not in keys}
        for key in _OF_NODES:
            table.pop(key, None)
    for site, address, count in zip(sites, addresses, ranks, strict=True):
        site.pop("dump_folder", None)
        site["nproc"] = count
        site.setdefault("replica", {})["hostname"] = address
        if streams is not None:
            site.setdefault("semi_sync", {})["streams"] = streams
    refuse_a_run(folder, [site["name"] for site in sites])
    tables |= {"site": sites, "dump_folder": str(folder)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(json.dumps(tables, indent=2), encoding="utf-8")
    except OSError as error:
        raise unwritable(f"--out {error.filename}", error) from None
    return str(folder / _FILE)


def _tables(found: Any) -> Iterator[dict[str, Any]]:
    """Those of a list of tables, whatever else a file may have put there."""
    return (each for each in found if isinstance(each, dict)) if isinstance(found, list) else iter(())
