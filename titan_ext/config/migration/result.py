"""What became of an older configuration, and the file that says so."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from titan_ext.config.migration.old_models import SECOND
from titan_ext.config.toml_text import toml_tables

_WIDTH = 118
_ORDER = (
    "dump_folder tokenizer model data training optimizer lr_scheduler parallelism activation_checkpoint compile checkpoint"
    " validator metrics profiler comm debug semi_sync replica"
).split()


@dataclass(slots=True)
class Migration:
    """What became of a file."""

    tree: dict[str, Any] = field(default_factory=dict)
    """Our tables."""

    sites: list[dict[str, Any]] = field(default_factory=list)
    """The ``[[site]]`` tables."""

    era: str = SECOND
    blanks: dict[str, str] = field(default_factory=dict)
    """What has to be filled in, by dotted key."""

    homeless: list[str] = field(default_factory=list)
    """Keys that were left out, and why."""

    changed: list[str] = field(default_factory=list)
    """What is not quite the same."""

    harmless: list[str] = field(default_factory=list)
    """Keys that were left out and change nothing."""

    def text(self, source: str) -> str:
        """The new file.

        Args:
            source: name of the old one.
        """
        lines = [f"# {source}, a configuration of torchtitan {self.era}, as titan-ext migrate wrote it over."]
        for title, entries in (
            ("To fill in, see below:", list(self.blanks)),
            ("Without a home here, and left out:", self.homeless),
            ("Not quite the same here:", self.changed),
        ):
            if entries:
                lines += ["#", f"# {title}", *(f"#   {_one_line(each)}" for each in entries)]
        if self.harmless:
            lines += ["#", "# Left out, at values that change nothing:", *_wrapped(self.harmless)]
        comments = {key: f"TO FILL IN: {_one_line(why)}" for key, why in self.blanks.items()}
        order = [*_ORDER, *(key for key in self.tree if key not in _ORDER)]
        lines += ["", *toml_tables({key: self.tree[key] for key in order if key in self.tree}, comments)]
        for site in self.sites:
            lines += ["", "[[site]]", *toml_tables(site, comments)]
        return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wrapped(names: list[str]) -> Iterator[str]:
    line = "#  "
    for place, name in enumerate(names):
        word = f" {name}" + ("," if place + 1 < len(names) else "")
        if len(line) + len(word) > _WIDTH:
            yield line
            line = "#  "
        line += word
    yield line
