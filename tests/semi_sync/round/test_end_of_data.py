"""Sites that read their data once: each gives all its work exactly once, and all end together."""

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites


def weight() -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({each: torch.nn.Linear(2, 1, bias=False) for each in "01"})
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def run(steps_of_site: list[int], most: int = 60, **settings):
    """Each site adds 1 for so many inner steps, then has no more data; where and with what each ends."""

    def body(index, own):
        model, records = weight(), []
        outer = outer_loop(model, [], own, on_round=records.append, **settings)
        outer.join()
        step = taken = 0
        while step < most and not outer.run_is_over:
            step += 1
            if not outer.sits_out and taken == steps_of_site[index]:
                outer.end_of_data()
            if not outer.sits_out:
                taken += 1
                for parameter in model.parameters():
                    parameter.data += 1.0
            outer.step(tokens=0 if outer.sits_out else 1)
        outer.finish()
        values = [value.item() for part in outer.global_parameters().values() for value in part.flatten()]
        return step, values, [record.participants for record in records], outer.shared_state_sha256()

    results = run_sites(len(steps_of_site), body)
    assert len({step for step, *_ in results}) == 1, "all end at one inner step"
    assert len({digest for *_, digest in results}) == 1
    return results[0]


def test_each_contributes_its_last_steps_once_and_no_more():
    """Rounds every 4 steps. Sites of 6 and 13 steps: means of (4, 4), (2, 4), then of (4) and (1) alone."""
    step, values, participants, _ = run([6, 13], method="local_sgd", sync_every=4)
    assert values == pytest.approx([4 + 3 + 4 + 1] * 4)
    assert participants == [2, 2, 1, 1, 0] and step == 20


def test_a_round_weighs_by_the_tokens_that_a_site_still_had():
    step, values, _, _ = run([6, 13], method="local_sgd", sync_every=4, weighting="tokens")
    assert values == pytest.approx([4 + (2 * 2 + 4 * 4) / 6 + 4 + 1] * 4)
    assert step == 20


@pytest.mark.parametrize("steps", [[3], [3, 3], [8, 4, 1]])
def test_all_end_together_whatever_each_had(steps):
    step, _, participants, _ = run(steps, method="local_sgd", sync_every=4)
    assert step == 4 * (-(-max(steps) // 4) + 1)
    assert participants[0] == len(steps) and participants[-1] == 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="diloco", sync_every=4, num_fragments=2),
        dict(method="diloco", sync_every=6, num_fragments=2, fragment_sync_delay=2, fragment_update_alpha=0.5),
        dict(method="eager_diloco", sync_every=4),
        dict(method="noloco", sync_every=4),
        dict(method="sparta", sync_every=4, settings={"sparta": {"sparta_fraction": 0.5}}),
        dict(method="diloco", sync_every=4, codec="int8"),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method_ends_early_and_equal(settings):
    step, values, _, _ = run([6, 13], **settings)
    assert 13 < step < 60 and all(value > 0 for value in values)


def test_fragments_are_each_brought_once():
    """Local SGD in two halves, an inner step apart from each other: both end as whole means of what each site did."""
    _, values, _, _ = run([4, 8], method="local_sgd", sync_every=4, num_fragments=2)
    # The first half meets after steps 2, 6 and 10, the second after 4, 8 and 12.
    assert sorted(values) == pytest.approx(sorted([2 + (2 + 4) / 2 + 2] * 2 + [4 + 4] * 2))


def test_a_site_that_has_data_left_is_not_ended_by_the_others():
    step, values, participants, _ = run([2, 1000], most=12, method="local_sgd", sync_every=4)
    assert step == 12 and values == pytest.approx([3 + 4 + 4] * 4) and participants == [2, 1, 1]


def test_what_is_owed_is_remembered_by_a_checkpoint():
    def body(index, own):
        model = weight()
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=4)
        outer.join()
        outer.step()
        outer.end_of_data()
        saved = outer.state_dict()
        fresh = outer_loop(weight(), [], own, method="local_sgd", sync_every=4, register=False)
        fresh.load_state_dict(saved)
        return fresh.sits_out, fresh._participation.all_sent

    assert run_sites(1, body) == [(True, False)]
