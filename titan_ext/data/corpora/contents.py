"""What of a folder's files is a corpus: its documents, apart from what lies beside them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_ext.data.corpora.files import ALLOWED, CorpusFile, classify, count_endings
from titan_ext.data.corpora.splits import split_of
from titan_ext.error_text import unreadable
from titan_ext.errors import UserError

_CARD = re.compile(
    r"(readme|license|licence|copying|citation|contributing|changelog|notice|dataset_?card)\b", re.IGNORECASE
)
_METADATA = frozenset(
    "dataset_info.json dataset_infos.json dataset_dict.json state.json config.json generation_config.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json".split()
)
_SCRIPT = re.compile(
    rb"GeneratorBasedBuilder|ArrowBasedBuilder|load_dataset\(|snapshot_download|\.tofile\(|np\.memmap|import tiktoken|"
    rb"requests\.get\(|urlretrieve\("
)
_MOST_SCRIPTS = 20
"""A folder with more programs than this is itself one, not a dataset with its script."""
_TOKEN_SUFFIXES = frozenset(".bin .idx .npy .npz .ds .mmap".split())
_ARCHIVE_SUFFIXES = frozenset(".zip .tar .tgz .7z .rar".split())
_SHOWN = 3


@dataclass(slots=True)
class Contents:
    """A folder's documents and what is left out of them."""

    files: list[CorpusFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are not read, by ending and why."""


def documents_of(
    files: Sequence[CorpusFile], unknown: Sequence[Path], root: Path, name: str, has_text: Callable[[CorpusFile], bool]
) -> Contents:
    """The files that hold documents.

    Beside records or tokens, a dataset's card and the script that made it are no documents; beside texts, JSON and CSV
    are only where they have a text. What is only a card and a script is no corpus at all.

    Args:
        files: of a known format.
        unknown: the others.
        root: the folder, whose own Python files may be a dataset's scripts.
        name: what the user called it, for messages.
        has_text: whether a file of JSON or CSV has the text's key.

    Raises:
        UserError: nothing there can be meant.
    """
    tokens = [path for path in unknown if path.suffix.lower() in _TOKEN_SUFFIXES]
    made = any(split_of(path.name) or path.with_suffix(".idx") in tokens for path in tokens)
    aside = {file: what for file in files if (what := _beside(file)) is not None}
    aside |= dict.fromkeys(_scripts([file for file in files if file not in aside], root, made), "a script")
    metadata = {file: "metadata" for file in files if file.path.name in _METADATA}
    texts = [file for file in files if file.format == "text" and file not in aside]
    tabular = [file for file in files if file.format in ("json", "csv") and file not in metadata]
    if texts:
        textless = {file: "has no text" for file in tabular if not has_text(file)}
        metadata |= textless
    records = [file for file in files if file.format != "text" and file not in metadata]
    left_out = metadata | (aside if records or made or not texts else {})
    kept = [file for file in files if file not in left_out]
    if not kept:
        raise UserError(f"data = {name!r}: {_nothing(tokens, list(left_out.items()), unknown)}")
    found = Contents(kept, count_endings(unknown))
    found.left_out.update(f"{file.path.name} ({what})" for file, what in left_out.items())
    return found


def without_cards(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths or URLs of corpora, and those of them that are only the card of the others, by their names as in a folder."""
    kinds = {name: classify(Path(name)) for name in names}
    cards = [name for name, file in kinds.items() if file is not None and _beside(file) is not None]
    rest = [name for name in names if name not in cards]
    texts = [name for name in rest if (file := kinds[name]) is not None and file.format == "text"]
    return (rest, cards) if len(texts) < len(rest) else (list(names), [])


def _beside(file: CorpusFile) -> str | None:
    """What a file is that lies beside documents, by its name."""
    if file.format == "text" and _CARD.match(file.path.stem):
        return "a dataset card" if file.path.stem.lower().startswith(("readme", "dataset")) else "no document"
    return None


def _scripts(files: Sequence[CorpusFile], root: Path, made_tokens: bool) -> list[CorpusFile]:
    """Programs at the root that fetch or make a dataset: by what is in them; all of them beside training tokens."""
    programs = [file for file in files if file.path.suffix.lower() in (".py", ".sh")]
    if len(programs) > _MOST_SCRIPTS:
        return []
    return [file for file in programs if file.path.parent == root and (made_tokens or _SCRIPT.search(_read(file.path)))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _nothing(tokens: Sequence[Path], left_out: Sequence[tuple[CorpusFile, str]], unknown: Sequence[Path]) -> str:
    """Why a folder is no corpus."""
    if tokens:
        return f"{_some(tokens)} hold tokens or arrays, which are not read; give the text that they were made from"
    if left_out:
        named = ", ".join(f"{file.path.name} ({what})" for file, what in left_out[:_SHOWN])
        return f"no documents there, only {named}; fetch the data itself, or name a single file to train on that"
    archives = [path for path in unknown if not _ARCHIVE_SUFFIXES.isdisjoint(map(str.lower, path.suffixes))]
    if archives:
        return f"{_some(archives)}: archives are not read; unpack them"
    return f"no file of a known format there; allowed: {ALLOWED}"


def _some(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:_SHOWN])
    return names + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
