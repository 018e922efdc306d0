"""The tokenizers of a comparison: one of all sites' languages, what each language holds of it, and each one's own."""

from itertools import chain
from pathlib import Path

from titan_ext.data.corpora.corpus import open_corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.data.tokenizers.vocabulary import find_vocabulary
from titan_ext.experiments.dept.arms import Vocabulary
from titan_ext.experiments.dept.settings import Settings

TRAINING, VALIDATION = "train*", "valid*"
_JOINT, _OWN, _TRIMMED = "joint", "own", "trimmed"


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
    feeds = {
        language: open_text(settings, language, TRAINING) for language in (*settings.languages, settings.unseen)
    }
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
    train_tokenizer((text for _, text in documents), tokens, folder)


def _trimmed(folder: Path, language: str) -> Path:
    return folder / _TRIMMED / f"{language}.json"
