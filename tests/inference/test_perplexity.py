"""Perplexity against its definition, and the text it is measured on."""

import math

import pytest
import torch

from tests.models.abbie_models import VOCABULARY, build
from titan_ext.config import load_site
from titan_ext.errors import UserError
from titan_ext.inference.perplexity import Measurement, measure
from titan_ext.inference.text import evaluation_text

ROWS, LENGTH = 3, 20


def batches(rows_together: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Packed documents of 7 tokens, of which a sequence may begin within one."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randint(0, VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).remainder(7).expand(ROWS, LENGTH)
    whole = (inputs, positions, labels)
    pieces = zip(*(each.split(rows_together) for each in whole))
    return [({"input": tokens, "positions": places}, targets) for tokens, places, targets in pieces]


@pytest.mark.parametrize("name, iterations", [("llama3", None), ("abbie", 1), ("abbie", 4)])
def test_loss_is_the_mean_over_tokens_of_documents_read_alone(name, iterations):
    model = build(name)
    chosen = {} if iterations is None else {"iterations": iterations}
    total = 0.0
    for inputs, labels in batches(1):
        for tokens, targets in zip(inputs["input"][0].split(7), labels[0].split(7)):
            positions = torch.arange(len(tokens))[None]
            masks = model.get_attention_masks(positions)
            odds = model(tokens[None], positions, masks, **chosen)[0].double().log_softmax(-1)
            total -= sum(odds[place, target].item() for place, target in enumerate(targets))
    found = measure(model, batches(2), iterations)
    assert (found.iterations, found.tokens) == (iterations, ROWS * LENGTH)
    assert found.loss == pytest.approx(total / (ROWS * LENGTH), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / (ROWS * LENGTH)), rel=1e-4)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    assert Measurement(None, 1e4, 1, 1.0).perplexity == math.inf


def test_held_out_text_is_what_training_never_reads(config_file, text_corpus):
    site = load_site(config_file)
    text = evaluation_text(site, None, 10**6, batch_size=4)
    assert "10.00% of the documents" in text.description
    held = {bytes(row.tolist()[:40]) for inputs, _ in text.batches for row in starts(inputs)}
    documents = {path.read_bytes()[:40] for path in text_corpus.glob("*.txt")}
    trained = site.config.dataloader.build(
        dp_world_size=1, dp_rank=0, tokenizer=site.config.tokenizer.build(), seq_len=64, local_batch_size=1
    )
    seen = {bytes(row.tolist()[:40]) for _, (inputs, _) in zip(range(3000), trained) for row in starts(inputs)}
    assert held and held <= documents and seen and not held & seen


def starts(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The text after each mark of a document's beginning that has 40 bytes in its sequence."""
    return [
        row[place + 1 : place + 41]
        for row in inputs["input"]
        for place in (row == 256).nonzero().flatten().tolist()
        if place + 41 <= len(row)
    ]


def test_tokens_are_counted_by_sequences_and_batches_may_be_short(config_file):
    text = evaluation_text(load_site(config_file), None, 64 * 4 + 1, batch_size=2)
    assert text.tokens == 64 * 5
    assert [len(labels) for _, labels in text.batches] == [2, 2, 1]
    again = evaluation_text(load_site(config_file), None, 64 * 2, batch_size=2)
    assert torch.equal(again.batches[0][1], text.batches[0][1])


def test_named_text_is_read_whole(config_file, text_corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("never seen. " * 20)
    site = load_site(config_file)
    text = evaluation_text(site, str(other), 10**6, batch_size=1)
    assert text.description == f"{other}, all documents" and text.tokens == 3 * 64
    assert "the site trains on it" in evaluation_text(site, str(text_corpus), 64, batch_size=1).description


def test_validation_data_of_the_run_comes_first(config_file):
    flags = ["--validator.enable", "--validator.dataloader.dataset=builtin:docs"]
    text = evaluation_text(load_site(config_file, overrides=flags), None, 64, batch_size=1)
    assert text.description == "builtin:docs, the run's validation data"


def test_text_that_was_trained_on_is_not_taken_for_held_out(config_file):
    with pytest.raises(UserError, match='--corpus is missing: site "a" trains on all documents'):
        evaluation_text(load_site(config_file, overrides=["--data.split=all"]), None, 64, batch_size=1)
    recorded = {"data": {"split": "train", "holdout_fraction": 0.05}}
    with pytest.raises(UserError, match=r"data.holdout_fraction = 0.1: was 0.05 in training"):
        evaluation_text(load_site(config_file), None, 64, batch_size=1, trained_with=recorded)
