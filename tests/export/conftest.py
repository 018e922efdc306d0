"""A run that has ended, with a head of its own or a tied one, and what it exports."""

from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from titan_ext.cli import main
from titan_ext.data.tokenizers.bpe import train_tokenizer

# 301 tokens: the table's rows are 304, three of them padding.
VOCABULARY, ROWS, STEPS = 301, 304, 3

RUN = f"""
[model]
name = "llama3"
flavor = "tiny"
enable_weight_tying = TIED
[training]
seq_len = 64
local_batch_size = 2
steps = {STEPS}
[optimizer]
lr = 3e-3
[metrics]
enable_tensorboard = false
[checkpoint]
enable = true
interval = 1
[semi_sync]
method = "diloco"
sync_every = 2
[[site]]
name = "a"
tokenizer = "TOKENIZER"
data = "CORPUS"
"""


@pytest.fixture(scope="session", params=["tied", "untied"])
def trained_run(request, tmp_path_factory, text_corpus) -> SiteRun:
    """A site alone with checkpoints after steps 1 to 3, of which the second ends with a round."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_corpus.glob("*.txt"))]
    assert train_tokenizer(texts, VOCABULARY, tokenizer) == VOCABULARY
    config = folder / "run.toml"
    text = RUN.replace("TIED", str(request.param == "tied").lower()).replace("TOKENIZER", str(tokenizer))
    config.write_text(text.replace("CORPUS", str(text_corpus)))
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url)
        assert site.wait() == [0], site.log()[-3000:]
    return site


@pytest.fixture(scope="session")
def config_file(trained_run: SiteRun) -> Path:
    """Its run, which knows where it left its checkpoints."""
    config = trained_run.folder / "ended.toml"
    config.write_text(f'dump_folder = "{trained_run.folder}"\n' + (trained_run.folder / "run.toml").read_text())
    return config


@pytest.fixture(scope="session")
def exported(config_file: Path) -> Path:
    """The folder of the latest checkpoint."""
    folder = config_file.parent / "exported"
    assert main(["export", str(config_file), "--out", str(folder)]) == 0
    return folder
