"""The Hopper kernels on a Hopper GPU, each and together, against float32 tile by tile.

`JAX_PLATFORMS=cuda uv run --extra gpu pytest -n 0 -m gpu tests/accelerators/test_gpu_hopper.py`

Everything is compiled once for each shape; group sizes are data. Free memory is filled with NaN
before each run, so that what a kernel leaves unwritten, or reads though it may not, shows.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import hopper_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from routed import plan_of

from moe.dispatch import Dropless
from moe.kernels import hopper, routed_mlp, rows_needed
from moe.kernels.hopper import Tiles
from moe.kernels.hopper.gather import WIDE
from moe.kernels.hopper.target import present
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import TopK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not present(), reason="no Hopper GPU")]


@dataclass(frozen=True)
class Case:
    """A shape; rows enough that every program of the kernels takes several output tiles."""

    experts: int
    tokens: int
    per_token: int
    width: int
    hidden: int
    tile: int = 128
    dtype: str = "bfloat16"
    other_tiles: bool = False

    @property
    def assignments(self) -> int:
        return self.tokens * self.per_token

    @property
    def rows(self) -> int:
        return rows_needed(self.assignments, self.experts, self.tile)


CASES = {
    "whole tiles": Case(8, 4096, 4, width=512, hidden=256),
    "odd widths": Case(9, 4096, 3, width=640, hidden=384),
    "odd widths, float16": Case(9, 4096, 3, width=640, hidden=384, dtype="float16"),
    "rows by 64": Case(16, 2048, 4, width=384, hidden=384, tile=64),
    "rows by 64, float16": Case(16, 2048, 4, width=512, hidden=128, tile=64, dtype="float16"),
    "wide experts": Case(3, 1024, 2, width=256, hidden=WIDE),
    "many experts": Case(512, 1024, 8, width=256, hidden=128),
    "other tiles": Case(12, 4096, 3, width=640, hidden=384, other_tiles=True),
}
OTHER_TILES = {
    "product": Tiles(64, 128, stages=6, strip=1),
    "product, transposed": Tiles(128, 128, stages=2, strip=16),
    "inward_transposed": Tiles(64, 256, stages=3, strip=2),
    "swiglu_product": Tiles(128, 128, stages=5, strip=3),
    "swiglu_backward": Tiles(128, 128, stages=6, strip=1),
    "weight_gradient": Tiles(256, 128, stages=3, strip=1),
    "weight_gradient, gathered columns": Tiles(128, 256, stages=3, strip=2),
}
UNTUNED = {"xla_gpu_autotune_level": 0}  # the references' products are XLA's, and tuning them takes minutes
# Largest error, relative to the number and its row's root mean square: of one rounding, of two (where tiles
# are too small for a fused `swiglu_backward`), and of a whole layer.
ONE_ROUNDING = {"bfloat16": 6e-3, "float16": 1e-3}
TWO_ROUNDINGS = {"bfloat16": 1.2e-2, "float16": 2e-3}
SEVERAL_ROUNDINGS = {"bfloat16": 6e-2, "float16": 8e-3}


def all_kernels(module, case: Case, inputs):
    """What each kernel gives, rows of padding aside, by name."""
    plan, groups = inputs["plan"], inputs["plan"].groups
    token, used = plan.row_token(padding=0), hopper_reference.used_rows(inputs["plan"].groups, case.rows)
    x, y_bar, rows, h, h_bar, hidden = (inputs[k] for k in ("x", "y_bar", "rows", "h", "h_bar", "hidden"))
    gate, up, down = (inputs[k] for k in ("w_gate", "w_up", "w_down"))

    def call(kernel, *arguments, name=None, **options):
        if case.other_tiles and module is hopper:
            options["tiles"] = OTHER_TILES[name or kernel]
        return getattr(module, kernel)(*arguments, groups, **options)

    columns = "weight_gradient, gathered columns"
    weight = plan.row_weight(inputs["combine_weight"])
    of_rows = {
        "product": call("product", rows, gate),
        "product, gathered": call("product", x, gate, token=token),
        "product, transposed": call("product", rows, down, name="product, transposed", transposed=True),
        "inward_transposed": call("inward_transposed", h_bar, gate, up),
        "swiglu_product": call("swiglu_product", rows, gate, up),
        "swiglu_product, gathered": call("swiglu_product", x, gate, up, token=token, keep=False)[0],
        "swiglu_backward": call("swiglu_backward", rows, down, h, weight),
        "swiglu_backward, gathered": call("swiglu_backward", y_bar, down, h, weight, token=token),
    }
    of_experts = {
        "weight_gradient": call("weight_gradient", rows, h_bar, matrices=2),
        "weight_gradient, gathered": call("weight_gradient", x, h_bar, matrices=2, x_token=token),
        columns: call("weight_gradient", hidden, y_bar, name=columns, y_token=token),
    }
    mask = partial(jax.tree.map, lambda a: jnp.where(used.reshape(-1, *[1] * (a.ndim - 1)), a, 0))
    return mask(of_rows) | of_experts


def layer_and_gradients(function, case: Case, inputs):
    """Output and all gradients of the routed experts."""
    names = ("x", "w_gate", "w_up", "w_down", "combine_weight")
    y, pullback = jax.vjp(lambda *a: function(*a, inputs["plan"]), *(inputs[k] for k in names))
    return dict(zip(("y", *names), (y, *pullback(inputs["y_bar"].astype(y.dtype))), strict=True))


@partial(jax.jit, static_argnums=0)
def draw(case: Case, seed, plan):
    """Random arrays; what no kernel may read is NaN, what it may read and must not use is large."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    used = hopper_reference.used_rows(plan.groups, case.rows)
    padding = jnp.arange(case.rows) < plan.groups.padded_sizes().sum()

    def normal(*shape, std=1.0):
        return (std * jax.random.normal(next(keys), shape)).astype(case.dtype)

    def in_rows(width, garbage):
        values = normal(case.rows, width)
        return jnp.where(used[:, None], values, jnp.where(padding[:, None], garbage, jnp.nan)).astype(
            case.dtype
        )

    inward, outward = case.width**-0.5, case.hidden**-0.5
    return {
        "plan": plan,
        # Positive, so that nothing cancels; not so small that float16 loses digits.
        "combine_weight": jax.random.uniform(next(keys), (case.assignments,), minval=0.1),
        "x": normal(case.tokens, case.width),
        "y_bar": normal(case.tokens, case.width),
        "rows": in_rows(case.width, 100.0),
        "h": in_rows(2 * case.hidden, 3.0),
        "h_bar": in_rows(2 * case.hidden, 0.0),
        "hidden": in_rows(case.hidden, 0.0),
        "w_gate": normal(case.experts, case.width, case.hidden, std=inward),
        "w_up": normal(case.experts, case.width, case.hidden, std=inward),
        "w_down": normal(case.experts, case.hidden, case.width, std=outward),
    }


@jax.jit
def errors(actual, expected):
    """Of each array; NaN where it holds one."""

    def error(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        scale = jnp.abs(b) + jnp.sqrt(jnp.mean(b**2, axis=-1, keepdims=True))
        return jnp.max(jnp.where(a == b, 0, jnp.abs(a - b) / scale))

    return jax.tree.map(error, actual, expected)


def wide(inputs):
    """The same numbers in float32."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, inputs
    )


PROGRAMS = {
    "kernels": partial(all_kernels, hopper),
    "kernels, reference": partial(all_kernels, hopper_reference),
    "layer": partial(layer_and_gradients, routed_mlp),
    "layer, reference": lambda case, inputs: layer_and_gradients(
        hopper_reference.routed_mlp, case, wide(inputs)
    ),
}


@cache
def programs(name: str):
    """Every program of a case, compiled."""
    case = CASES[name]
    plan = jax.eval_shape(lambda: random_plan(case, 0, 1.0, 0.0))
    inputs = jax.eval_shape(partial(draw, case), 0, plan)
    wanted = [p for p in PROGRAMS if p.startswith("kernels") or not case.other_tiles]
    lowered = [jax.jit(partial(PROGRAMS[program], case)).lower(inputs) for program in wanted]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: program.compile(UNTUNED), lowered)
        return dict(zip(wanted, compiled, strict=True))


def poison():
    """Fill what memory is free with ones: NaN in every floating type."""
    buffers = [jnp.full(2**bits // 4, -1, jnp.int32) for bits in (12, 16, 20, 22, 24, 27) for _ in range(16)]
    jax.block_until_ready(buffers)
    for buffer in buffers:
        buffer.delete()


def random_plan(case: Case, seed: int, skew: float, dropped: float):
    """Loads from all but equal (`skew` 0) to one expert that takes all (1)."""
    random = np.random.default_rng(seed)
    share = np.exp(-20 * skew**4 * np.arange(case.experts))
    expert = random.choice(random.permutation(case.experts), case.assignments, p=share / share.sum())
    expert[random.random(case.assignments) < dropped] = -1
    token = np.repeat(np.arange(case.tokens), case.per_token)
    sizes = {"experts": case.experts, "tile": case.tile, "per_token": case.per_token}
    return plan_of(token, expert, **sizes)


def assert_close(case, actual, expected, tolerance):
    found = {
        jax.tree_util.keystr(p): float(e) for p, e in jax.tree.leaves_with_path(errors(actual, expected))
    }
    # So that a NaN is among them.
    assert not {name: error for name, error in found.items() if not error < tolerance[case.dtype]}


few = settings(max_examples=4, phases=[Phase.explicit, Phase.generate])  # to shrink takes long
any_plan = given(seed=st.integers(0, 2**16), skew=st.floats(0, 1), dropped=st.sampled_from([0.0, 0.0, 0.3]))


@pytest.mark.parametrize("name", CASES)
@any_plan
@example(seed=0, skew=1.0, dropped=0.0)
@example(seed=0, skew=0.0, dropped=1.0)  # no rows at all
@few
def test_kernels(name, seed, skew, dropped):
    case = CASES[name]
    inputs = draw(case, seed, random_plan(case, seed, skew, dropped))
    expected = programs(name)["kernels, reference"](inputs)
    runs = []
    for _ in range(2):
        poison()
        runs.append(programs(name)["kernels"](inputs))
    assert_close(case, runs[0], expected, ONE_ROUNDING if case.tile == 128 else TWO_ROUNDINGS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *runs)), "two runs differ"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.other_tiles])
@any_plan
@example(seed=0, skew=1.0, dropped=0.0)
@example(seed=0, skew=0.0, dropped=1.0)
@few
def test_routed_mlp_and_its_gradients(name, seed, skew, dropped):
    case = CASES[name]
    inputs = draw(case, seed, random_plan(case, seed, skew, dropped))
    expected = programs(name)["layer, reference"](inputs)
    runs = []
    for _ in range(2):
        poison()
        runs.append(programs(name)["layer"](inputs))
    assert_close(case, runs[0], expected, SEVERAL_ROUNDINGS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *runs)), "two runs differ"


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_layer_under_the_mesh(chunks):
    """In bfloat16, on these kernels, against the same layer in float32, on none of them."""
    batch, sequence, width = 8, 512, 384
    config = MoEConfig(16, 256, TopK(k=2), dispatch=Dropless(tile=128, chunks=chunks))
    x, y_bar = jax.random.normal(jax.random.key(0), (2, batch, sequence, width)).astype(jnp.bfloat16)

    def run(dtype):
        layer = MoELayer(config, width, out_std=1.0, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), params)

        @jax.jit
        def value_and_gradients(params, x, y_bar):
            x, y_bar, ids, mask = (
                jax.sharding.reshard(a, spec("batch"))
                for a in (x, y_bar, jnp.ones(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool))
            )
            y, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x, ids, mask)[0], params, x)
            return y, pullback(y_bar)

        poison()
        return value_and_gradients(rounded, x.astype(dtype), y_bar.astype(dtype))

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), logical_rules():
        actual, expected = run("bfloat16"), run("float32")
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            assert jnp.linalg.norm(a - b) < 2e-2 * jnp.linalg.norm(b)
