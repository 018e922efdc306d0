"""Where a run goes on in its corpus, and whether that is still the corpus in which it stopped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from titan_ext.data.progress import Progress
from titan_ext.errors import UserError

OnChangedData = Literal["error", "continue"]

_RANKS = frozenset({"dp_world_size", "num_workers"})
_DEALING = _RANKS | {"share_index", "share_count"}
"""Settings that say who reads which documents, not which documents there are and in what order."""
_OF_TEXT = frozenset({"text_key", "tokenizer", "marks", "vocabulary"})
"""Settings that change texts or their tokens, not which documents come when."""
_DIGESTS = {"content": "the documents and their order", "tokenizer": "its file"}
_SHOWN_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class Resumption:
    """How to go on."""

    progress: Progress | None
    """Where the site had come to, for readers who are not those of the state; None: each goes on at its own place."""
    notes: list[str]
    """What has changed, and what that means."""


def resume(
    saved: Mapping[str, Any], now: Mapping[str, Any], progress: Progress | None, on_changed_data: OnChangedData
) -> Resumption:
    """How loaders of the settings ``now`` go on with the state of loaders of the settings ``saved``.

    With other ranks or workers the site goes on at its first unfinished document; if the corpus is dealt to another
    number of sites, at the same part of the epoch. A setting that ``saved`` does not know is not compared.

    Args:
        saved: settings of the state.
        now: those of the loader.
        progress: where the state's readers had come to; None where places are not positions.
        on_changed_data: as in the loader's config.

    Raises:
        UserError: another corpus, order or tokenizer; names what changed.
    """
    changes = {
        key: changed(key, saved[key], value) for key, value in now.items() if key in saved and saved[key] != value
    }
    notes = []
    if "dataset" in changes and saved.get("content") is not None and "content" not in changes:
        notes.append(f"{changes.pop('dataset')}: the same documents, elsewhere")
    texts = changes.keys() - _DEALING
    if texts:
        # A place in a stream is a place in its files, and other files have no such place.
        can_continue = progress is not None or texts <= _OF_TEXT
        if on_changed_data == "error" or not can_continue:
            raise _refusal(changes.values(), can_continue)
        notes.append(
            f"{'; '.join(changes[key] for key in sorted(texts))}: going on all the same (data.on_changed_data)"
        )
    dealing = changes.keys() & _DEALING
    if not dealing:
        return Resumption(None, notes)
    if progress is None:
        raise _refusal(changes.values(), can_continue=False)
    if not dealing <= _RANKS:
        progress = progress.shared_among(saved["share_count"], now["share_count"])
    where = f"going on at {progress}"
    return Resumption(progress, [*notes, f"{'; '.join(changes[key] for key in sorted(dealing))}: {where}"])


def changed(key: str, before: Any, now: Any) -> str:
    """A changed setting in words; of a digest, the first characters."""
    if key not in _DIGESTS:
        return f"{key} was {before!r}, is {now!r}"
    return f"{key} ({_DIGESTS[key]}) was {str(before)[:_SHOWN_CHARACTERS]}…, is {str(now)[:_SHOWN_CHARACTERS]}…"


def _refusal(changes: Iterable[str], can_continue: bool) -> UserError:
    go_on = ", go on all the same with data.on_changed_data = 'continue'" if can_continue else ""
    return UserError(
        f"data: the checkpoint's place in the corpus is of other settings ({'; '.join(changes)}); restore them{go_on}, "
        "or start the corpus anew with checkpoint.exclude_from_loading = ['dataloader']"
    )
