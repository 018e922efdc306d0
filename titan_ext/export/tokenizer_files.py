"""A tokenizer's files, as Hugging Face's libraries name them."""

import json
import shutil
from pathlib import Path

from titan_ext.data.tokenizers.bpe import BOS, CONFIG_FILE, EOS, PAD, TOKENIZER_FILE
from titan_ext.data.tokenizers.byte_tokenizer import BYTES
from titan_ext.files import write_whole

_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)


def write_tokenizer(folder: Path, assets: str) -> None:
    """Copy the tokenizer's files from its folder; write those that the byte tokenizer has not.

    Args:
        folder: where to.
        assets: the tokenizer's own folder; empty for "byte".
    """
    if not assets:
        _write_byte_tokenizer(folder)
        return
    for name in _FILES:
        if (Path(assets) / name).is_file():
            shutil.copyfile(Path(assets) / name, folder / name)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level BPE vocabulary, as in GPT-2's.

    Bytes that are visible Latin-1 characters stand for themselves, the others are counted up from U+0100.
    """
    hidden = iter(range(BYTES, 2 * BYTES))
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return [chr(byte if byte in visible else next(hidden)) for byte in range(BYTES)]


def _write_byte_tokenizer(folder: Path) -> None:
    """Byte-level BPE that never merges: the same ids as ``ByteTokenizer``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (BOS, EOS, PAD)])
    tokenizer.save(str(folder / TOKENIZER_FILE))
    marks = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **marks, "clean_up_tokenization_spaces": False}
    write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
