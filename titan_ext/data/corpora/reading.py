"""Word of how far a long reading has come."""

from collections.abc import Callable, Iterable, Iterator

_MIB = 1 << 20
_EVERY = 16 * _MIB


def with_progress(texts: Iterable[str], tell: Callable[[str], None]) -> Iterator[str]:
    """The texts, with a line to ``tell`` after every 16 MiB of them and at the end."""
    documents = size = reported = 0
    for text in texts:
        documents += 1
        size += len(text.encode("utf-8", "replace"))
        if size - reported >= _EVERY:
            reported = size
            tell(f"read {documents:,} documents, {size / _MIB:.0f} MiB")
        yield text
    tell(f"read {documents:,} documents, {size / _MIB:.1f} MiB in all")
