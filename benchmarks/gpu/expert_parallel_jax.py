"""Measured: a layer, and train steps, over several devices along `expert`, and the same work on one."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.cases import Record, attempt
from benchmarks.gpu.grouped_matmul_jax import memory_of, normal
from benchmarks.gpu.moe_layer_jax import passes_of
from benchmarks.gpu.shapes import LayerShape
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.train_step import seconds_of_steps
from moe.dispatch import AllToAll, Dropless, Exchange, Gather, RaggedAllToAll
from moe.mesh import MeshConfig, logical_rules, make_mesh, spec
from moe.nn import AttentionConfig, MoEConfig, MoELayer, TransformerConfig, structure
from moe.optim import AdamW
from moe.routing import TopK
from moe.training.evaluate import to_devices
from moe.training.state import initial_state
from moe.training.step import make_train_step

ExchangeName = Literal["gather", "all-to-all", "ragged"]
EXCHANGES: dict[str, Exchange] = {
    "gather": Gather(),
    "all-to-all": AllToAll(),
    "ragged": RaggedAllToAll(),
}
ALONE = "none: one device"
GROUPS = 8  # sequences of a device: as many chunks as there can be
STEPS = 8  # train steps over which the median is taken
# So that collectives run beside kernels.
OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclass(frozen=True)
class Setting:
    """One way to do the work."""

    shape: LayerShape
    devices: int
    exchange: Exchange | None = None
    chunks: int = 1

    @property
    def name(self) -> str:
        """Of the exchange."""
        return ALONE if self.exchange is None else str(self.exchange)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices along `expert`, or one."""
        count = self.devices if self.exchange else 1
        return make_mesh(MeshConfig(fsdp=1, expert=count), jax.devices()[:count])

    @property
    def moe(self) -> MoEConfig:
        """The layer; one device has the experts of one of several."""
        shape = self.shape
        experts = shape.experts if self.exchange else max(shape.experts // self.devices, shape.k)
        dispatch = Dropless(exchange=self.exchange or Gather(), chunks=self.chunks)
        return MoEConfig(experts, shape.expert_width, TopK(k=shape.k), balance=(), dispatch=dispatch)


def layers(
    shape: LayerShape,
    devices: int,
    methods: list[tuple[Exchange, int]],
    rounds: int,
    deadline: float,
) -> list[Record]:
    """Records of one layer by every method, and by one device alone."""
    settings = [Setting(shape, devices), *(Setting(shape, devices, *method) for method in methods)]
    records: list[Record] = []
    # Compiles side by side before anything is timed, and runs nothing: programs that two threads start may
    # reach devices in different orders, and then wait for one another.
    with ThreadPoolExecutor() as pool:
        ready = [pool.submit(_on, setting.mesh, partial(_compiled, setting)) for setting in settings]
    for setting, compiled in zip(settings, ready, strict=True):
        records += _told(setting, partial(_timed, setting, compiled, rounds), deadline)
    return records


def train_steps(
    shape: LayerShape, devices: int, best: Record, deadline: float, *, quick: bool
) -> list[Record]:
    """Records of train steps with the exchange of a layer's record, and by one device alone."""
    exchange = next(e for e in EXCHANGES.values() if str(e) == best["exchange"])
    settings = [Setting(shape, devices), Setting(shape, devices, exchange, best["chunks"])]
    records: list[Record] = []
    for setting in settings:
        run = partial(_on, setting.mesh, partial(_train, setting, 2 if quick else STEPS))
        records += _told(setting, run, deadline)
    return records


def _told(setting: Setting, measure: Callable, deadline: float) -> Iterator[Record]:
    """A setting's records, or why there are none; and a line on the way."""
    about = {"case": setting.shape.name, "exchange": setting.name, "chunks": setting.chunks}

    def within() -> Iterator[Record]:
        if time.monotonic() > deadline:
            raise TimeoutError("no time was left")
        yield from measure()

    for record in attempt(within):
        print({**about, **record}, file=sys.stderr, flush=True)
        yield about | record


def _on(mesh: jax.sharding.Mesh, function: Callable):
    """What a function gives with a mesh set."""
    with jax.set_mesh(mesh):
        return function()


def _compiled(setting: Setting) -> tuple[Callable, dict[str, Any]]:
    """What draws the state, the tokens and the gradient of a layer's output; and both passes of such."""

    def state():
        with logical_rules():
            module = MoELayer(
                setting.moe, setting.shape.width, out_std=1.0, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)
            )
        return nnx.split(module)

    graph = jax.eval_shape(state)[0]
    tokens = (setting.mesh.size * GROUPS, setting.shape.tokens // GROUPS, setting.shape.width)

    @jax.jit
    def draw():
        drawn = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim == 3 else a, state()[1])
        return drawn, *(jax.sharding.reshard(normal(seed, tokens), spec("batch")) for seed in (1, 2))

    shapes, options = jax.eval_shape(draw), OVERLAP if jax.devices()[0].platform == "gpu" else None
    passes = passes_of(graph).items()
    return draw, {name: jax.jit(one).lower(*shapes).compile(options) for name, one in passes}


def _timed(setting: Setting, compiled: Future, rounds: int) -> Iterator[Record]:
    draw, runs = compiled.result()
    with jax.set_mesh(setting.mesh):
        arguments = draw()
    for name, run in runs.items():
        record = {"pass": name, "flops": setting.shape.flops(backward=name != "forward")}
        seconds = seconds_of_rounds(partial(run, *arguments), jax.block_until_ready, rounds)
        yield record | {"seconds": seconds} | memory_of(run)


def _train(setting: Setting, steps: int) -> list[Record]:
    """Steps of a model of a few such layers, on half as many tokens."""
    shape, count = setting.shape, jax.sharding.get_mesh().size
    heads = max(shape.width // 128, 4)
    model = TransformerConfig(
        vocab_size=16 * shape.width,
        width=shape.width,
        layers="MM",
        attention=AttentionConfig(heads=heads, kv_heads=heads, head_width=shape.width // heads),
        moe=setting.moe,
        unroll=True,
    )
    length = shape.tokens // 2 // GROUPS
    graph, shapes = structure(model)
    transformation = AdamW().build(shapes, 100)
    train_step = make_train_step(graph, transformation, chunks=4)
    state = initial_state(model, transformation, seed=0, average=False)
    random = np.random.default_rng(0)
    rows = random.integers(model.vocab_size, size=(count * GROUPS, length + 1), dtype=np.int32)
    tokens, slices = to_devices(rows), to_devices(np.zeros(len(rows), np.int32))
    key = jax.random.key(0)
    options = OVERLAP if jax.devices()[0].platform == "gpu" else None
    compiled = train_step.lower(state, key, tokens, slices, 1).compile(compiler_options=options)

    def step():
        nonlocal state
        state, metrics = compiled(state, key, tokens, slices)
        return metrics

    seconds, loss = seconds_of_steps(step, steps)
    return [{"pass": "train step", "seconds": seconds, "loss": loss} | memory_of(compiled)]
