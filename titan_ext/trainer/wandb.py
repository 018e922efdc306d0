"""What Weights & Biases is told of a site: torchtitan passes on what stands in the environment."""

import os
import secrets
from pathlib import Path

from titan_ext.files import write_whole

_ID_FILE = "wandb_run_id"


def name_wandb_run(dump_folder: str) -> None:
    """Name the run by site and the group by run, and let a site that comes back go on with its own curve.

    What the user set in the environment stays.

    Args:
        dump_folder: of the site, inside that of the run; keeps the id of its W&B run.
    """
    folder = Path(dump_folder).absolute()
    os.environ.setdefault("WANDB_RUN_NAME", f"{folder.parent.name}/{folder.name}")
    os.environ.setdefault("WANDB_RUN_GROUP", folder.parent.name)
    if "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"] = _kept_id(folder)
        os.environ.setdefault("WANDB_RESUME", "allow")


def _kept_id(folder: Path) -> str:
    file = folder / _ID_FILE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8").strip()
