"""Variables of the environment that a library would follow against the configuration, or stumble over."""

import os
import socket
from collections.abc import MutableMapping

from titan_ext.errors import UserError, one_of

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

_OF_TORCHRUN = "PET_"
_INSTEAD = {
    "TORCHFT_TIMEOUT_SEC": "replica.timeout_seconds",
    "TORCHFT_QUORUM_TIMEOUT_SEC": "replica.quorum_timeout_seconds",
    "TORCHFT_CONNECT_TIMEOUT_SEC": "replica.connect_timeout_seconds",
    "TORCHFT_QUORUM_RETRIES": "replica.lighthouse_retries",
}
_CHOICES = {"TORCH_DISTRIBUTED_DEBUG": ("OFF", "INFO", "DETAIL")}
_NUMBER = "TORCHFT_WATCHDOG_TIMEOUT_SEC"
_DOTTED = "TITAN_STRUCT_LOGGER_HANDLERS"


def set_aside(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Take away what torchrun and torchft would read instead of the configuration; returns a note on each variable."""
    notes = []
    for name in sorted(environment):
        if name.startswith(_OF_TORCHRUN):
            instead = "[[site]] and [parallelism] say of what ranks and nodes a site consists"
        elif name in _INSTEAD:
            instead = f"{_INSTEAD[name]} counts"
        else:
            continue
        notes.append(f"the variable {name} = {environment.pop(name)!r} is not read: {instead}")
    return notes


def check_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse values that torch, torchft or Gloo would end with a traceback for.

    Raises:
        UserError: naming the variable, its value and what is allowed.
    """
    for name, allowed in _CHOICES.items():
        value = environment.get(name, allowed[0])
        if value.upper() not in allowed:
            raise UserError(f"the variable {name} = {value!r}: {one_of(value, allowed)}")
    if not (seconds := environment.get(_NUMBER, "30")).isdecimal():
        raise UserError(f"the variable {_NUMBER} = {seconds!r}: must be a whole number of seconds")
    for path in environment.get(_DOTTED, "").split(","):
        if path.strip() and "." not in path:
            raise UserError(
                f"the variable {_DOTTED} = {path!r}: must be dotted paths of functions, separated by commas"
            )
    chosen = environment.get(GLOO_INTERFACE, "")
    known = [name for _, name in socket.if_nameindex()] if chosen else []
    for name in chosen.split(","):
        if name and name not in known:
            raise UserError(f"{GLOO_INTERFACE} = {name}: no such interface; this machine has {', '.join(known)}")
