"""torchtitan's tokenizer, read from a Hugging Face folder so that no text is lost and every mark is found."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer, decoders, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_ext.data.tokenizers.marks import CONFIG_FILE, content, find_marks, new_marks, read_json
from titan_ext.error_text import reason
from titan_ext.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
BPE_FILES = ("vocab.json", "merges.txt")
WORD_PIECE_FILE = "vocab.txt"
FILES = ((TOKENIZER_FILE,), BPE_FILES, (WORD_PIECE_FILE,))
"""What makes a tokenizer, best first."""
_UNKNOWN = "[UNK]"
_END_OF_WORD = "</w>"


class FolderTokenizer(HuggingFaceTokenizer):
    """As torchtitan's, but for what harms the text of a training corpus.

    Truncation, padding and merges left out at random, which a ``tokenizer.json`` may have been saved with, are off.
    Marks are found in every file that names them. Added tokens that are no marks, such as runs of blanks, are text and
    are decoded as such. Chat templates, which play no part in training text, are not looked at.

    Args:
        config: Has no fields.
        tokenizer_path: Folder with tokenizer.json, or vocab.json and merges.txt (GPT-2's BPE), or vocab.txt (BERT's
            WordPiece).

    Raises:
        ValueError: a file is not what it should be.
        UserError: the tokenizer cannot split every text.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        pass

    # What torchtitan reads in place of a template.
    CHAT_TEMPLATE_FILE = os.devnull

    def __init__(self, config: Config | None = None, *, tokenizer_path: str) -> None:
        self.notes: list[str] = []
        """What a user should know of the folder."""
        self.fingerprint = ""
        """sha256 of what splits text: of tokenizer.json, or of the files in its place."""
        super().__init__(config, tokenizer_path=tokenizer_path)
        if self.eos_id is None and not self.tokenizer.encode("").ids:
            self.notes.append(
                f"it marks no text's end, so documents run into each other; name its mark in {CONFIG_FILE} as eos_token"
            )

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """As torchtitan's.

        Raises:
            UnsplittableText: the tokenizer's model cannot split the text.
        """
        try:
            return super().encode(*args, **kwargs)
        except TypeError:
            raise  # what was given is no text
        except Exception as error:  # the tokenizers library raises bare Exception
            raise self._unsplittable(error) from error

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, in parallel, with the marks that the library's own template adds, and no others.

        Raises:
            UnsplittableText: as ``encode``.
        """
        try:
            return [each.ids for each in self.tokenizer.encode_batch_fast(list(texts))]
        except Exception as error:  # as above
            raise self._unsplittable(error) from error

    def _unsplittable(self, error: Exception) -> "UnsplittableText":
        return UnsplittableText(f"tokenizer = {self.tokenizer_path!r}: cannot split a document: {reason(error)}")

    def set_chat_template(self, template: Any) -> None:
        """Nothing: templates are lists, or not Jinja that compiles here, and no text of a corpus needs one."""

    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Tokenizer:
        folder = Path(tokenizer_path)
        names = files_of(folder)
        self.fingerprint = _fingerprint(folder, names)
        if names == BPE_FILES:
            self._check_bytes(folder)
            tokenizer = _byte_level(folder)
        else:
            tokenizer = _word_piece(folder) if names == FILES[-1] else super()._load_tokenizer_from_path(tokenizer_path)
        self._check_model(tokenizer)
        self._switch_off(tokenizer)
        return tokenizer

    def _load_config(self, config_path: str) -> dict[str, Any]:
        """The content of tokenizer_config.json, with the marks that only other files name."""
        path = Path(config_path)
        config = read_json(path) or {}
        marks, notes = find_marks(path.parent, config, self.tokenizer)
        self.notes += [*notes, *new_marks(config, self.tokenizer)]
        return config | marks

    _hf_config: dict[str, Any]

    def _infer_special_tokens(self) -> None:
        declared: Mapping[str, Any] = self._hf_config.get("added_tokens_decoder") or {}
        entries = {int(place): entry for place, entry in declared.items() if content(entry) is not None}
        self._add_missing(entries)
        # The base class makes marks of all that it finds here, and marks are left out of decoded text.
        special = {str(place): entry for place, entry in entries.items() if entry.get("special")}
        self._hf_config = self._hf_config | {"added_tokens_decoder": special}
        super()._infer_special_tokens()

    def _add_missing(self, entries: Mapping[int, Mapping[str, Any]]) -> None:
        """Add tokens that only tokenizer_config.json has, in the order of their ids."""
        known = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        for place in sorted(entries):
            token = content(entries[place])
            if token not in known:
                traits = {
                    name: bool(entries[place].get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")
                }
                self.tokenizer.add_tokens([AddedToken(token, special=bool(entries[place].get("special")), **traits)])
            if (found := self.tokenizer.token_to_id(token)) != place:
                self.notes.append(f"the token {token!r} has the id {found}, while {CONFIG_FILE} says {place}")

    def _check_model(self, tokenizer: Tokenizer) -> None:
        """Refuse a model that cannot split every text; note one that loses some."""
        model, kind = tokenizer.model, type(tokenizer.model).__name__
        unknown = getattr(model, "unk_token", None)
        if kind in ("WordPiece", "WordLevel") and unknown not in tokenizer.get_vocab(with_added_tokens=False):
            problem = (
                f"its {kind} vocabulary has no token for unknown words ({unknown!r}), so some texts cannot be split"
            )
            if kind == "WordPiece":
                raise UserError(f"{problem}; add one")
            self.notes.append(problem)
        elif kind == "Unigram" and json.loads(tokenizer.to_str())["model"].get("unk_id") is None:
            self.notes.append(
                "its Unigram vocabulary has no token for unknown characters, so some texts cannot be split"
            )
        elif kind == "BPE" and unknown is None and not model.byte_fallback and not _is_byte_level(tokenizer):
            self.notes.append(
                "it knows neither bytes nor an unknown token: characters outside its vocabulary are left out"
            )

    def _check_bytes(self, folder: Path) -> None:
        """Refuse vocab.json and merges.txt that are not as GPT-2's."""
        vocabulary = (read_json(folder / BPE_FILES[0]) or {}).keys()
        if any(token.endswith(_END_OF_WORD) for token in vocabulary):
            raise UserError(
                f"{' and '.join(BPE_FILES)} are of no byte-level BPE: tokens end in {_END_OF_WORD}; convert them"
            )
        if missing := len({*ByteLevel.alphabet()} - vocabulary):
            self.notes.append(f"{BPE_FILES[0]} lacks {missing} of the 256 bytes, which are left out of every text")

    def _switch_off(self, tokenizer: Tokenizer) -> None:
        """Whatever would cut, pad or vary a text."""
        if tokenizer.truncation is not None:
            self.notes.append(
                f"truncation to {tokenizer.truncation['max_length']} tokens, on in {TOKENIZER_FILE}, is off"
            )
            tokenizer.no_truncation()
        if tokenizer.padding is not None:
            self.notes.append(f"padding, on in {TOKENIZER_FILE}, is off")
            tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            self.notes.append(f"dropout of {tokenizer.model.dropout:g} of its merges, on in {TOKENIZER_FILE}, is off")
            tokenizer.model.dropout = None


class UnsplittableText(UserError):
    """A tokenizer whose model has no token for something in a text."""


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return "ByteLevel" in f"{tokenizer.pre_tokenizer} {tokenizer.normalizer}"


def _byte_level(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from its vocab.json and merges.txt, as torchtitan's but for merges that begin with "#"."""
    # torchtitan takes those for comments and leaves them out, so that "##" would be two tokens.
    tokenizer = Tokenizer(BPE.from_file(*(str(folder / name) for name in BPE_FILES)))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _word_piece(folder: Path) -> Tokenizer:
    """BERT's tokenizer from its vocab.txt, a token a line."""
    config = read_json(folder / CONFIG_FILE) or {}
    lines = (folder / WORD_PIECE_FILE).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    if _UNKNOWN not in lines:
        raise UserError(f"{WORD_PIECE_FILE} has no {_UNKNOWN}: not WordPiece; convert it to {TOKENIZER_FILE}")
    found = BertWordPieceTokenizer(
        {token: place for place, token in enumerate(lines)},
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    return Tokenizer.from_str(found.to_str())


def files_of(folder: Path) -> tuple[str, ...]:
    """The files that the folder's tokenizer is read from."""
    return next((names for names in FILES if all((folder / name).exists() for name in names)), FILES[0])


def _fingerprint(folder: Path, names: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for name in names:
        found.update((folder / name).read_bytes())
    return found.hexdigest()
