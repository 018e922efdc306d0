"""What a vocabulary of its own saves a site, against the whole table of the global tokenizer (DEPT's GLOB)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.data.tokenizers.trimmed import has_unknown_row
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.launcher.text import bytes_text, columns, number_text

ROW_MULTIPLE = 64
"""Tables are padded to it: shapes that tensor cores take."""

_TRAINED_BYTES = 16
_WIRE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyReport:
    """A site's vocabulary in numbers."""

    site: str
    data: str
    tokenizer: str
    global_vocabulary: int
    """Ids of the tokenizer."""
    vocabulary: int
    """Ids that the site holds, special ones included."""
    share: float
    """Of the global vocabulary."""
    tokens: int
    """Tokens of the documents that the site trains on."""
    coverage: float
    """Share of these tokens that the vocabulary holds; below 1 only with a minimum count."""
    held_out: str | None
    """What the validation split is; None where the site has none."""
    held_out_tokens: int | None
    out_of_vocabulary: float | None
    """Share of the validation split's tokens that the vocabulary lacks."""
    rows: int
    """Rows of the site's table: the vocabulary, the unknown token's row, padding."""
    global_rows: int
    """Rows of GLOB's table, padded too."""
    parameters_saved: int | None
    """Of the model, both tables counted where embedding and head are not tied; None without a model."""
    memory_bytes_saved: int | None
    """16 bytes a parameter: weight, gradient and Adam's two moments in fp32."""
    round_bytes_saved: int | None
    """Of a whole table in fp32, each way: a site sends and receives the rows of its vocabulary alone."""


def report(
    site: str,
    data: str,
    spec: str,
    tokenizer: BaseTokenizer,
    vocabulary: Vocabulary,
    held_out: tuple[str, torch.Tensor] | None,
    row_parameters: int | None,
) -> VocabularyReport:
    """The numbers of one site.

    Args:
        site: its name.
        data: its corpus, as the user calls it.
        spec: its global tokenizer, as the user calls it.
        tokenizer: that one.
        vocabulary: found in its training documents.
        held_out: what its validation split is, and the ``[total]`` counts of its tokens.
        row_parameters: parameters that a token has in the model's tables.
    """
    rows = _padded(len(vocabulary) + has_unknown_row(tokenizer, vocabulary))
    global_rows = _padded(vocabulary.total)
    saved = None if row_parameters is None else (global_rows - rows) * row_parameters
    unsent = None if row_parameters is None else (global_rows - len(vocabulary)) * row_parameters
    return VocabularyReport(
        site=site,
        data=data,
        tokenizer=spec,
        global_vocabulary=vocabulary.total,
        vocabulary=len(vocabulary),
        share=len(vocabulary) / vocabulary.total,
        tokens=int(vocabulary.counts.sum()),
        coverage=1.0 - vocabulary.share_outside(vocabulary.counts),
        held_out=held_out[0] if held_out else None,
        held_out_tokens=int(held_out[1].sum()) if held_out else None,
        out_of_vocabulary=vocabulary.share_outside(held_out[1]) if held_out else None,
        rows=rows,
        global_rows=global_rows,
        parameters_saved=saved,
        memory_bytes_saved=None if saved is None else saved * _TRAINED_BYTES,
        round_bytes_saved=None if unsent is None else unsent * _WIRE_BYTES,
    )


def render(reports: Sequence[VocabularyReport]) -> str:
    """The reports as a table with what its columns mean."""
    head = [
        "site",
        "global",
        "vocabulary",
        "share",
        "coverage",
        "out of vocab.",
        "rows",
        "under GLOB",
        "parameters saved",
        "memory saved",
        "a round saves",
    ]
    rows = [
        [
            each.site,
            f"{each.global_vocabulary:,}",
            f"{each.vocabulary:,}",
            f"{each.share:.1%}",
            f"{each.coverage:.2%}",
            number_text(each.out_of_vocabulary, ".3%"),
            f"{each.rows:,}",
            f"{each.global_rows:,}",
            number_text(each.parameters_saved, ",d"),
            bytes_text(each.memory_bytes_saved),
            bytes_text(each.round_bytes_saved),
        ]
        for each in reports
    ]
    return "\n".join([*columns([head, *rows]), "", *_notes(reports)])


def _notes(reports: Sequence[VocabularyReport]) -> list[str]:
    notes = [
        f"{each.site}: {each.data}, tokenizer {each.tokenizer}, {each.tokens:,} tokens; validation: "
        + (f"{each.held_out}, {each.held_out_tokens:,} tokens" if each.held_out else "none, no document is held out")
        for each in reports
    ]
    return notes + [
        f"rows: padded to a multiple of {ROW_MULTIPLE}; memory: {_TRAINED_BYTES} bytes a parameter (weight, gradient, "
        "two Adam moments in fp32); a round: each way, fp32, against GLOB"
    ]


def _padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
