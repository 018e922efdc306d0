"""The text of a comparison under each vocabulary, and the tokenizers that these come from."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from titan_ext.data.corpora.corpus import open_corpus
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer, vocabulary_size
from titan_ext.data.tokenizers.unigram import Unigram
from titan_ext.data.tokenizers.vocabulary import Vocabulary as TrimmedVocabulary
from titan_ext.data.tokenizers.vocabulary import find_vocabulary
from titan_ext.experiments.dept.arms import Settings, Vocabulary
from titan_ext.experiments.text import Batch
from titan_ext.semi_sync import TokenRowMap

TRAINING, VALIDATION = "train*", "valid*"
_JOINT, _OWN, _TRIMMED = "joint", "own", "trimmed"
_VALIDATION_SEQUENCES, _TOGETHER = 128, 32
# Packed text of all languages under all vocabularies; it is kept in 32 bits.
_KEPT = 32


class Texts:
    """Packed text of every language under every vocabulary, on the settings' device; a process reads each but once.

    Args:
        settings: those of the comparison.
        folder: what ``make_tokenizers`` wrote into.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder

    def tokens(self, vocabulary: Vocabulary, language: str) -> int:
        """Tokens of a vocabulary."""
        return _tokens(*tokenizer_files(self._folder, vocabulary, language))

    def row_ids(self, language: str, rows: int) -> TokenRowMap:
        """Which rows of the joint vocabulary a table of ``rows`` for the trimmed one has."""
        _, file = tokenizer_files(self._folder, "trimmed", language)
        held = TrimmedVocabulary.load(file)
        return TokenRowMap(held.row_ids(rows), held.total)

    def training(self, vocabulary: Vocabulary, language: str, order: tuple[int, ...], batch: int) -> Iterator[Batch]:
        """Batches without end, each epoch in another order.

        Args:
            vocabulary: which kind.
            language: of those of the comparison.
            order: seeds of the order; equal ones give the same text under the joint and the trimmed vocabulary.
            batch: sequences of a batch.

        Raises:
            UserError: there is not enough text for one.
        """
        sequences = self._packed(vocabulary, language, TRAINING)
        generator = np.random.default_rng(order)
        while True:
            places = torch.from_numpy(generator.permutation(len(sequences.inputs)))
            for chosen in places.split(batch):
                if len(chosen) == batch:
                    yield _chosen(sequences, chosen, self._settings.device)

    def validation(self, vocabulary: Vocabulary, language: str) -> list[Batch]:
        """Equal batches, spread evenly over the documents that are held out."""
        sequences = self._packed(vocabulary, language, VALIDATION)
        found = len(sequences.inputs)
        wanted = max(1, min(found, _VALIDATION_SEQUENCES))
        places = torch.linspace(0, found - 1, wanted).long()
        together = min(wanted, _TOGETHER)
        whole = (chosen for chosen in places.split(together) if len(chosen) == together)
        return [_chosen(sequences, chosen, self._settings.device) for chosen in whole]

    def unigram(self, vocabulary: Vocabulary, language: str) -> Unigram:
        """The unigram model of what a language is trained on."""
        labels = self._packed(vocabulary, language, TRAINING).labels
        return Unigram(torch.bincount(labels.flatten(), minlength=self.tokens(vocabulary, language)))

    def _packed(self, vocabulary: Vocabulary, language: str, files: str) -> Batch:
        spec, trimmed_to = tokenizer_files(self._folder, vocabulary, language)
        return _packed(self._settings, language, files, spec, trimmed_to)


_tokens = lru_cache(maxsize=_KEPT)(vocabulary_size)


@lru_cache(maxsize=_KEPT)
def _packed(settings: Settings, language: str, files: str, spec: str, trimmed_to: str) -> Batch:
    """All sequences of a split, int32."""
    feed = open_text(settings, language, files)
    dataset = PackedTextDataset(feed, build_tokenizer(spec, trimmed_to), settings.length, infinite=False)
    dataset.check(settings.batch * len(settings.languages) if files == TRAINING else 1, workers=0)
    inputs, labels = zip(*dataset)
    packed = ([each["input"] for each in inputs], labels, [each["positions"] for each in inputs])
    return Batch(*(torch.stack(list(each)).int() for each in packed))


def _chosen(sequences: Batch, places: torch.Tensor, device: str) -> Batch:
    return Batch(*(tensor[places].long().to(device) for tensor in sequences))


def open_text(settings: Settings, language: str, files: str) -> CorpusFeed:
    """A language's documents in one order.

    Args:
        settings: those of the comparison.
        language: its folder in the corpus.
        files: ``TRAINING`` or ``VALIDATION``.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    everything = Selection(
        seed=0, shuffle=True, shuffle_buffer=1, split="all", holdout_fraction=0.0, share_index=0, share_count=1
    )
    return CorpusFeed(open_corpus(str(Path(settings.corpus) / language / files)), everything)


def make_tokenizers(settings: Settings, folder: Path) -> None:
    """Train them on the text that is trained on, and write them into an empty folder.

    Raises:
        UserError: a language's documents cannot be read.
    """
    feeds = {language: open_text(settings, language, TRAINING) for language in (*settings.languages, settings.unseen)}
    for language, feed in feeds.items():
        _train([feed], settings.vocab_size, folder / _OWN / language)
    ours = [feeds[language] for language in settings.languages]
    _train(ours, settings.joint_vocab_size, folder / _JOINT)
    joint = build_tokenizer(str(folder / _JOINT))
    for language in settings.languages:
        find_vocabulary(feeds[language], joint).save(_trimmed(folder, language))


def tokenizer_files(folder: Path, vocabulary: Vocabulary, language: str) -> tuple[str, str]:
    """A tokenizer's folder, and the file of the vocabulary that it is trimmed to (empty: it is not).

    Args:
        folder: what ``make_tokenizers`` wrote into.
        vocabulary: which kind.
        language: of those of the comparison.
    """
    if vocabulary == "own":
        return str(folder / _OWN / language), ""
    return str(folder / _JOINT), str(_trimmed(folder, language)) if vocabulary == "trimmed" else ""


def _train(feeds: list[CorpusFeed], tokens: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    documents = chain.from_iterable(feed.read(0, None, 0, 1) for feed in feeds)
    train_tokenizer((document.text for document in documents), tokens, folder)


def _trimmed(folder: Path, language: str) -> Path:
    return folder / _TRIMMED / f"{language}.json"
