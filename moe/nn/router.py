"""Routers make logits. A router is a frozen dataclass, its own config; it builds a module for each layer."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.errors import UserError
from moe.kernels import linear_float32
from moe.nn.parameter import normal

MIN_TEMPERATURE = 0.01  # of a cosine router


class RouterModule(nnx.Module):
    """What a router builds, in float32 throughout: rounding would decide routes (Switch 2101.03961, 2.4)."""

    def __call__(self, x: Float[Array, "groups T D"]) -> Float[Array, "groups T E"]:
        """Logits of every expert for every token."""
        raise NotImplementedError

    def matrix(self) -> Float[Array, "_ E"] | None:
        """The last matrix, one column an expert, for balancers that act on it; None where there is none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Router:
    """From a token to one logit for every expert."""

    @property
    def trains_matrix(self) -> bool:
        """Whether there is a trained matrix with one column an expert (`Balancer.needs_router_matrix`)."""
        return True

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        """The module of one layer.

        Args:
            width: of the tokens, D.
            num_experts: logits it makes, free experts included.
            rngs: randomness of the initial values.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LinearRouter(Router):
    """logits = x w (Shazeer 2017, 1701.06538)."""

    trained: bool = True
    """False leaves the matrix as it was drawn: the control that tells what a learned router is worth."""

    @property
    def trains_matrix(self) -> bool:
        """See `Router`."""
        return self.trained

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        """See `Router`."""
        return LinearRouterModule(width, num_experts, trained=self.trained, rngs=rngs)


@dataclass(frozen=True)
class CosineRouter(Router):
    """logits_e = cos(x p, w_e) / temperature, on a sphere of few dimensions (XMoE 2204.09179).

    Token and experts count by direction alone, so an expert cannot draw tokens by the length of its vector,
    and the low dimension keeps tokens from gathering around the experts' directions in the model's own space.
    The temperature is learned, and held above 0.01 (as in Tutel's cosine gate).
    """

    dimensions: int = 0
    """Dimensions of the sphere; 0 takes half the number of experts (XMoE)."""

    temperature: float = 0.07
    """Where the learned temperature starts; logits lie within 1 / temperature of zero."""

    def __post_init__(self):
        if self.dimensions < 0:
            raise UserError(f"model.moe.router.dimensions={self.dimensions} must not be negative")
        if not self.temperature >= MIN_TEMPERATURE:
            raise UserError(
                f"model.moe.router.temperature={self.temperature} must be at least {MIN_TEMPERATURE}"
            )

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        """See `Router`."""
        dimensions = self.dimensions or max(num_experts // 2, 1)
        return CosineRouterModule(width, dimensions, num_experts, temperature=self.temperature, rngs=rngs)


@dataclass(frozen=True)
class MLPRouter(Router):
    """logits = tanh(x w_hidden) w: one hidden layer, as in the code of MoE++ (2410.07348)."""

    hidden: int = 0
    """Width of the hidden layer; 0 takes eight times the number of experts (MoE++)."""

    def __post_init__(self):
        if self.hidden < 0:
            raise UserError(f"model.moe.router.hidden={self.hidden} must not be negative")

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        """See `Router`."""
        return MLPRouterModule(width, self.hidden or 8 * num_experts, num_experts, rngs=rngs)


class Frozen(nnx.Variable):
    """Drawn at the start and never changed: no parameter, so neither gradient nor weight decay reach it."""


class LinearRouterModule(RouterModule):
    """See `LinearRouter`."""

    def __init__(self, width: int, num_experts: int, *, trained: bool, rngs: nnx.Rngs):
        w = normal(rngs.params(), (width, num_experts), ("router", None), width**-0.5)
        self.w = w if trained else Frozen(w[...], out_sharding=("router", None))

    def __call__(self, x: Float[Array, "groups T D"]) -> Float[Array, "groups T E"]:
        """See `RouterModule`."""
        return linear_float32(x, self.w[...])

    def matrix(self) -> Float[Array, "D E"]:
        """The matrix."""
        return self.w[...]


class CosineRouterModule(RouterModule):
    """See `CosineRouter`."""

    def __init__(self, width: int, dimensions: int, num_experts: int, *, temperature: float, rngs: nnx.Rngs):
        self.w_project = normal(rngs.params(), (width, dimensions), ("router", None), width**-0.5)
        self.w = normal(rngs.params(), (dimensions, num_experts), ("router", None), dimensions**-0.5)
        self.log_scale = nnx.Param(jnp.full(1, -math.log(temperature)), out_sharding=("norm",))

    def __call__(self, x: Float[Array, "groups T D"]) -> Float[Array, "groups T E"]:
        """See `RouterModule`."""
        scale = jnp.exp(jnp.minimum(self.log_scale[...], -math.log(MIN_TEMPERATURE)))
        return scale * linear_float32(
            _direction(linear_float32(x, self.w_project[...]), axis=-1), self.matrix()
        )

    def matrix(self) -> Float[Array, "_ E"]:
        """The experts' directions, each of length one."""
        return _direction(self.w[...], axis=0)


class MLPRouterModule(RouterModule):
    """See `MLPRouter`."""

    def __init__(self, width: int, hidden: int, num_experts: int, *, rngs: nnx.Rngs):
        self.w_hidden = normal(rngs.params(), (width, hidden), ("router", None), width**-0.5)
        self.w = normal(rngs.params(), (hidden, num_experts), ("router", None), hidden**-0.5)

    def __call__(self, x: Float[Array, "groups T D"]) -> Float[Array, "groups T E"]:
        """See `RouterModule`."""
        return linear_float32(jnp.tanh(linear_float32(x, self.w_hidden[...])), self.w[...])

    def matrix(self) -> Float[Array, "_ E"]:
        """The matrix behind the hidden layer."""
        return self.w[...]


def _direction(x, axis: int):
    """x / |x|; a vector of zeros stays one, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))
