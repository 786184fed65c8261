"""All balancers at once, by every dispatch and exchange, over every mesh of 8 devices: one and the same step.

    pytest tests/training/test_meshes.py --every-mesh

goes through all 35 meshes; without that a few are taken, each of which has one long axis. `test_layouts.py`
looks at each balancer by itself, on meshes of several axes, with remat and accumulation.
"""

from dataclasses import replace
from functools import cache
from itertools import cycle

import numpy as np
from test_layouts import LOSSES, config_of, weighty
from tiny_step import EIGHT, SEQUENCE, Layout, assert_same, outcome

from moe.balance import LoadBalanceLoss
from moe.dispatch import AllToAll, Capacity, Dropless, Gather, OneHot, RaggedAllToAll

ONE_LONG_AXIS = ["1x1x8x1x1", "1x1x1x8x1", "1x1x1x1x8"]
DISPATCHES = [Dropless(tile=8), Capacity(0.75), Dropless(tile=8, chunks=2), OneHot(0.75)]
EXCHANGES = [AllToAll(), Gather(), RaggedAllToAll(0.4)]


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--every-mesh")
    meshes = list(EIGHT) if every else ONE_LONG_AXIS
    exchanges = (cycle(EXCHANGES) for _ in DISPATCHES)
    with_dispatch = zip(meshes, cycle(zip(DISPATCHES, exchanges, strict=True)), strict=False)
    cases = [(mesh, dispatch, next(exchange)) for mesh, (dispatch, exchange) in with_dispatch]
    metafunc.parametrize(("mesh", "dispatch", "exchange"), cases, ids=str)


@cache
def on_one_device(dispatch, tokens):
    """The step, and what it is made of: each loss counts as much as the cross-entropy."""
    index = LOSSES.index(LoadBalanceLoss())
    config = config_of(index)
    served = [i for i, loss in enumerate(LOSSES) if loss in [b.loss for b in config.moe.balance[:-1]]]
    dial = np.zeros(len(LOSSES), np.float32)
    dial[served] = [weighty(i) for i in served]
    config = replace(config, moe=replace(config.moe, dispatch=dispatch, tokens_per_group=tokens))
    return config, dial, outcome(config, Layout(), dial=dial)


def test_a_step_is_the_same_on_any_mesh(mesh, dispatch, exchange):
    tokens = min(2, SEQUENCE // EIGHT[mesh].sequence)
    config, dial, expected = on_one_device(dispatch, tokens)
    chunks = dispatch.chunks if EIGHT[mesh].expert > 1 else 1
    layout = Layout(mesh, exchange=exchange)
    config = replace(config, moe=replace(config.moe, dispatch=replace(dispatch, chunks=chunks)))
    assert_same(outcome(config, layout, dial=dial), expected)
