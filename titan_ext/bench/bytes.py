"""Bytes that each method sends, by the shapes of a model that is never allocated.

Every figure is what ``titan-ext check`` predicts (the ring all-reduce's formula), which the ledger of a real run
matches; here for a 1.7B-parameter model of DES-LOC's paper and four sites of one rank each.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError

HELP = "bytes a step of each method against data parallelism, by formula"

_MODEL = {"dim": 2048, "n_layers": 24, "n_heads": 16, "ffn_dim": 8192, "vocab_size": 50304}
_METHODS: list[tuple[str, str, dict[str, str]]] = [
    # label, semi_sync settings, optimizer settings
    ("FedAvg / DiLoCo", 'method = "diloco"', {}),
    ("Local Adam", 'method = "local_adam"', {}),
    ("DES-LOC, 3x and 6x", 'method = "des_loc"', {}),
    ("MT-DAO, one momentum", 'method = "mt_dao"', {"name": '"QHAdamW"'}),
    ("LoRDO", 'method = "lordo"', {"name": '"LowRankAdamW"', "rank": "{rank}", "basis_from": '"outer"'}),
    ("DiLoCo, int8", 'method = "diloco"\ncodec = "int8"', {}),
    ("DiLoCo, int4", 'method = "diloco"\ncodec = "int4"', {}),
    ("NoLoCo", 'method = "noloco"', {}),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the run."""
    parser.add_argument("--sites", type=int, default=4, help="number of sites (default: 4)")
    parser.add_argument("--sync-every", default="32,256", help="periods, comma-separated (default: 32,256)")
    parser.add_argument("--rank", type=int, default=256, help="LoRDO's rank (default: 256)")
    for key, value in _MODEL.items():
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=int, default=value, help=f"of the model (default: {value})"
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print a table for each period, and return its rows.

    Raises:
        UserError: an option is out of range.
    """
    periods = _checked(options)
    rows = []
    for period in periods:
        costs = [(label, _cost(options, period, method, inner)) for label, method, inner in _METHODS]
        cost = costs[0][1]
        local_adam = next(each.bytes_per_step for label, each in costs if label == "Local Adam")
        print(f"\n{cost.parameters / 1e9:.2f}B parameters, {options.sites} sites, synced every {period} steps")
        print(f"{'method':<24}{'MB a step':>12}{'less than DDP':>15}{'of Local Adam':>15}")
        print(f"{'DDP':<24}{cost.every_step_bytes / 1e6:>12,.1f}{1:>14.1f}x{cost.every_step_bytes / local_adam:>15.3f}")
        for label, each in costs:
            less, share = each.every_step_bytes / each.bytes_per_step, each.bytes_per_step / local_adam
            print(f"{label:<24}{each.bytes_per_step / 1e6:>12,.2f}{less:>14.1f}x{share:>15.3f}")
            rows.append(
                {
                    "method": label,
                    "sync_every": period,
                    "bytes_per_step": each.bytes_per_step,
                    "less_than_ddp": round(less, 2),
                    "of_local_adam": round(share, 4),
                }
            )
    print("\nDDP: fp32 gradients of every step; low-rank DDP sends the same, its gradients being whole")
    return {"parameters": cost.parameters, "sites": options.sites, "rows": rows}


def _cost(options: argparse.Namespace, period: int, method: str, inner: dict[str, str]) -> Any:
    from titan_ext.config import load_site, site_cost

    optimizer = "".join(f"{key} = {value.format(rank=options.rank)}\n" for key, value in inner.items())
    model = "".join(f"{key} = {getattr(options, key)}\n" for key in _MODEL)
    sites = "".join(f'[[site]]\nname = "site{index}"\ndata = "builtin:code"\n' for index in range(options.sites))
    # As many steps as bring every period of the methods round: 6 is DES-LOC's longest.
    text = f"""
[model]
name = "llama3"
flavor = "125M"
{model}
[training]
steps = {6 * period}
[optimizer]
{optimizer}
[semi_sync]
{method}
sync_every = {period}
{sites}
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.toml"
        path.write_text(text)
        return site_cost(load_site(path, "site0"))


def _checked(options: argparse.Namespace) -> list[int]:
    try:
        periods = [int(each) for each in options.sync_every.split(",")]
    except ValueError:
        periods = []
    if not periods or min(periods) < 1:
        raise UserError(f"--sync-every {options.sync_every}: must be numbers of at least 1, such as 32,256")
    if options.sites < 2:
        raise UserError(f"--sites {options.sites}: must be at least 2")
    if options.rank < 1:
        raise UserError(f"--rank {options.rank}: must be at least 1")
    return periods
