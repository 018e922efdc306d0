"""A corpus of three made-up languages, and ``titan-ext bench dept`` on it at toy size."""

import json
import random

import pytest

LANGUAGES, UNSEEN = ("latin", "greek"), "cyrillic"
_LETTERS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "cyrillic": "абвгдежз"}
SIZES = {
    "dim": 32,
    "layers": 1,
    "vocab_size": 600,
    "joint_vocab_size": 700,
    "steps": 4,
    "sync_every": 2,
    "batch": 2,
    "length": 16,
    "continued_steps": 2,
    "adapt_steps": 2,
}
FLAGS = [flag for key, value in SIZES.items() for flag in (f"--{key.replace('_', '-')}", str(value))]


def _write_language(folder, letters: str) -> None:
    words = random.Random(letters)
    vocabulary = ["".join(words.choices(letters, k=words.randint(2, 6))) for _ in range(400)]
    folder.mkdir()
    for name, documents in (("train", 12), ("valid", 4)):
        texts = [" ".join(words.choices(vocabulary, k=120)) for _ in range(documents)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for language, letters in _LETTERS.items():
        _write_language(folder / language, letters)
    return folder


@pytest.fixture(scope="session")
def command(corpus) -> list[str]:
    chosen = ["--corpus", str(corpus), "--languages", ",".join(LANGUAGES), "--unseen", UNSEEN]
    return ["bench", "dept", *chosen, *FLAGS, "--seeds", "1", "--learning-rates", "1e-2", "--workers", "1"]
