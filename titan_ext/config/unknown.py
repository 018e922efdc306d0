"""What a key may have been meant to be that nobody knows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from titan_ext.config.findings import SettingError
from titan_ext.config.migration.old_keys import OLD_SECTIONS, find
from titan_ext.config.renamed import renamed_key
from titan_ext.config.settings import Settings, hint
from titan_ext.errors import nearest

_MOST_HOMES = 3


def unknown_key(
    settings: Settings,
    section: str,
    name: str,
    allowed: Iterable[str],
    homes: Mapping[str, list[str]],
    given: Any = None,
) -> SettingError:
    """The complaint about a key that its section does not have.

    A new name of ours comes first, then what an older torchtitan meant by it, the same name elsewhere, a similar one here.

    Args:
        settings: for the wording; its findings learn which key is in doubt.
        section: dotted; empty at the top of the file.
        name: the key.
        allowed: keys of the section.
        homes: dotted keys of all sections by their last part.
        given: the key's value.
    """
    dotted = f"{section}.{name}" if section else name
    renamed = renamed_key(dotted, given)
    if renamed is not None:
        return settings.error(dotted, renamed)
    known = list(allowed)
    meant, problem = meant_by(section, name, known, homes)
    if settings.findings is not None:
        settings.findings.doubt(*meant)
    error = settings.error(dotted, f"unknown key; {problem}")
    error.of_older_torchtitan = find(dotted) is not None
    return error


def meant_by(section: str, name: str, allowed: list[str], homes: Mapping[str, list[str]]) -> tuple[list[str], str]:
    """The dotted keys that an unknown one may mean, and the advice; arguments as those of ``unknown_key``."""
    here, prefix = (f"{section}.{name}", f"{section}.") if section else (name, "")
    old = find(here)
    if old is not None:
        return list(old.keys), old.advice
    same = [home for home in homes.get(name, []) if home != here]
    same = [home for home in same if prefix and home.startswith(prefix)] or same
    if same:
        return same, f"did you mean {' or '.join(same[:_MOST_HOMES])}?"
    without = _without_section(section, name)
    if without in allowed:
        return [f"{prefix}{without}"], f"did you mean {without}? (allowed: {', '.join(allowed)})"
    close = nearest(name, allowed)
    if close is None and (elsewhere := nearest(name, homes)) is not None:
        return homes[elsewhere], f"did you mean {' or '.join(homes[elsewhere][:_MOST_HOMES])}?"
    return [f"{prefix}{close}"] if close else [], hint(name, allowed) if allowed else "there is none of that name"


def _without_section(section: str, name: str) -> str:
    """``enable_checkpoint`` in ``[checkpoint]`` is ``enable``."""
    words = section.rpartition(".")[2].split("_")
    return "_".join(word for word in name.split("_") if word not in words)


def unknown_section(
    settings: Settings, name: str, allowed: Iterable[str], homes: Mapping[str, list[str]]
) -> list[SettingError]:
    """The complaints about a table that is no section: one, or one for each key that an older torchtitan had there."""
    close = nearest(name, allowed)
    if settings.findings is not None and close is not None and close not in settings.tree:
        settings.findings.doubt(f"{close}.")
    if name not in OLD_SECTIONS:
        return [settings.error(name, f"unknown section; {hint(name, allowed)}")]
    keys = list(_leaves(settings.tree[name], name))
    split = [key.rpartition(".") for key in keys]
    return [unknown_key(settings, section, last, (), homes) for section, _, last in split] or [
        settings.error(name, "a section of an older torchtitan; leave it out")
    ]


def _leaves(table: Mapping, prefix: str) -> Iterator[str]:
    for key, value in table.items():
        dotted = f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, dotted)
        else:
            yield dotted
