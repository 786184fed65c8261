"""Topologies, and the time of a collective on a torus."""

import pytest

from moe.errors import UserError
from tpu.chips import CHIPS, Place, chip_of, seconds
from tpu.collectives import Collective


def grid(*sides: int, cores: int = 1) -> list[Place]:
    """All places of a torus, the last side first to change."""
    places = [()]
    for side in sides:
        places = [(*place, i) for place in places for i in range(side)]
    return [Place(place, core) for place in places for core in range(cores)]


def over(kind: str, *group: int, payload: int = 2**30) -> Collective:
    return Collective(kind, ("expert",), group, payload, False)


@pytest.mark.parametrize("topology", ["v4:2x2x4", "v5e:16x16", "v5p:4x4x8", "v6e:2x4", "tpu7x:2x2x1"])
def test_every_generation_is_known(topology):
    assert chip_of(topology).name == topology.partition(":")[0]


@pytest.mark.parametrize(
    ("topology", "named"),
    [
        ("v9:2x2", "choose from v4, v5e"),
        ("v6e", "v6e:16x16"),
        ("v6e:2x2x2", "2 sides"),
        ("v5p:4x0x4", "3 sides"),
    ],
)
def test_another_topology_is_refused(topology, named):
    with pytest.raises(UserError, match=named):
        chip_of(topology)


def test_a_ring_is_twice_as_fast_as_a_line():
    chip = CHIPS["v6e"]
    whole, half = grid(16, 16), grid(8, 8)
    closed = seconds(chip, over("all-gather", *range(16)), whole)
    assert closed == pytest.approx(2**30 * 15 / 16 / (2 * chip.link_bandwidth))
    line = seconds(chip, over("all-gather", *range(8)), half)
    assert line == pytest.approx(2**30 * 7 / 8 / chip.link_bandwidth)


def test_two_sides_of_the_torus_share_the_work():
    chip = CHIPS["v6e"]
    one = over("reduce-scatter", *range(16))
    both = over("reduce-scatter", *range(256))
    places = grid(16, 16)
    assert seconds(chip, both, places) / both.sent == pytest.approx(seconds(chip, one, places) / one.sent / 2)


def test_a_sum_for_all_costs_a_scatter_and_a_gather():
    places, group = grid(4, 4, 4), range(4)
    total = seconds(CHIPS["v5p"], over("all-reduce", *group), places)
    parts = [seconds(CHIPS["v5p"], over(kind, *group), places) for kind in ("all-gather", "reduce-scatter")]
    assert total == pytest.approx(sum(parts))


def test_groups_in_between_share_the_links():
    chip, places = CHIPS["v5e"], grid(1, 16)
    apart = seconds(chip, over("all-gather", 0, 4, 8, 12), places)
    assert apart == pytest.approx(2**30 * 3 / 4 / (2 * chip.link_bandwidth / 4))


def test_an_exchange_of_all_crosses_the_middle_of_the_ring():
    # 8 devices send each of the 8 others a 16th of their payload, over the ring's two links that way.
    chip, payload = CHIPS["v6e"], 2**30
    best = 8 * 8 * payload / 16 / (2 * chip.link_bandwidth)
    assert seconds(chip, over("all-to-all", *range(16), payload=payload), grid(16, 1)) == pytest.approx(best)


def test_devices_of_one_chip_have_their_own_way():
    chip, places = CHIPS["tpu7x"], grid(2, 2, 1, cores=2)
    inside = seconds(chip, over("all-gather", 0, 1), places)
    across = seconds(chip, over("all-gather", 0, 2), places)
    assert across == pytest.approx(12 * inside)  # six times the bandwidth, and no other core on the link
