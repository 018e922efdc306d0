"""Which of a corpus's files hold its training, validation and test documents, by their names.

The words are those of Hugging Face's datasets library, set off by anything but letters, in the name of a file or of a
folder below the corpus.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from titan_ext.data.corpora.files import CorpusFile, ending
from titan_ext.data.order import Split
from titan_ext.errors import UserError

_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![a-z])")


def split_of(relative: str) -> str | None:
    """``train``, ``validation`` or ``test``, by the last word for one in a path; None where there is none."""
    words = _WORD.findall(relative.lower())
    return _SPLIT_OF[words[-1]] if words else None


def choose_split(
    files: Sequence[CorpusFile], root: Path, split: Split, holdout_fraction: float, name: str
) -> tuple[list[CorpusFile], Counter[str]]:
    """The files of a split, and how many files of other splits are left out.

    Names count only where they tell files apart. With a hold-out, which is a part of the training documents,
    ``validation`` begins from the training files as ``train`` does.

    Args:
        files: all of the corpus.
        root: what their names are relative to.
        split: what is asked for.
        holdout_fraction: as in the loader's config.
        name: what the user called the corpus, for messages.

    Raises:
        UserError: files of several splits and none asked for, or none of the one asked for.
    """
    named = _named(files, root)
    present = Counter(named)
    if split == "validation" and holdout_fraction == 0:
        wanted = next((each for each in ("validation", "test") if each in present), None)
        if wanted is None or len(present) == 1:
            raise UserError(
                f"data.holdout_fraction = {holdout_fraction!r}: must be above 0 where split = 'validation' and no files of "
                f"data = {name!r} are called so"
            )
    elif split == "all" or len(present) == 1:
        return list(files), Counter()
    elif split == "auto":
        if present.keys() <= {"train", None}:
            return list(files), Counter()
        raise UserError(
            f"data = {name!r}: holds files of several splits ({_counts(present)}): data.split = 'train' takes those of "
            "training, 'all' takes everything; or name the files with a glob"
        )
    else:
        wanted = "train" if "train" in present else None
        if wanted not in present:
            raise UserError(
                f"data = {name!r}: no files of split 'train' there ({_counts(present)}); name them with a glob"
            )
    pairs = list(zip(files, named, strict=True))
    kept = [file for file, word in pairs if word == wanted]
    return kept, Counter(
        f"{ending(file.path)} ({word or 'no split in its name'})" for file, word in pairs if word != wanted
    )


def held_back(files: Sequence[CorpusFile], root: Path) -> str | None:
    """The split, not that of training, as which every file is named; None where some are not."""
    words = set(_named(files, root))
    return words.pop() if len(words) == 1 and not words & {"train", None} else None


def _named(files: Sequence[CorpusFile], root: Path) -> list[str | None]:
    found = [_split_of_file(file, root) for file in files]
    # A text may well be about tests; its name says what it is for only where most texts are named so, one for training.
    pairs = list(zip(files, found, strict=True))
    texts = Counter(word for file, word in pairs if file.format == "text")
    if "train" in texts and len(texts.keys() - {None}) > 1 and 2 * texts[None] <= texts.total():
        return found
    return [None if file.format == "text" else word for file, word in pairs]


def _split_of_file(file: CorpusFile, root: Path) -> str | None:
    if file.format == "text" and not file.unpacked_name.lower().endswith((".txt", ".text")):
        return None
    return split_of("/".join(file.path.parts[len(root.parts) :]))


def _counts(present: Counter[str | None]) -> str:
    return ", ".join(
        f"{count} {word or 'without one'}" for word, count in sorted(present.items(), key=lambda each: str(each[0]))
    )
