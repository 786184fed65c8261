"""Optimizers and schedules, made with optax. Knows no model: parameters say what they are by axis names."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe.errors import UserError

UNDECAYED_AXIS = "norm"  # scales and biases
NOT_MUON_AXES = {
    "norm",
    "vocab",
    "router",
}  # no hidden matrices: Adam serves them better (2502.16982, section 2)


@dataclass(frozen=True)
class Schedule(ABC):
    """Learning rate over a run, as a factor between 0 and 1 of the optimizer's."""

    warmup: int = 100
    """Steps of linear rise from 0."""

    final: float = 0.1
    """Factor at the end of the run."""

    def __call__(self, steps: int) -> optax.Schedule:
        """The factor as a function of the step, for a run of `steps` steps."""
        warmup = min(self.warmup, steps)
        rise = optax.linear_schedule(1.0 / max(warmup, 1), 1.0, max(warmup - 1, 1))
        return optax.join_schedules([rise, self.after_warmup(max(steps - warmup, 1))], [warmup])

    @abstractmethod
    def after_warmup(self, steps: int) -> optax.Schedule:
        """The part that follows the warm-up."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `final` (1608.03983)."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        """See `Schedule`."""
        return optax.cosine_decay_schedule(1.0, steps, alpha=self.final)


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from 1 to `final`."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        """See `Schedule`."""
        return optax.linear_schedule(1.0, self.final, steps)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable at 1, then a straight decay to `final` (MiniCPM 2404.06395)."""

    decay_fraction: float = 0.2
    """Part of the run that decays."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        """See `Schedule`."""
        decay = max(round(self.decay_fraction * steps), 1)
        fall = optax.linear_schedule(1.0, self.final, decay)
        return optax.join_schedules([optax.constant_schedule(1.0), fall], [steps - decay])


@dataclass(frozen=True)
class Optimizer(ABC):
    """An optimizer with its schedule, its gradient clipping and its decay."""

    learning_rate: float = 3e-4
    """Peak learning rate."""

    schedule: Schedule = field(default_factory=Cosine)
    """Cosine(), WSD() or Linear()."""

    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings (times the learning rate); never of scales and biases."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be positive")

    def build(self, params: nnx.State, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` steps over these parameters (or their shapes)."""
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        return optax.chain(clip, self.update_rule(params, self.rate(steps)))

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate as a function of the step."""
        factor = self.schedule(steps)
        return lambda step: self.learning_rate * factor(step)

    @abstractmethod
    def update_rule(self, params: nnx.State, rate: optax.Schedule) -> optax.GradientTransformation:
        """What turns clipped gradients into updates."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (1711.05101)."""

    b1: float = 0.9
    """Decay of the first moment."""

    b2: float = 0.95
    """Decay of the second moment."""

    epsilon: float = 1e-8
    """Added to the root of the second moment."""

    first_moment: Literal["float32", "bfloat16"] = "float32"
    """How the first moment is stored; bfloat16 (DeepSeek-V3, 2412.19437, section 3.3.3) takes a sixth off the
    memory of parameters and moments. The second moment is always float32."""

    def update_rule(self, params: nnx.State, rate: optax.Schedule) -> optax.GradientTransformation:
        """See `Optimizer`."""
        return optax.adamw(
            rate,
            self.b1,
            self.b2,
            self.epsilon,
            mu_dtype=self.first_moment,
            weight_decay=self.weight_decay,
            mask=_decayed(params),
        )


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for hidden matrices, each layer's and each expert's by itself; AdamW for the rest (both Nesterov).

    Updates are scaled to AdamW's usual root mean square of 0.2 (2502.16982 eq. 4), so that learning rate and
    weight decay carry over between the two.
    """

    momentum: float = 0.95
    """Decay of Muon's momentum (Nesterov)."""

    b1: float = 0.9
    """AdamW's decay of the first moment."""

    b2: float = 0.95
    """AdamW's decay of the second moment."""

    products: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products that orthogonalise; in bfloat16, as in the original, a GPU is quicker."""

    def update_rule(self, params: nnx.State, rate: optax.Schedule) -> optax.GradientTransformation:
        """See `Optimizer`."""
        hidden = optax.chain(
            optax.trace(self.momentum, nesterov=True),
            optax.stateless(lambda updates, _: jax.tree.map(self._direction, updates)),
        )
        rules: dict[Hashable, optax.GradientTransformation] = {
            "hidden": hidden,
            "others": optax.scale_by_adam(self.b1, self.b2, nesterov=True),
        }
        kinds = _map_axes(lambda axes: "others" if NOT_MUON_AXES & set(axes) else "hidden", params)
        return optax.chain(
            optax.partition(rules, kinds),
            optax.add_decayed_weights(self.weight_decay, _decayed(params)),
            optax.scale_by_learning_rate(rate),
        )

    def _direction(self, momentum: jax.Array) -> jax.Array:
        rows, columns = momentum.shape[-2:]
        direction = orthogonalized(momentum.astype(self.products)).astype(momentum.dtype)
        return 0.2 * max(rows, columns) ** 0.5 * direction


def orthogonalized(matrices: jax.Array) -> jax.Array:
    """Matrices with about the same singular vectors, and singular values between 0.7 and 1.2.

    Five Newton-Schulz iterations of Muon's polynomial (Jordan et al., kellerjordan.github.io/posts/muon).
    optax offers them in float32 alone, and makes one axis of all in front: split over devices, experts would
    be gathered.

    Args:
        matrices: (..., rows, columns), each by itself, in the precision of the products.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True) + 1e-8).astype(x.dtype)

    def iterate(_, x):
        square = x @ x.mT
        return 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x

    x = jax.lax.fori_loop(0, 5, iterate, x)  # a loop: unrolled, it compiled longer than the rest of a step
    return x.mT if tall else x


def _decayed(params: nnx.State):
    return _map_axes(lambda axes: UNDECAYED_AXIS not in axes, params)


def _map_axes(function, params: nnx.State):
    """A tree like `params` with `function(logical axis names)` in the place of each array."""

    def one(variable: nnx.Variable):
        answer = function(variable.get_metadata("out_sharding"))
        return jax.tree.map(lambda _: answer, variable)

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
