"""Rows from the sites that hold a token, against plain loops."""

import pytest
import torch

from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer, resolve_tokenizer
from titan_ext.data.tokenizers.vocabulary import find_vocabulary
from titan_ext.dept.merging import RowMeans, tokens_of
from titan_ext.errors import UserError

WIDTH = 4


def table(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_each_row_is_the_mean_over_its_holders():
    ours = ["a", "b", None, "c", "d"]
    sites = [["d", "a", None], ["a", "z", "c", "d"], []]
    start = {name: table(6, seed) for seed, name in enumerate(("embedding", "head"))}
    tables = {name: value.clone() for name, value in start.items()}
    own = [{name: table(5, 10 * number + seed) for seed, name in enumerate(tables)} for number in range(3)]
    means = RowMeans(ours, tables)
    for tokens, held in zip(sites, own, strict=True):
        means.add(tokens, held)
    means.write()
    for name in tables:
        for row in range(6):
            token = ours[row] if row < len(ours) else None
            holders = [site for site, tokens in enumerate(sites) if token is not None and token in tokens]
            held = [own[site][name][sites[site].index(token)] for site in holders]
            expected = sum(held) / len(held) if held else start[name][row]
            torch.testing.assert_close(tables[name][row], expected)
    assert means.holders.tolist() == [2, 0, 0, 1, 2, 0]
    assert all(torch.equal(tables[name][[1, 2, 5]], start[name][[1, 2, 5]]) for name in tables)


def test_all_of_one_tokenizer_is_the_mean_of_the_tables(tokenizer_folder):
    tokens = tokens_of(*resolve_tokenizer(str(tokenizer_folder)))
    merged, own = {"embedding": table(304, 0)}, [table(304, seed) for seed in (1, 2)]
    means = RowMeans(tokens, merged)
    for each in own:
        means.add(tokens, {"embedding": each})
    means.write()
    torch.testing.assert_close(merged["embedding"][:301], (own[0] + own[1])[:301] / 2)


def test_a_trimmed_site_has_its_tokens_where_its_rows_are(tokenizer_folder, tmp_path):
    whole = build_tokenizer(str(tokenizer_folder))
    vocabulary = find_vocabulary(["the sentence"], whole)
    vocabulary.save(tmp_path / "vocabulary.json")
    all_tokens = tokens_of(*resolve_tokenizer(str(tokenizer_folder)))
    own = tokens_of(*resolve_tokenizer(str(tokenizer_folder), str(tmp_path / "vocabulary.json")))
    assert own == [all_tokens[token] for token in vocabulary.ids.tolist()] and len(own) < len(all_tokens)


def test_bytes_are_the_same_tokens_in_byte_level_bpe(tokenizer_folder):
    own, theirs = tokens_of(ByteTokenizer.Config(), ""), tokens_of(*resolve_tokenizer(str(tokenizer_folder)))
    assert set(own) <= set(theirs)
    bpe = build_tokenizer(str(tokenizer_folder))
    for byte in b"Az ~\n":
        assert theirs[bpe.encode(chr(byte), add_bos=False, add_eos=False)[0]] == own[byte]
    assert (theirs[bpe.bos_id], theirs[bpe.eos_id]) == (own[ByteTokenizer().bos_id], own[ByteTokenizer().eos_id])


def test_a_tokenizer_without_strings_is_refused():
    class Other(ByteTokenizer.Config.__mro__[1]):
        def build(self, **kwargs):
            return ByteTokenizer()

    with pytest.raises(UserError, match="the tokens of a ByteTokenizer have no strings"):
        tokens_of(Other(), "")
