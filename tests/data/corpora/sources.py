"""Small corpora, and loaders built as torchtitan builds them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow

from titan_ext.data import ByteTokenizer, TextDataLoader

BOS, EOS = 256, 257

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
"""What compresses content, by the ending of files."""


def write_lines(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    """Writes documents as JSONL."""
    path.write_text("".join(json.dumps({key: text, "source": "test"}) + "\n" for text in texts), encoding="utf-8")
    return path


def build_loader(
    dataset: object, *, rank: int = 0, world: int = 1, seq_len: int = 32, batch: int = 2, **config: Any
) -> TextDataLoader:
    """A loader of the byte tokenizer; ``config`` are fields of its Config."""
    return TextDataLoader.Config(dataset=str(dataset), **config).build(
        dp_world_size=world,
        dp_rank=rank,
        tokenizer=ByteTokenizer(),
        seq_len=seq_len,
        local_batch_size=batch,
        snapshot_every_n_steps=1,
    )


def flat(batch: Any) -> tuple[list[int], list[int], list[int]]:
    """Inputs, labels and positions of a batch, as lists of its sequences one after the other."""
    inputs, labels = batch
    return inputs["input"].flatten().tolist(), labels.flatten().tolist(), inputs["positions"].flatten().tolist()


def documents_in(batches: Iterable[Any]) -> list[str]:
    """Texts that are whole within the batches, in order."""
    stream: list[int] = []
    for batch in batches:
        inputs, labels, _ = flat(batch)
        for token, label in zip(inputs, labels):
            # A document's end mark is a label only.
            stream += [token, EOS] if label == EOS else [token]
    found: list[str] = []
    begin = None
    for place, token in enumerate(stream):
        if token == BOS:
            begin = place
        elif token == EOS and begin is not None:
            found.append(bytes(stream[begin + 1 : place]).decode())
    return found
