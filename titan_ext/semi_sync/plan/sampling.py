"""Who trains in a round, where not all do: drawn without a server, alike at all sites."""

import random
from collections.abc import Collection


def sampled_sites(names: Collection[str], count: int, seed: int, round_: int) -> set[str]:
    """The sites of one round: uniform, without replacement, independent of other rounds; equal at all sites.

    Args:
        names: sites to sample from, in any order.
        count: how many to sample; all of them if there are no more.
        seed: of all samples.
        round_: index of the round.
    """
    everybody = sorted(names)
    return set(random.Random(f"{seed}/{round_}").sample(everybody, min(count, len(everybody))))


def sampled_sources(population: int, count: int | None, seed: int, round_: int) -> list[int]:
    """Indices of the sources of one round, ascending: uniform, without replacement, independent of other rounds.

    A round's sample depends on nothing else, so that it is the same after a resume (Photon, arXiv 2411.02908: its server
    replays its generator).

    Args:
        population: how many there are.
        count: how many to sample; None, or no more than there are, takes all.
        seed: of all samples.
        round_: index of the round.
    """
    if count is None or count >= population:
        return list(range(population))
    return sorted(random.Random(f"sources/{seed}/{round_}").sample(range(population), count))


def turns_before(source: int, population: int, count: int | None, seed: int, round_: int) -> int:
    """Rounds before ``round_`` in whose sample a source was."""
    return sum(source in sampled_sources(population, count, seed, earlier) for earlier in range(round_))
