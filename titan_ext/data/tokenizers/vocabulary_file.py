"""One vocabulary for all ranks of a site, found by one of them."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.error_text import unwritable


def site_vocabulary(path: str | Path, find: Callable[[], Vocabulary], *, tokenizer: BaseTokenizer) -> Vocabulary:
    """The vocabulary in a file, which one process of the machine finds and writes if it is not there.

    The others wait for it; if it dies, one of them takes over. A file that is there is used as it is,
    whatever has become of the corpus: what a site has trained belongs to these ids.

    Args:
        path: the file.
        find: reads the site's documents.
        tokenizer: the global tokenizer.

    Raises:
        UserError: the file is of another tokenizer, not a vocabulary, or cannot be written.
    """
    path = Path(path)
    if not path.exists():
        with _alone(path):
            if not path.exists():
                find().save(path)
    vocabulary = Vocabulary.load(path)
    vocabulary.check(tokenizer, path)
    return vocabulary


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Stays: a process that waits for a lock file that another removes would hold a lock of its own.
        lock = open(path.with_name(path.name + ".lock"), "wb")
    except OSError as error:
        raise unwritable(f"vocabulary = {str(path)!r}", error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: each process finds the same vocabulary
        yield
