"""torchft's privates are touched in one file alone, and nothing of ours hides a name of torchft's by accident."""

import inspect
import re
from pathlib import Path

import pytest
from torchft.manager import Manager

import titan_ext
from titan_ext.replica import Replica
from titan_ext.replica.shutdown.replica import StoppableReplica
from titan_ext.replica.torchft_internals import OpenManager

PRIVATES = set(re.findall(r"(?:self\.|def )(_(?!_)\w+)", inspect.getsource(Manager)))
"""Attributes and methods of torchft's manager that begin with "_"."""


def test_the_compiled_module_is_imported_in_one_file():
    folder = Path(titan_ext.__file__).parent
    found = [path for path in folder.rglob("*.py") if re.search(r"torchft\._torchft", path.read_text())]
    assert found == [folder / "replica" / "torchft_internals.py"]


@pytest.mark.parametrize("manager", [Replica, StoppableReplica])
def test_subclasses_touch_no_private_name_of_the_manager(manager):
    assert {"_client", "_store", "_pg", "_async_quorum"} <= PRIVATES
    touched = set(re.findall(r"(?:self\.|def )(_(?!_)\w+)", inspect.getsource(manager)))
    assert touched & PRIVATES == set()


def test_the_public_names_are_new():
    assert not {name for name in vars(OpenManager) if not name.startswith("_")} & set(dir(Manager))
