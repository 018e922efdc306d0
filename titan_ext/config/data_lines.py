"""What a site reads of the data that the user named, in a line for each corpus."""

from typing import Any

from titan_ext.data.corpora.listing import NotThere
from titan_ext.errors import UserError


def data_lines(site: Any, *, must_be_here: bool) -> list[str]:
    """The files that are read and those that are not, by ending and count, of the training and validation data.

    Args:
        site: a ``Site``.
        must_be_here: whether data that is not on this machine is an error; else a line says so.

    Raises:
        UserError: naming the key, where what is there cannot be meant.
    """
    corpora = {"data": site.config.dataloader}
    if site.config.validator.enable:
        corpora["validator.dataloader"] = site.config.validator.dataloader
    lines = []
    for key, data in corpora.items():
        try:
            lines.append(f"{site.name}: {key} {data.listing()}")
        except UserError as error:
            problem = str(error).removeprefix(f"data = {data.dataset!r}: ")
            if must_be_here or not isinstance(error, NotThere):
                raise site.settings.error(f"{key}.dataset", problem, data.dataset) from None
            lines.append(f"{site.name}: {key} {data.dataset} is not on this machine: {problem}")
    return lines
