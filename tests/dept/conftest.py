"""Two sites that have trained one body with vocabularies of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.forked import lighthouse, start_site
from titan_ext.data.tokenizers.bpe import train_tokenizer

# Tokens of the tokenizer that the sites may have in common.
VOCABULARY = 301

RUN = """
dump_folder = "FOLDER"
[dept]
variant = "VARIANT"
[model]
name = "dept"
flavor = "tiny"
n_layers = 2
[training]
seq_len = 64
local_batch_size = 2
steps = 4
[optimizer]
lr = 3e-3
[metrics]
enable_tensorboard = false
[checkpoint]
enable = true
[semi_sync]
sync_every = 3
[replica]
min_sites = 2
[data]
dataset = "CORPUS"
split = "train"
holdout_fraction = 0.2
[[site]]
name = "a"
tokenizer = "byte"
[[site]]
name = "b"
tokenizer = "TOKENIZER"
"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, text_corpus) -> Path:
    """A BPE tokenizer of the whole corpus."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_corpus.glob("*.txt"))]
    assert train_tokenizer(texts, VOCABULARY, folder) == VOCABULARY
    return folder


@pytest.fixture(scope="session")
def train(tmp_path_factory, text_corpus, tokenizer_folder) -> Callable[..., Path]:
    """Trains two sites under a variant, one step further than their last round; returns their file."""

    def run(variant: str) -> Path:
        folder = tmp_path_factory.mktemp(variant)
        text = RUN.replace("VARIANT", variant).replace("FOLDER", str(folder)).replace("CORPUS", str(text_corpus))
        if variant != "spec-opt":
            text = text.replace('"byte"', '"TOKENIZER"')
        config = folder / "run.toml"
        config.write_text(text.replace("TOKENIZER", str(tokenizer_folder)))
        with lighthouse(2) as url:
            sites = [start_site(config, name, 1, url) for name in ("a", "b")]
            for site in sites:
                assert site.wait() == [0], site.log()[-3000:]
        return config

    return run


@pytest.fixture(scope="session")
def spec_opt(train) -> Path:
    """Site a of bytes, site b of byte-level BPE: no embedding has left its site."""
    return train("spec-opt")


@pytest.fixture(scope="session")
def trim(train) -> Path:
    """Both sites with the part of one tokenizer that their documents use, shared by row."""
    return train("trim")
