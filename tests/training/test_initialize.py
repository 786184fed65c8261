"""Upcycling from the checkpoint of a dense run: same loss at the start, what each expert holds, refusals."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.checkpoint import Checkpoints, CheckpointStore
from moe.dispatch import Dropless
from moe.errors import UserError
from moe.experiment import Experiment, Train
from moe.mesh import MeshConfig, make_mesh, spec
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, Upcycle, build, structure
from moe.nn.router import MLPRouter
from moe.optim import AdamW
from moe.routing import SMEAR, TopK
from moe.training.initialize import starting_point
from moe.training.loss import training_loss
from moe.training.run_directory import claimed
from moe.training.state import initial_state

DENSE = TransformerConfig(
    vocab_size=24,
    width=8,
    layers="DDDD",
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=4, qk_norm="head"),
    dense_width=12,
    compute_dtype="float32",
)
MOE = MoEConfig(num_experts=4, expert_width=12, routing=TopK(k=2), balance=(), dispatch=Dropless(tile=4))
GRANULAR = replace(MOE, num_experts=6, expert_width=4, routing=TopK(k=3))


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A run with a moving average whose parameters are no longer what any seed draws; its directory."""
    directory = tmp_path_factory.mktemp("runs") / "dense"
    experiment = Experiment(model=DENSE, optimizer=AdamW(), train=Train(average_decay=0.9))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        state = initial_state(DENSE, AdamW().build(structure(DENSE)[1], 10), seed=5, average=True)
        grow = partial(jax.tree.map, lambda x: x * 1.5 + 0.01)
        state = replace(state, params=grow(state.params), average=grow(grow(state.average)))
        with (
            claimed(directory, experiment),
            CheckpointStore(directory / "checkpoints", Checkpoints()) as store,
        ):
            store.save(10, state, {}, wait=True)
    return directory, jax.device_get(state.average)


def start(model, directory, **fields):
    """Fresh parameters, made from the run; as the run would start."""
    experiment = Experiment(model=model, init=Upcycle(run=str(directory), **fields))
    transformation = experiment.optimizer.build(structure(model)[1], 10)
    return initial_state(model, transformation, seed=1, average=True, start=starting_point(experiment))


@jax.jit(static_argnames="model")
def loss(model, params):
    graph, _, rest = nnx.split(jax.eval_shape(lambda: build(model, jax.random.key(0))), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (8, 17), 0, 24)
    return training_loss(nnx.merge(graph, params, rest), jax.sharding.reshard(tokens, spec("batch")))[0]


@pytest.mark.parametrize(
    ("mesh", "layers", "moe"),
    [
        ("4x2", "MMMM", MOE),
        ("1x1", "DMDM", replace(MOE, routing=TopK(k=1, scores="sigmoid"))),
        ("4x2", "DMMM", GRANULAR),
    ],
    indirect=["mesh"],
    ids=["all", "every second", "granular"],
)
def test_it_starts_with_the_dense_models_loss(mesh, dense_run, layers, moe):
    directory, trained = dense_run
    model = replace(DENSE, layers=layers, moe=moe)
    state = start(model, directory)
    expected = loss(DENSE, jax.tree.map(jnp.asarray, trained))
    np.testing.assert_allclose(loss(model, state.params), expected, rtol=1e-6)
    assert abs(loss(model, start(model, directory, scale=2.0).params) - expected) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))

    like = jax.eval_shape(lambda: initial_state(model, AdamW().build(state.params, 10), seed=0, average=True))
    jax.tree.map(
        lambda a, b: pytest.fail() if a.sharding.spec != b.sharding.spec else None, state.params, like.params
    )


def test_what_each_expert_holds(one_device, dense_run):
    """Expert e is part e % 3 of the dense layer; experts of one group share their router column."""
    directory, trained = dense_run
    params = start(replace(DENSE, layers="DMMM", moe=GRANULAR), directory).params
    dense = dict(nnx.to_flat_state(trained))
    found = dict(nnx.to_flat_state(params))
    moe = ("stacks", 1, "blocks", 0, "moe")
    for layer in range(3):
        w_gate, w_up, w_down = (
            dense["stacks", 0, "blocks", 0, "dense", name][...][layer + 1]
            for name in ("w_gate", "w_up", "w_down")
        )
        for e in range(6):
            units = slice(e % 3 * 4, e % 3 * 4 + 4)
            experts = {
                name: found[*moe, "experts", name][...][layer, e] for name in ("w_gate", "w_up", "w_down")
            }
            np.testing.assert_array_equal(experts["w_gate"], w_gate[:, units])
            np.testing.assert_allclose(experts["w_up"], w_up[:, units] * 3**0.5, rtol=1e-6)
            np.testing.assert_allclose(experts["w_down"], w_down[units] * 3**0.5, rtol=1e-6)
    router = np.asarray(found[*moe, "router", "w"][...])
    np.testing.assert_array_equal(router[..., :3], router[..., :1].repeat(3, -1))
    np.testing.assert_array_equal(router[..., 3:], router[..., 3:4].repeat(3, -1))
    assert np.abs(router[..., 0] - router[..., 3]).min() > 0


def test_noise_tells_experts_apart(one_device, dense_run):
    directory, trained = dense_run
    model = replace(DENSE, layers="MMMM", moe=MOE)
    w_up = start(model, directory, noise=0.1).params["stacks"][0]["blocks"][0]["moe"]["experts"]["w_up"][...]
    dense = trained["stacks"][0]["blocks"][0]["dense"]["w_up"][...]
    noise = np.asarray(w_up) - np.asarray(dense)[:, None]
    assert noise.std() == pytest.approx(0.1 * dense.std(), rel=0.1)
    assert len(np.unique(noise)) == noise.size


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(DENSE, layers="MM"), "number of model.layers is 4 .* and 2 here"),
        (replace(DENSE, layers="MMMM", width=16), "model.width is 8 .* and 16 here"),
        (replace(DENSE, layers="MMMM", tied_embedding=True), "tied_embedding"),
        (replace(DENSE, layers="DMMM", dense_width=16), "dense_width is 12 .* and 16 here"),
        (replace(DENSE, layers="MMMM", moe=replace(MOE, expert_width=5)), "expert_width=5 must divide"),
        (replace(DENSE, layers="MMMM", moe=replace(MOE, shared_experts=1)), "shared_experts=1"),
        (replace(DENSE, layers="MMMM", moe=replace(MOE, latent_width=4)), "latent_width=4"),
        (replace(DENSE, layers="MMMM", moe=replace(GRANULAR, num_experts=4)), "multiple of the 3 parts"),
        (replace(DENSE, layers="MMMM", moe=replace(GRANULAR, routing=TopK(k=2))), "multiple of 3 as k"),
        (replace(DENSE, layers="MMMM", moe=replace(GRANULAR, routing=SMEAR())), "multiple of 3 as k"),
        (replace(DENSE, layers="MMMM", moe=replace(GRANULAR, router=MLPRouter())), "LinearRouter()"),
    ],
)
def test_what_does_not_fit_is_refused(one_device, dense_run, model, message):
    with pytest.raises(UserError, match=message):
        starting_point(Experiment(model=model, init=Upcycle(run=str(dense_run[0]))))


def test_only_dense_runs_are_upcycled():
    with pytest.raises(UserError, match="give a run of D layers"):
        Upcycle(run="x").check(replace(DENSE, layers="DMDM"), replace(DENSE, layers="MMMM"))


def test_there_must_be_a_run_with_a_checkpoint(one_device, tmp_path):
    model = replace(DENSE, layers="MMMM", moe=MOE)
    with pytest.raises(UserError, match="holds no run"):
        starting_point(Experiment(model=model, init=Upcycle(run=str(tmp_path))))
    with claimed(tmp_path, Experiment(model=DENSE)):
        pass
    with pytest.raises(UserError, match="no checkpoint yet"):
        starting_point(Experiment(model=model, init=Upcycle(run=str(tmp_path))))


def test_without_init_nothing_is_read(one_device):
    assert starting_point(Experiment()) is None
