"""``config.json``: what a folder says of its model, as far as every architecture has it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ext.error_text import reason
from titan_ext.errors import UserError
from titan_ext.files import write_whole

FILE_NAME = "config.json"
_ADAPTER = "adapter_config.json"


def read_description(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's ``config.json``; None where it has none.

    Raises:
        UserError: it cannot be read, or the folder is an adapter's.
    """
    path = folder / FILE_NAME
    if (folder / _ADAPTER).exists():
        raise UserError(f"{folder / _ADAPTER}: is of an adapter, not a model: merge it into its base model first")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be one JSON object that describes a model")
    return content


def write_description(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a folder's ``config.json``.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / FILE_NAME, json.dumps(content, indent=2) + "\n")
