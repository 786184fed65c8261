"""Measured program: our whole MoE layer, forward, and forward with backward.

Timed is `MoELayer` as a model calls it: router in float32, top-k softmax with the k weights made to sum to
one, dropless dispatch, SwiGLU experts, combine, and the statistics of the routing; with backward the
gradients of the tokens and of all parameters. Experts' matrices are cast to bfloat16 beforehand, as the peers
hold them.

See `cases.py` for how it is run.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from benchmarks.gpu.cases import Record, attempt, serve_cases
from benchmarks.gpu.grouped_matmul_jax import UNTUNED, compiled, memory_of, normal
from benchmarks.gpu.layer_error import layer_errors
from benchmarks.gpu.shapes import LAYERS, ROUTINGS, LayerShape, router_bias
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.worker import Task
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import MoEConfig
from moe.nn.moe_layer import MoELayer
from moe.routing import TopK

SEQUENCE = 4096


def start(task: Task):
    """Versions, and what measures a case."""
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        shape = LAYERS[case["layer"]]
        yield from layer(shape.shrunk() if task["quick"] else shape, task["rounds"])

    return {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}, measure


def layer(shape: LayerShape, rounds: int) -> Iterator[Record]:
    """Both passes under every routing."""
    structure, drawn = built(shape)
    sequence = min(SEQUENCE, shape.tokens)
    x, y_bar = (normal(seed, (shape.tokens // sequence, sequence, shape.width)) for seed in (1, 2))
    x = x.at[..., 0].set(1)  # so that the router's first row is a bias
    x, y_bar = jax.sharding.reshard((x, y_bar), spec("batch"))
    states = {name: biased(drawn, jnp.asarray(router_bias(shape, name))) for name in ROUTINGS}
    here = (jax.sharding.get_mesh(),)  # is a thread's own
    # Compiles side by side, before anything is timed.
    with ThreadPoolExecutor(initializer=jax.set_mesh, initargs=here) as pool:
        runs = {
            name: pool.submit(compiled, one, drawn, x, y_bar) for name, one in passes_of(structure).items()
        }
        kept_of = pool.submit(compiled, residuals(structure), drawn, x)
    for name in runs:
        backward = name != "forward"

        def measure(name=name, backward=backward) -> Iterator[Record]:
            run = runs[name].result()
            accuracy = accuracy_of(structure, shape, kept_of.result()) if backward else lambda *_: {}
            for routing, state in states.items():
                yield (
                    {
                        "routing": routing,
                        "pass": name,
                        "flops": shape.flops(backward=backward),
                        "seconds": seconds_of_rounds(
                            partial(run, state, x, y_bar), jax.block_until_ready, rounds
                        ),
                    }
                    | memory_of(run)
                    | accuracy(run, state, x, y_bar)
                )

        yield from attempt(measure, **{"pass": name})


def accuracy_of(structure: nnx.GraphDef, shape: LayerShape, kept_of: Callable) -> Callable[..., Record]:
    """What finds the errors of a forward and backward pass, and the bytes saved in between."""
    errors = jax.jit(layer_errors, static_argnames="k", compiler_options=UNTUNED)

    def accuracy(run, state, x, y_bar) -> Record:
        kept = saved_bytes(*jax.sharding.reshard((kept_of(state, x), (state, x)), P()))
        (y, _), (state_bar, x_bar) = run(state, x, y_bar)
        weights, weights_bar = (weights_of(structure, each) for each in (state, state_bar))
        # The reference knows no mesh.
        wrong = errors(*jax.sharding.reshard((x, y_bar, weights, y, x_bar, weights_bar), P()), k=shape.k)
        return {"saved_bytes": kept, "error": {name: float(value) for name, value in wrong.items()}}

    return accuracy


def built(shape: LayerShape) -> tuple[nnx.GraphDef, nnx.State]:
    """The layer with fresh parameters, the experts' in bfloat16."""
    config = MoEConfig(
        num_experts=shape.experts, expert_width=shape.expert_width, routing=TopK(k=shape.k), balance=()
    )

    def state():
        with logical_rules():
            module = MoELayer(config, shape.width, out_std=1.0, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
        return nnx.split(module)

    structure = jax.eval_shape(state)[0]
    experts_in_bfloat16 = lambda a: a.astype(jnp.bfloat16) if a.ndim == 3 else a  # noqa: E731
    return structure, jax.jit(lambda: jax.tree.map(experts_in_bfloat16, state()[1]))()


def biased(state: nnx.State, bias: jax.Array) -> nnx.State:
    """The state with `bias` added to all logits: the router's first row, for tokens that begin with a one."""

    def with_bias(path, leaf):
        return leaf.at[0].set(bias) if "router" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(with_bias, state)


def passes_of(structure: nnx.GraphDef) -> dict[str, Callable]:
    """Forward, and forward with backward, of (state, x, y_bar)."""
    apply = applied(structure)

    def both(state, x, y_bar):
        y, backward, statistics = jax.vjp(apply, state, x, has_aux=True)
        return (y, statistics), backward(y_bar)

    return {"forward": lambda state, x, y_bar: apply(state, x), "forward + backward": both}


def applied(structure: nnx.GraphDef) -> Callable:
    """The layer as a function of its state. Statistics are returned, lest the compiler leave them out."""

    def apply(state, x):
        token_id, mask = jax.sharding.reshard(
            (jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool)), spec("batch")
        )
        return nnx.merge(structure, state)(x, token_id, mask)

    return apply


def residuals(structure: nnx.GraphDef) -> Callable:
    """What a forward pass keeps for the backward pass, from (state, x)."""
    return lambda state, x: jax.tree.leaves(jax.vjp(applied(structure), state, x, has_aux=True)[1])


def saved_bytes(kept: list[jax.Array], arguments: Any) -> int:
    """Bytes of what is kept, less what equals an argument (tokens, weights) or is kept twice."""
    known, total = [a.reshape(-1) for a in jax.tree.leaves(arguments)], 0
    for leaf in (leaf.reshape(-1) for leaf in kept):
        alike = (a for a in known if (a.shape, a.dtype) == (leaf.shape, leaf.dtype))
        if not any(bool((a == leaf).all()) for a in alike):
            total += leaf.nbytes
            known.append(leaf)
    return total


def weights_of(structure: nnx.GraphDef, state: nnx.State) -> dict[str, jax.Array]:
    """The router's and the experts' matrices."""
    module = nnx.merge(structure, state)
    matrices = ("w_gate", "w_up", "w_down")
    return {"router": module.router.w[...]} | {name: getattr(module.experts, name)[...] for name in matrices}


if __name__ == "__main__":
    serve_cases(start)
