"""``titan-ext dept embed`` on the checkpoints of real runs."""

from pathlib import Path

import pytest
import torch

from tests.dept.conftest import VOCABULARY
from titan_ext.cli import main
from titan_ext.config import load_site
from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.dept.tables import tables_of
from titan_ext.export.trained import trained_model
from titan_ext.inference.checkpoint import find_checkpoint
from titan_ext.inference.model import load_model


def embedded(config: Path, out: Path, *flags: str):
    """The model of the folder that the command makes, as a central run of the same body reads it."""
    tokenizer = next((flag.partition("=")[2] for flag in flags if flag.startswith("--tokenizer=")), "byte")
    assert main(["dept", "embed", str(config), f"--out={out}", "--tokenizer=byte", *flags]) == 0
    site = load_site(config, "a", [f"--tokenizer={tokenizer}", "--dept.variant=none"])
    return load_model(site, find_checkpoint(str(out), out))


def body(model) -> dict[str, torch.Tensor]:
    return {name: each for name, each in model.named_parameters() if name not in tables_of(model)}


@pytest.mark.parametrize("flags", [[], ["--body-site=b"], ["--embedding=sites"]])
def test_the_body_is_what_the_sites_agreed_on_last(spec_opt, tmp_path, flags):
    """Step 4 was each site's own."""
    found = body(embedded(spec_opt, tmp_path / "out", *flags))
    for name in ("a", "b"):
        site = load_site(spec_opt, name)
        agreed, own = body(trained_model(site, weights="global")), body(trained_model(site))
        assert all(torch.equal(found[key], agreed[key]) for key in found)
        assert not any(torch.equal(found[key], own[key]) for key in found)


def test_a_random_embedding_is_tied_and_holds_nothing_of_the_sites(spec_opt, tmp_path):
    tables = [embedded(spec_opt, tmp_path / str(seed), f"--seed={seed}").tok_embeddings.weight for seed in (0, 1)]
    own = trained_model(load_site(spec_opt, "a")).tok_embeddings.weight
    for table in tables:
        assert table.std().item() == pytest.approx(96**-0.5, rel=0.05)
        assert (torch.cosine_similarity(table[:259], own[:259]).abs() < 0.6).all()
    assert not torch.equal(*tables)


def test_tokens_of_different_tokenizers_are_found_by_their_strings(spec_opt, tokenizer_folder, tmp_path, capsys):
    flags = ["--embedding=sites", f"--tokenizer={tokenizer_folder}"]
    model = embedded(spec_opt, tmp_path / "out", *flags)
    assert model.lm_head.weight is model.tok_embeddings.weight
    own = [trained_model(load_site(spec_opt, name), weights="global").tok_embeddings.weight for name in ("a", "b")]
    bpe, byte = build_tokenizer(str(tokenizer_folder)), ord("A")
    both = bpe.encode("A", add_bos=False, add_eos=False)[0]
    table = model.tok_embeddings.weight
    torch.testing.assert_close(table[both], (own[0][byte] + own[1][both]) / 2)
    torch.testing.assert_close(table[bpe.eos_id], (own[0][ByteTokenizer().eos_id] + own[1][bpe.eos_id]) / 2)
    assert torch.equal(table[VOCABULARY - 1], own[1][VOCABULARY - 1])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "42"] in lines and ["2", "259"] in lines


def test_rows_of_trimmed_tables_are_found_by_their_ids(trim, tokenizer_folder, tmp_path):
    """The sites have averaged them by row: their common rows are equal already."""
    model = embedded(trim, tmp_path / "out", "--embedding=sites", f"--tokenizer={tokenizer_folder}")
    for name in ("a", "b"):
        own = trained_model(load_site(trim, name), weights="global").tok_embeddings.weight
        ids = Vocabulary.load(trim.parent / name / "vocabulary.json").ids
        assert 3 < len(ids) < VOCABULARY
        torch.testing.assert_close(model.tok_embeddings.weight[ids], own[: len(ids)])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokenizer=nowhere"], "tokenizer = 'nowhere': no such folder"),
        (["--tokenizer=byte", "--body-site=c"], 'no site "c"'),
        (["--tokenizer=byte", "--step=9"], 'site "a": no finished checkpoint in'),
    ],
)
def test_bad_input_is_one_line(spec_opt, tmp_path, capsys, arguments, words):
    assert main(["dept", "embed", str(spec_opt), f"--out={tmp_path / 'out'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_trimmed_site_is_not_exported(trim, tmp_path, capsys):
    assert main(["export", str(trim), "--site=a", f"--out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'site "a": its vocabulary is trimmed' in line and "dept embed --embedding sites" in line
