"""New tables for a trained body: random as at the start, the body untouched (invariants 10 and 11 of the paper)."""

import pytest
import torch

from tests.models.abbie_models import initialised
from titan_ext.dept.tables import renew_tables, tables_of, with_rows
from titan_ext.models import get_model_spec
from titan_ext.models.dept import decouple

ROWS, NEW_ROWS = 64, 200


def model(tied: bool):
    spec = get_model_spec("llama3", "tiny", vocab_size=ROWS, n_layers=2, enable_weight_tying=tied)
    return initialised(decouple(spec, ROWS - 3).model)


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_stays_and_the_tables_are_as_at_the_start(tied):
    trained = model(tied)
    for table in tables_of(trained).values():
        table.data.fill_(1e3)
    body = {name: value.clone() for name, value in trained.named_parameters() if name not in tables_of(trained)}
    renew_tables(trained, NEW_ROWS, seed=3)
    now = dict(trained.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in body.items())
    fresh = tables_of(initialised(with_rows(model(tied).config, NEW_ROWS)))
    assert tables_of(trained).keys() == fresh.keys() and now.keys() - body.keys() == fresh.keys()
    for name, table in tables_of(trained).items():
        assert table.shape == fresh[name].shape == (NEW_ROWS, 96)
        torch.testing.assert_close(table.std(), fresh[name].std(), rtol=0.05, atol=0)
        assert table.abs().max() < 6 * fresh[name].std()
    assert (trained.lm_head.weight is trained.tok_embeddings.weight) == tied


def test_the_seed_decides_and_no_other_draw_is_disturbed():
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        one = model(tied=False)
        state = torch.get_rng_state()
        renew_tables(one, NEW_ROWS, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        tables.append(one.tok_embeddings.weight)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_the_new_tables_are_of_use_to_the_whole_softmax():
    trained = model(tied=True)
    renew_tables(trained, NEW_ROWS, seed=0)
    tokens, positions = torch.randint(0, NEW_ROWS, (2, 8)), torch.arange(8).expand(2, 8)
    logits = trained(tokens, positions, trained.get_attention_masks(positions))
    assert logits.shape == (2, 8, NEW_ROWS) and logits.isfinite().all()
