"""Regions with a quorum of their own: sites as threads, a lighthouse for all and one for each region."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.lighthouse_page import PATIENCE_SECONDS
from tests.semi_sync.sites import in_background, lighthouse, manager, outer_loop
from titan_ext.semi_sync.wire.ledger import RoundRecord

REGIONS = ("eu", "eu", "us", "us")
SETTINGS: dict[str, Any] = {"method": "diloco", "outer_optimizer": "average", "topology": "regions"}


def run_regions(body: Callable[[int, Any], Any], *, own_quorums: bool = True, **settings: Any) -> list[Any]:
    """``body(index, outer)`` at each site at once, after it has joined; what each returned."""
    with ExitStack() as stack:
        address = stack.enter_context(lighthouse(len(REGIONS)))
        of_region = {region: stack.enter_context(lighthouse(2)) for region in set(REGIONS)}

        def site(index: int) -> Any:
            own = stack.enter_context(manager(address, f"site{index}", len(REGIONS)))

            def make_manager(sites: int) -> Any:
                assert sites == 2
                return stack.enter_context(manager(of_region[REGIONS[index]], f"site{index}", 2))

            model = torch.nn.Linear(3, 2, bias=False)
            model.weight.data.zero_()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            records: list[RoundRecord] = []
            outer = outer_loop(
                model, optimizer, own, name=f"site{index}", labels={"region": REGIONS[index]}, on_round=records.append,
                region_manager=make_manager if own_quorums else None, **SETTINGS | settings,
            )  # fmt: skip
            outer.join()
            outer.model, outer.optimizer, outer.records = model, optimizer, records
            return body(index, outer)

        sites = [in_background(site, index) for index in range(len(REGIONS))]
        return [each.result(2 * PATIENCE_SECONDS) for each in sites]


def take_step(index: int, outer: Any) -> None:
    """A gradient that differs by site and step, towards a target of the site's own."""
    weight = outer.model.weight
    weight.grad = (weight.detach() - torch.arange(6.0).view(2, 3) * (index + 1)) * (0.1 + 0.05 * outer.inner_step)
    outer.optimizer.step()
    outer.step()


def train(index: int, outer: Any) -> tuple[list[torch.Tensor], list[RoundRecord]]:
    values = []
    while outer.inner_step < 8:
        take_step(index, outer)
        values.append(outer.model.weight.detach().clone())
    outer.finish()
    return values, outer.records


@pytest.mark.parametrize("pairing", ["rank", "leader"])
def test_a_quorum_of_its_own_gives_what_the_common_one_gives(pairing: str) -> None:
    settings = {"sync_every": 4, "region_sync_every": 1, "pairing": pairing}
    own = run_regions(train, **settings)
    common = run_regions(train, own_quorums=False, **settings)
    for (values, _), (expected, _) in zip(own, common, strict=True):
        for ours, theirs in zip(values, expected, strict=True):
            assert torch.equal(ours, theirs)
    for values, records in own:
        levels = [(each.level, each.step, each.sites, each.participants, each.committed) for each in records]
        inner = [("region", step, 2, 2, True) for step in range(1, 9) if step % 4]
        outer = [("all", step, 4, 4, True) for step in (4, 8)]
        assert sorted(levels, key=lambda each: each[1]) == sorted(inner + outer, key=lambda each: each[1])
        assert [each.round for each in records if each.level == "all"] == [1, 2]
        assert torch.equal(values[-1], own[0][0][-1])


def test_each_step_of_a_region_is_one_of_its_whole_batch() -> None:
    """Plain SGD, the parameters averaged after each step: the mean gradient of the region's sites."""
    found = run_regions(train, sync_every=100, region_sync_every=1)
    for first in (0, 2):
        weight = torch.zeros(2, 3)
        for step in range(8):
            targets = [torch.arange(6.0).view(2, 3) * (index + 1) for index in (first, first + 1)]
            gradients = [(weight - target) * (0.1 + 0.05 * step) for target in targets]
            weight = weight - 0.5 * (gradients[0] + gradients[1]) / 2
            for values, _ in found[first : first + 2]:
                torch.testing.assert_close(values[step], weight, rtol=1e-6, atol=1e-6)


def test_a_region_does_not_wait_for_another_between_rounds_of_all() -> None:
    """The sites of one region begin only when those of the other have had their three rounds."""
    done = threading.Barrier(3)

    def body(index: int, outer: Any) -> list[tuple[str, int]]:
        if REGIONS[index] == "us":
            begun.wait(PATIENCE_SECONDS)
        while outer.inner_step < 3:
            take_step(index, outer)
        if REGIONS[index] == "eu":
            done.wait(PATIENCE_SECONDS)
        take_step(index, outer)
        outer.finish()
        return [(each.level, each.step) for each in outer.records if each.committed]

    begun = threading.Event()
    waiter = in_background(lambda: (done.wait(PATIENCE_SECONDS), begun.set()))
    found = run_regions(body, sync_every=4, region_sync_every=1)
    waiter.result(1)
    assert found == [[("region", 1), ("region", 2), ("region", 3), ("all", 4)]] * 4


def test_bytes_are_counted_by_level() -> None:
    """In a round of its region a site sends the model once, in an all-reduce between two."""
    found = run_regions(train, sync_every=100, region_sync_every=2)
    for _, records in found:
        assert [each.bytes_sent for each in records if each.level == "region"] == [4 * 6] * 4
        assert all(each.level == "region" for each in records)


def test_a_site_that_misses_a_commit_alone() -> None:
    """Its vote on the round after step 4 fails. Until it has caught up in the next one its region does not average, since its
    sites stand at different commits; and nobody waits in one quorum for a site that waits in another."""

    def body(index: int, outer: Any) -> tuple[list[RoundRecord], str, torch.Tensor]:
        if index == 1:
            own = outer._manager._manager
            own.fail_votes = {own.votes + 1}
        while outer.inner_step < 12:
            take_step(index, outer)
        outer.finish()
        return outer.records, outer.shared_state_sha256(), outer.model.weight.detach().clone()

    found = run_regions(body, sync_every=4, region_sync_every=1)
    assert len({sha256 for _, sha256, _ in found}) == 1
    assert all(torch.equal(weight, found[0][2]) for *_, weight in found)
    for index, (records, *_) in enumerate(found):
        failed = [(each.level, each.step) for each in records if not each.committed]
        apart = [("region", step) for step in (5, 6, 7)] if index < 2 else []
        assert failed == ([("all", 4)] if index == 1 else []) + apart
        of_region = [each for each in records if (each.level, each.committed) == ("region", False)]
        assert all("different commits" in each.error for each in of_region)


def test_a_site_that_is_behind_its_neighbour_meets_it_where_both_can_be() -> None:
    """A newcomer may come to its first rounds when the others of its region have had some alone."""

    def body(index: int, outer: Any) -> list[RoundRecord]:
        if index == 0:
            outer.inner_step += 2
        while outer.inner_step < 8:
            take_step(index, outer)
        outer.finish()
        return [(each.level, each.step, each.sites) for each in outer.records if each.committed]

    found = run_regions(body, sync_every=8, region_sync_every=1)
    assert found[0] == [("region", step, 2) for step in (4, 5, 6, 7)] + [("all", 8, 4)]
    assert found[1] == found[0]


class Batch:
    """Sites of a region whose gradients are averaged take steps of one optimizer on their whole batch."""

    TOKENS = (1, 3, 2, 2)

    @staticmethod
    def gradient(index: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + index)
        return torch.randn(2, 3, generator=generator) * (index + 1)


@pytest.mark.parametrize("absent", [None, 2], ids=["all steps are taken", "one site takes no step 2"])
def test_gradients_of_a_region_are_those_of_its_whole_batch(absent: int | None) -> None:
    """AdamW and clipping after it: equal to one site that has all of the region's tokens."""

    def body(index: int, outer: Any) -> list[torch.Tensor]:
        weight, values = outer.model.weight, []
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        while outer.inner_step < 6:
            if outer.inner_step + 1 != absent or index % 2:
                weight.grad = Batch.gradient(index, outer.inner_step)
                outer.average_gradients(Batch.TOKENS[index])
                torch.nn.utils.clip_grad_norm_([weight], 0.5)
                optimizer.step()
            outer.step(Batch.TOKENS[index])
            values.append(weight.detach().clone())
        outer.finish()
        return values

    found = run_regions(body, sync_every=100, region_sync_every=1, region_average="gradients")
    for first in (0, 2):
        weight = torch.nn.Parameter(torch.zeros(2, 3))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(6):
            taken = [site for site in (first, first + 1) if step + 1 != absent or site % 2]
            tokens = sum(Batch.TOKENS[site] for site in taken)
            weight.grad = sum(Batch.gradient(site, step) * Batch.TOKENS[site] for site in taken) / tokens
            torch.nn.utils.clip_grad_norm_([weight], 0.5)
            optimizer.step()
            torch.testing.assert_close(found[first + 1][step], weight.detach(), rtol=1e-6, atol=1e-6)
            if absent is None:
                assert torch.equal(found[first][step], found[first + 1][step])


def test_a_gradient_that_is_no_number_is_left_out_and_replaced() -> None:
    def body(index: int, outer: Any) -> torch.Tensor:
        weight = outer.model.weight
        weight.grad = Batch.gradient(index, 0) * (float("nan") if index == 0 else 1.0)
        outer.average_gradients(Batch.TOKENS[index])
        gradient = weight.grad.clone()
        outer.step()
        return gradient

    found = run_regions(body, sync_every=100, region_sync_every=1, region_average="gradients")
    torch.testing.assert_close(found[0], Batch.gradient(1, 0))
    torch.testing.assert_close(found[1], Batch.gradient(1, 0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"region_sync_every": 2}, "region_average = 'gradients'"),
        ({"region_sync_every": None}, "region_average = 'gradients'"),
        ({"region_sync_every": 1, "own_quorums": False}, "replica.region_lighthouse"),
    ],
)
def test_gradients_need_every_step_and_a_quorum_of_the_region(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_regions(train, sync_every=4, region_average="gradients", **settings)
