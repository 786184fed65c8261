"""Starting points of a run: parameters made from those of another run."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from moe.errors import UserError
from moe.nn.pattern import places
from moe.nn.quantized import CLIP
from moe.nn.router import LinearRouter
from moe.nn.transformer import TransformerConfig, structure
from moe.routing import TopK


@dataclass(frozen=True)
class Init:
    """Makes a run's first parameters from those of another run. A frozen dataclass, and its own config."""

    run: str = ""
    """Directory of that run; its newest checkpoint is read when this run starts from nothing."""

    def check(self, source: TransformerConfig, target: TransformerConfig) -> None:
        """Refuse two models of which the second cannot start from the first.

        Raises:
            UserError: one line naming the field.
        """

    def __call__(
        self,
        source: TransformerConfig,
        trained: nnx.State,
        target: TransformerConfig,
        fresh: nnx.State,
        key: Key[Array, ""],
    ) -> nnx.State:
        """The first parameters, laid out as `fresh` is.

        Args:
            source: the other run's model.
            trained: its parameters.
            target: this run's model.
            fresh: its parameters, drawn at random.
            key: more randomness.
        """
        raise NotImplementedError

    def controllers(self, trained: nnx.State, fresh: nnx.State) -> nnx.State:
        """What controllers and strategies start with: `fresh`, unless it goes with the parameters.

        Args:
            trained: the other run's.
            fresh: as at the start of a run.
        """
        return fresh


@dataclass(frozen=True)
class Continue(Init):
    """The same parameters, and the same bias of the choice; the rest of the config may be another.

    Training goes on with other data, another optimizer, other balancers; all that has parameters, and
    attention, must be as in the other run.
    """

    def check(self, source: TransformerConfig, target: TransformerConfig) -> None:
        """See `Init`."""
        for name in ("vocab_size", "width", "layers", "attention", "tied_embedding", "norm_epsilon"):
            _same(f"model.{name}", getattr(source, name), getattr(target, name), self.run)
        theirs, ours = (
            {"/".join(map(str, path)): p.shape for path, p in nnx.to_flat_state(structure(config)[1])}
            for config in (source, target)
        )
        for name in sorted(theirs.keys() | ours.keys()):
            _same(f"the shape of {name}", theirs.get(name), ours.get(name), self.run)

    def __call__(
        self,
        source: TransformerConfig,
        trained: nnx.State,
        target: TransformerConfig,
        fresh: nnx.State,
        key: Key[Array, ""],
    ) -> nnx.State:
        """See `Init`."""
        return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(trained))

    def controllers(self, trained: nnx.State, fresh: nnx.State) -> nnx.State:
        """See `Init`; what both runs have, under one name and of one shape."""
        kept = {path: variable[...] for path, variable in nnx.to_flat_state(trained)}
        leaves = []
        for path, variable in nnx.to_flat_state(fresh):
            own = variable[...]
            leaves.append(kept[path] if path in kept and kept[path].shape == own.shape else own)
        return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


@dataclass(frozen=True)
class Upcycle(Init):
    """Every expert starts as a copy of the dense feed-forward (2212.05055); the rest but routers is copied.

    Where `dense_width` is G times `expert_width`, an expert is a copy of one of G equal parts of the hidden
    units, and G neighbouring experts, which together are the dense feed-forward, share their router column
    (virtual groups, 2410.07524 section 2.3): tokens then choose whole groups. Outputs are scaled by G, half
    of it (the root) on w_up and half on w_down.

    Where a token's combine weights sum to one, as in TopK(k), the model starts with exactly the dense model's
    loss.
    """

    noise: float = 0.0
    """Standard deviation of what is added to each expert's matrices, relative to the matrix's own."""

    scale: float = 1.0
    """Factor on the experts' outputs besides G: one over the sum of a token's combine weights keeps the dense
    model's outputs."""

    def check(self, source: TransformerConfig, target: TransformerConfig) -> None:
        """See `Init`."""
        if set(source.layers) != {"D"}:
            raise UserError(f"init.run={self.run} has model.layers={source.layers!r}; give a run of D layers")
        for name in ("vocab_size", "width", "attention", "tied_embedding", "norm_epsilon"):
            _same(f"model.{name}", getattr(source, name), getattr(target, name), self.run)
        _same("the number of model.layers", len(source.layers), len(target.layers), self.run)
        if "D" in target.layers.upper():
            _same("model.dense_width", source.dense_width, target.dense_width, self.run)
        if not target.moe_layers:
            return
        moe = target.moe
        extra = {"latent_width": 0, "shared_experts": 0, "free_experts": type(moe.free_experts)()}
        for name, without in extra.items():
            if getattr(moe, name) != without:
                raise UserError(
                    f"model.moe.{name}={getattr(moe, name)} has nothing to start from under init=Upcycle; "
                    "leave it out"
                )
        if not isinstance(moe.expert_width, int) or source.dense_width % moe.expert_width:
            raise UserError(
                f"model.moe.expert_width={moe.expert_width} must divide model.dense_width="
                f"{source.dense_width} of init.run={self.run}"
            )
        parts = source.dense_width // moe.expert_width
        if parts == 1:
            return
        if moe.num_experts % parts:
            raise UserError(
                f"model.moe.num_experts={moe.num_experts} must be a multiple of the {parts} parts into which "
                "init=Upcycle splits the dense feed-forward"
            )
        if not isinstance(moe.routing, TopK) or moe.routing.k % parts or moe.router != LinearRouter():
            raise UserError(
                f"init=Upcycle splits the dense feed-forward into {parts} parts, so that tokens must choose "
                f"groups of {parts} experts: set model.moe.routing to TopK with a multiple of {parts} as k, "
                "and model.moe.router to LinearRouter()"
            )

    def __call__(
        self,
        source: TransformerConfig,
        trained: nnx.State,
        target: TransformerConfig,
        fresh: nnx.State,
        key: Key[Array, ""],
    ) -> nnx.State:
        """See `Init`."""

        def start(trained, fresh, key):
            dense = {path: variable[...] for path, variable in nnx.to_flat_state(trained)}
            leaves = []
            for index, (path, variable) in enumerate(nnx.to_flat_state(fresh)):
                own, leaf_key = variable[...], jax.random.fold_in(key, index)
                value = self._leaf(path, own, dense, source, target, leaf_key)
                leaves.append(jax.sharding.reshard(value, jax.typeof(own).sharding.spec))
            return jax.tree.unflatten(jax.tree.structure(fresh), leaves)

        return jax.jit(start)(trained, fresh, key)

    def _leaf(self, path, own, dense, source: TransformerConfig, target: TransformerConfig, key):
        """The first values of one parameter; `own` are those drawn at random."""
        if str(path[-1]).endswith(CLIP):
            return own
        if path[0] != "stacks":
            return dense[path]
        _, run, _, place, *name = path
        if name[0] == "depth" or (name[0] == "moe" and name[1] not in ("experts", "router")):
            return own
        parts = source.dense_width // target.moe.width_classes[0][1]
        if name[:2] == ["moe", "router"]:
            return own if parts == 1 else _shared_columns(own, parts)

        def layer(where, name):
            """One layer's part of the dense model's parameter of that name."""
            run, place, repetition = where
            stacked = jax.sharding.reshard(dense["stacks", run, "blocks", place, *name], jax.P())
            return stacked[repetition]

        stacked = []
        for of_source, of_target in zip(places(source.layers), places(target.layers), strict=True):
            if of_target[:2] == (run, place):
                stacked.append(layer(of_source, ["dense", *name[2:]] if name[0] == "moe" else name))
        value = jnp.stack(stacked)
        if name[0] != "moe":
            return value
        value = self._experts(value, name[-1], parts, own.shape[1])
        return value + self.noise * value.std() * jax.random.normal(key, value.shape)

    def _experts(self, w: Float[Array, "L ..."], name: str, parts: int, experts: int):
        """[L, D, H] -> [L, E, D, H / parts], or for w_down [L, H, D] -> [L, E, H / parts, D]."""
        hidden_axis = 1 if name == "w_down" else 2
        if name != "w_gate":
            w = w * (self.scale * parts) ** 0.5
        split = jnp.stack(jnp.split(w, parts, axis=hidden_axis), axis=1)
        return jnp.tile(split, (1, experts // parts, 1, 1))


def _shared_columns(w: Float[Array, "L D E"], parts: int) -> Float[Array, "L D E"]:
    """Groups of `parts` neighbouring experts, each with one column."""
    return jnp.repeat(w[..., ::parts], parts, axis=-1)


def _same(what: str, theirs: object, ours: object, run: str) -> None:
    if theirs != ours:
        raise UserError(f"{what} is {theirs} in init.run={run} and {ours} here; make them equal")
