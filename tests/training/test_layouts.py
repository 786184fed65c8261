"""However a step is laid out - over devices, in micro-batches, recomputing - it computes the same.

Every public balancer by itself: each loss is multiplied by a number that the model carries as state, so
that one compiled step for a layout serves all of them, at sizes where its gradient cannot be overlooked.
"""

from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import (
    BATCH,
    SEQUENCE,
    Layout,
    arrays_named,
    assert_same,
    distance,
    initial_values,
    outcome,
    with_moe,
)

import moe.balance
import moe.routing
from moe.balance import (
    BalanceLoss,
    Controller,
    DeviceBalanceLoss,
    ImportanceLoss,
    LoadBalanceLoss,
    LossFreeBias,
    PIDBias,
    load_fraction,
)
from moe.checkpoint import Checkpoints, CheckpointStore
from moe.dispatch import AllToAll, Capacity, Gather, OneHot, RaggedAllToAll
from moe.errors import UserError
from moe.nn import structure
from moe.nn.free_experts import FreeExperts
from moe.optim import AdamW
from moe.routing import Strategy, TopK
from moe.training.state import abstract_state, initial_state

LAYOUTS = [
    Layout("data", remat="dots", accumulation=4, exchange=AllToAll()),
    Layout("all", remat="full", accumulation=2, chunks=2, exchange=RaggedAllToAll(0.3)),
    Layout("4x2", remat="full", accumulation=4, chunks=4),
]
ONE_LAYOUT = LAYOUTS[-1]


def public(module, kind):
    """Every subclass of `kind` that the package offers and that has defaults, with its defaults."""
    classes = (getattr(module, name) for name in module.__all__)
    found = [c for c in classes if is_dataclass(c) and issubclass(c, kind) and c is not kind]
    return [c() for c in found if all((f.default, f.default_factory) != (MISSING,) * 2 for f in fields(c))]


LOSSES = [
    *public(moe.balance, BalanceLoss),
    LoadBalanceLoss(sequences_per_group=1),
    LoadBalanceLoss(sequences_per_group=BATCH // 4),
    DeviceBalanceLoss(sequences_per_group=0),
    ImportanceLoss(summed="combine_weight"),
]


CONTROLLERS = [*public(moe.balance, Controller), LossFreeBias(0.1, "proportional", momentum=0.5)]


@dataclass(frozen=True)
class Learning(TopK):
    """Top-k of noisy logits that learns a factor on them, remembers the load, and tells a smooth one."""

    observes: ClassVar[tuple[str, ...]] = ("selection",)

    def __call__(self, logits, bias, context):
        noise = jax.random.normal(context.key, logits.shape)
        logits = logits * context.parameters["factor"] - 0.1 * context.state["load"] + noise
        smooth = jnp.where(context.mask[:, None], jax.nn.sigmoid(logits), 0.0)
        return replace(super().__call__(logits, bias, context), observed={"selection": smooth.sum(0)})

    def parameters(self, key, width, num_experts):
        return {"factor": jnp.ones(num_experts)}

    def initial_state(self, width, num_experts):
        return {"load": jnp.zeros(num_experts)}

    def update_state(self, state, batch):
        return {"load": (state["load"] + load_fraction(batch.load)) / 2}


class Dials:
    """Mixed into a strategy: its state says how much each loss counts."""

    def __call__(self, logits, bias, context):
        routing = super().__call__(logits, bias, context)
        return replace(routing, observed=routing.observed | {"dial": context.state["dial"]})

    def initial_state(self, width, num_experts):
        return super().initial_state(width, num_experts) | {"dial": jnp.zeros(len(LOSSES))}

    def update_state(self, state, batch):
        return super().update_state(state, batch) | {"dial": state["dial"]}


@cache
def with_dials(strategy):
    """The strategy, with its fields at their defaults; one class for each, so that configs can be equal."""
    return type(f"Dialling{type(strategy).__name__}", (Dials, type(strategy)), {})()


@dataclass(frozen=True)
class Dialled(BalanceLoss):
    """A loss times its dial."""

    needs_router_matrix: ClassVar[bool] = True

    index: int

    @property
    def loss(self):
        return LOSSES[self.index]

    @property
    def needs_outputs(self):
        return self.loss.needs_outputs

    @property
    def requires(self):
        return self.loss.requires

    @property
    def needs_batch(self):
        return self.loss.needs_batch

    def observe(self, view):
        return self.loss.observe(view)

    def check(self, routing, num_experts, free=0):
        self.loss.check(routing, num_experts, free)

    def __call__(self, statistics, batch):
        dial = statistics.observed["dial"].mean((0, 1))[self.index]
        return dial * self.loss(statistics, batch)


@dataclass(frozen=True)
class Together(Controller):
    """Every controller, each with a state of its own; the bias of the first one steers."""

    def initial(self, num_experts, free=0):
        return self._join([controller.initial(num_experts, free) for controller in CONTROLLERS])

    def observe(self, view):
        return {name: x for controller in CONTROLLERS for name, x in controller.observe(view).items()}

    def update(self, state, batch):
        names = [controller.initial(1) for controller in CONTROLLERS]
        states = [{name: state[f"{name}_{i}"] for name in own} for i, own in enumerate(names)]
        return self._join([c.update(own, batch) for c, own in zip(CONTROLLERS, states, strict=True)])

    def _join(self, states):
        numbered = {f"{name}_{i}": x for i, state in enumerate(states) for name, x in state.items()}
        return numbered | {"bias": states[0]["bias"]}


@cache
def config_of(index):
    """A model with the loss of this number, and with all others that the same strategy can serve.

    Losses that read experts' outputs, which not every exchange brings back, have a model of their own.
    """
    strategies = [Learning(), *public(moe.routing, Strategy)]

    def layer(strategy, losses):
        controller = (Together(),) if strategy.takes_bias else ()
        balance = (*map(Dialled, losses), *controller)
        # Two groups in a sequence, each with randomness of its own.
        return {"routing": with_dials(strategy), "balance": balance, "tokens_per_group": SEQUENCE // 2}

    def serves(strategy, index):
        try:
            return bool(with_moe(**layer(strategy, [index])))
        except UserError:
            return False

    strategy = next((s for s in strategies if serves(s, index)), None)
    assert strategy, f"no public strategy goes together with {LOSSES[index]}"
    earlier = strategies[: strategies.index(strategy)]
    members = [
        i
        for i in range(len(LOSSES))
        if serves(strategy, i)
        and not any(serves(s, i) for s in earlier)
        and LOSSES[i].needs_outputs == LOSSES[index].needs_outputs
    ]
    return with_moe(**layer(strategy, members))


def dialled(index, layout, dial, key=0):
    dials = dial * np.eye(len(LOSSES), dtype=np.float32)[index]
    return outcome(config_of(index), layout, key=key, dial=dials)


@cache
def weighty(index):
    """A dial at which the loss's gradient is as large as the cross-entropy's, found on one device."""
    without = dialled(index, Layout(), 0.0).gradients
    size, dial = distance(without, jax.tree.map(np.zeros_like, without)), 1.0
    while (moved := distance(dialled(index, Layout(), dial).gradients, without)) < size / 10:
        dial *= 1e3
        assert dial < 1e15, f"{LOSSES[index]} has no gradient"
    return dial * size / moved


def cases():
    """Every loss on every layout, or on one where its strategy, and thereby the compiled step, is its own."""
    for index, loss in enumerate(LOSSES):
        shared = isinstance(config_of(index).moe.routing, Learning) and not loss.needs_outputs
        for layout in LAYOUTS if shared else [ONE_LAYOUT]:
            yield pytest.param(index, layout, id=f"{loss}-{layout.mesh}")


@pytest.mark.parametrize(("index", "layout"), list(cases()))
def test_a_loss_does_not_follow_the_layout(index, layout):
    """Nor does what goes with it: gradients, metrics, the state of the strategy and of every controller."""
    dial = weighty(index)
    assert_same(dialled(index, layout, dial), dialled(index, Layout(), dial))


def test_a_loss_of_another_scope_would_be_noticed():
    """What the test above would see if a device or a micro-batch were taken for the whole batch."""
    scopes = [LOSSES.index(LoadBalanceLoss(sequences_per_group=n)) for n in (0, BATCH // 4, 1)]
    outcomes = [dialled(index, Layout(), weighty(scopes[0])) for index in scopes]
    values = [float(o.metrics["balance_loss"]) for o in outcomes]
    assert values[1] > 1.001 * values[0]
    assert values[2] > 1.001 * values[1]
    for other in outcomes[1:]:
        with pytest.raises(AssertionError):
            assert_same(other._replace(metrics=outcomes[0].metrics), outcomes[0])


def test_controllers_take_part_in_the_tests_above():
    """Each one moved its bias."""
    index = LOSSES.index(LoadBalanceLoss())
    _, before = initial_values(config_of(index))
    after = dialled(index, Layout(), 0.0).controllers
    for i, controller in enumerate(CONTROLLERS):
        (old,), (new,) = (arrays_named(state, f"bias_{i}") for state in (before, after))
        assert np.any(old != new), controller


def test_randomness_takes_part_in_the_tests_above():
    """Another key gives other routes."""
    index = LOSSES.index(LoadBalanceLoss())
    for layout in (Layout(), ONE_LAYOUT):
        outcomes = [dialled(index, layout, 0.0, key=key) for key in (0, 1)]
        assert np.any(outcomes[0].metrics["load"] != outcomes[1].metrics["load"])


@pytest.mark.parametrize(
    ("dispatch", "layout"),
    [
        (Capacity(0.75), Layout("sequence", exchange=AllToAll(0.5))),
        (Capacity(0.75), Layout("tensor", accumulation=2, exchange=Gather())),
        (OneHot(0.75), Layout("1x8", exchange=RaggedAllToAll())),
    ],
    ids=str,
)
def test_what_is_dropped_does_not_follow_the_layout(dispatch, layout):
    config = with_moe(
        balance=(PIDBias(),),
        dispatch=dispatch,
        free_experts=FreeExperts(copy=2),
        tokens_per_group=SEQUENCE // 2,
    )
    expected = outcome(config, Layout())
    assert expected.metrics["dropped_fraction"].min() > 0.01
    assert expected.metrics["experts_per_token"].max() < 2
    assert_same(outcome(config, layout), expected)


def test_a_state_moves_to_any_mesh_bit_by_bit(tmp_path):
    """And back: a run goes on with the very parameters it was saved with."""
    config, optimizer = with_moe(balance=(LossFreeBias(),), tokens_per_group=SEQUENCE // 2), AdamW()
    with Layout().set():
        transformation = optimizer.build(structure(config)[1], 10)
    saved, meshes = None, ["4x2", "all", "1x1", "data", "1x8"]
    for number, (here, there) in enumerate(pairwise(meshes)):
        with Layout(here).set(), CheckpointStore(tmp_path / str(number), Checkpoints()) as store:
            if saved is None:
                state = initial_state(config, transformation, seed=3, average=True)
                saved = jax.device_get(state)
            store.save(1, state, {}, wait=True)
        with Layout(there).set(), CheckpointStore(tmp_path / str(number), Checkpoints()) as store:
            restored = store.restore(abstract_state(config, transformation, average=True))
            assert restored
            state = restored.state
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params)) == (there != "1x1")
