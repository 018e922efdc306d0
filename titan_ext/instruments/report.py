"""The page with runs frozen into it: one file that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from titan_ext.instruments.comparison import compare
from titan_ext.instruments.server import page

_EMPTY = '<script type="application/json" id="frozen">null</script>'


def report(shots: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The HTML of a report.

    Args:
        shots: of the runs, whose names differ.
        configs: of a site of each run, by the run's name, as far as they are known.
    """
    by_name = {shot["name"]: shot for shot in shots}
    frozen = {"runs": list(shots), "comparison": compare(by_name, configs) if len(shots) > 1 else None}
    # What stands in a script element ends at "</", whatever is around it.
    text = (
        json.dumps(frozen, separators=(",", ":"), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    )
    before, _, after = page().partition(_EMPTY)
    return before + _EMPTY.replace("null", text) + after
