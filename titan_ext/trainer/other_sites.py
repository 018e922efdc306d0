"""A site without a checkpoint of its own begins with what another site's checkpoint holds of the shared state."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.tools.logging import logger

from titan_ext.checkpoint_place import files_below
from titan_ext.errors import UserError
from titan_ext.object_store import is_url
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.resuming import Shapes, flattened, stored_shapes
from titan_ext.trainer.site_reader import SiteReader
from titan_ext.trainer.whole_checkpoints import Files


def checkpoints_beside(folder: str, dump_folder: str) -> list[str]:
    """The finished checkpoints of the other sites whose places lie beside a site's own, the newest first.

    Args:
        folder: of the site's checkpoints; a URL, or one in its dump folder.
        dump_folder: the site's.

    Raises:
        UserError, ReadError: an object store cannot be read.
    """
    own = Path(dump_folder).name
    if is_url(folder):
        root, below = os.path.dirname(os.path.dirname(folder)), os.path.basename(folder)
        names: Iterable[str] = files_below(root)
    else:
        root, below = str(Path(dump_folder).parent), os.path.relpath(folder, dump_folder)
        names = (str(path.relative_to(root)) for path in Path(root).glob(f"*/{below}/step-*/.metadata"))
    pattern = re.compile(rf"^([^/]+)/{re.escape(below)}/step-(\d+)/\.metadata$")
    found = [(int(match[2]), match[1]) for name in names if (match := pattern.match(name))]
    return [f"{root}/{site}/{below}/step-{step}" for step, site in sorted(found, reverse=True) if site != own and step]


def take_shared_state(reader: SiteReader, checkpoints: Sequence[str], outer: SemiSync, model: ModelWrapper) -> str:
    """Take over what the first of some checkpoints that can be read holds of the shared state. A collective.

    Args:
        reader: of the site.
        checkpoints: of other sites.
        outer: the site's outer loop, which has not joined yet.
        model: the site's.

    Raises:
        UserError: none of them can be taken.

    Returns:
        the one that was.
    """
    problem: str | None = None
    for checkpoint in checkpoints:
        files = reader.files(checkpoint)
        problem = reader.problem(checkpoint, files) or _take(reader, checkpoint, files, outer, model)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is passed over: %s", checkpoint, problem)
    raise UserError(
        f"replica.heal_from_checkpoints = true: none of the other sites' checkpoints can be taken ({checkpoints[0]} and "
        f"older; {problem}): set it to false to join sites that train, or to begin anew"
    )


def _take(reader: SiteReader, checkpoint: str, files: Files | None, outer: SemiSync, model: ModelWrapper) -> str | None:
    """In words why a checkpoint cannot be taken."""
    own = model.state_dict()
    try:
        shared, names = outer.shared_checkpoint()
        if apart := sorted({*names} - own.keys()):  # several tensors as one, which the model's checkpoint has apart
            raise ValueError(f"{apart[0]} is shared, and in no checkpoint under this name")
    except ValueError as error:
        raise UserError(f"replica.heal_from_checkpoints = true: {error}: set it to false") from None
    wanted = {name: own[name] for name in names} | {"semi_sync": shared}
    shapes = reader.look(checkpoint, lambda: stored_shapes(checkpoint))
    if problem := next(filter(None, SiteRanks().gather(_lacking(wanted, shapes))), None):
        return problem
    reader.read(wanted, checkpoint, files)
    model.load_state_dict(wanted)
    outer.take_shared_checkpoint(wanted["semi_sync"])
    return None


def _lacking(wanted: Mapping[str, Any], stored: Shapes) -> str | None:
    shapes = {key: shape for name, value in wanted.items() for key, shape in flattened(name, value)}
    missing = sorted(key for key, shape in shapes.items() if stored.get(key, "nothing") != shape)
    return f"it does not hold {missing[0]} of this site's shape" if missing else None
