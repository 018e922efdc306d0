"""Trains a byte-level BPE tokenizer that torchtitan's HuggingFaceTokenizer reads.

Byte-level BPE, as GPT-2's and Llama 3's: any text can be encoded, in whatever script.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|padding|>"
SMALLEST_VOCABULARY = 256 + 3
"""All bytes and the three marks."""

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Makes the folder, before the work that fills it.

    Raises:
        UserError: a tokenizer is there and is not to be overwritten, or the folder cannot be written.
    """
    if (folder / TOKENIZER_FILE).exists() and not overwrite:
        raise UserError(f"--out {str(folder)!r}: holds a {TOKENIZER_FILE}; give --force to overwrite it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(folder)!r}: cannot make the folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {str(folder)!r}: the folder cannot be written")


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path, *, progress: bool = False) -> int:
    """Trains on texts and writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        texts: The documents.
        vocabulary: Tokens wanted, with bytes and marks.
        folder: Where the files go; must exist.
        progress: Whether to draw the library's progress bars on stderr.

    Returns:
        Tokens of the vocabulary; fewer than wanted where the texts hold no more pairs to merge.

    Raises:
        UserError: the vocabulary is below 259, or the folder cannot be written.
        RunError: its disk is full.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocabulary}: must be at least {SMALLEST_VOCABULARY} (256 bytes and 3 marks)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    try:
        write_whole(folder / CONFIG_FILE, json.dumps(_config(), indent=2) + "\n")
        write_whole(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))  # last: it is what makes a tokenizer
    except OSError as error:
        raise unwritable(f"--out {str(folder)!r}", error) from None
    return tokenizer.get_vocab_size()


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
