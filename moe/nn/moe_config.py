"""What one mixture-of-experts layer is made of, and what cannot go together."""

from dataclasses import dataclass, field
from itertools import groupby

from moe.balance import BalanceLoss, Balancer, Controller, LoadBalanceLoss, ZLoss
from moe.dispatch import Dispatch, Dropless
from moe.errors import UserError
from moe.nn.free_experts import FreeExperts
from moe.nn.router import LinearRouter, Router
from moe.nn.shared_experts import SharedGate
from moe.routing import Blending, Strategy, TopK


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer. Router, strategy, balancers, dispatch and expert shape combine freely."""

    num_experts: int = 8
    """Routed experts E."""

    expert_width: int | tuple[int, ...] = 256
    """Hidden width F of each routed expert: one for all, or one for each, equal ones side by side (HMoE
    2408.10681). In a config: expert_width=4 * (128,) + 2 * (256,)."""

    routing: Strategy = field(default_factory=TopK)
    """Which tokens go to which experts, for example TopK(k=2)."""

    balance: tuple[Balancer, ...] = (LoadBalanceLoss(), ZLoss())
    """What keeps the experts evenly used: any number of losses, at most one controller."""

    dispatch: Dispatch = field(default_factory=Dropless)
    """How tokens reach their experts: Dropless() or Capacity(capacity_factor=1.25)."""

    router: Router = field(default_factory=LinearRouter)
    """What makes the logits: LinearRouter(), LinearRouter(trained=False), CosineRouter() or MLPRouter()."""

    free_experts: FreeExperts = field(default_factory=FreeExperts)
    """Experts that cost nothing, which the router chooses from besides the E real ones."""

    latent_width: int = 0
    """Width to which tokens are projected for the routed experts (LatentMoE 2601.18089); 0: they see D."""

    shared_experts: int = 0
    """Experts that every token uses besides its routed ones, each of `shared_width`. One as wide as a dense
    layer is the dense residual of Arctic (shared_gate none) or of DeepSpeed's Residual-MoE (softmax)."""

    shared_width: int = 0
    """Hidden width of one shared expert; 0 takes `expert_width`."""

    shared_gate: SharedGate = "none"
    """How the shared output joins the routed one: none adds it; sigmoid weighs it by a learned gate first
    (Qwen2-MoE); softmax weighs both by two learned coefficients that sum to one (Residual-MoE 2201.05596)."""

    tokens_per_group: int = 0
    """Tokens among which a strategy decides and a capacity holds; 0 takes one sequence."""

    def __post_init__(self):
        if self.num_experts < 1:
            raise UserError(f"model.moe.num_experts={self.num_experts} must be at least 1")
        self.routing.check(self.num_choices)
        self.dispatch.exchange.check(keep_outputs=self.needs_outputs)
        self._check_shape()
        self._check_router()
        self._check_balance()

    @property
    def num_choices(self) -> int:
        """What a strategy chooses from: the E experts, then the free ones."""
        return self.num_experts + self.free_experts.count

    @property
    def width_classes(self) -> tuple[tuple[int, int], ...]:
        """(number of experts, hidden width) of each run of equally wide experts."""
        if isinstance(self.expert_width, int):
            return ((self.num_experts, self.expert_width),)
        return tuple((len(list(run)), width) for width, run in groupby(self.expert_width))

    @property
    def controller(self) -> Controller | None:
        """The balancer that steers the choice through a bias, if there is one."""
        return next((b for b in self.balance if isinstance(b, Controller)), None)

    @property
    def shared_hidden(self) -> int:
        """Hidden width of all shared experts together."""
        return self.shared_experts * (self.shared_width or self.width_classes[0][1])

    @property
    def needs_outputs(self) -> bool:
        """Whether the strategy or a balancer reads the experts' outputs one by one."""
        return self.routing.needs_outputs or any(b.needs_outputs for b in self.balance)

    def experts_per_token(self, sequence: int, *, training: bool = False) -> float:
        """Mean K that compute accounts charge to a token of sequences of this length, free experts left out.

        Where some are free this is the mean under even use of all that the router chooses from: K E / (E +
        free). What a run really used is its metric `experts_per_token`.

        Args:
            sequence: tokens of a sequence.
            training: for a training step, where some strategies compute more than in a forward pass.
        """
        if isinstance(self.routing, Blending):
            tokens = self.tokens_per_group or sequence
            return self.routing.experts_per_group(self.num_experts, tokens) / tokens
        count = self.routing.trained_experts_per_token if training else self.routing.experts_per_token
        return count(self.num_choices) * self.num_experts / self.num_choices

    def group_shape(self, batch: int, sequence: int) -> tuple[int, int]:
        """Groups, and tokens of each, in a micro-batch.

        Raises:
            UserError: it does not divide into groups.
        """
        tokens = self.tokens_per_group or sequence
        if (sequence % tokens and tokens % sequence) or (batch * sequence) % tokens:
            raise UserError(
                f"model.moe.tokens_per_group={tokens} must divide a sequence of {sequence} tokens or be a "
                f"multiple of it, and divide the {batch * sequence} tokens of a micro-batch"
            )
        return batch * sequence // tokens, tokens

    def _check_shape(self) -> None:
        classes, routing = self.width_classes, type(self.routing).__name__
        if isinstance(self.expert_width, tuple) and len(self.expert_width) != self.num_experts:
            raise UserError(
                f"model.moe.expert_width has {len(self.expert_width)} widths for "
                f"model.moe.num_experts={self.num_experts}; give one for each expert, or one for all"
            )
        if min(width for _, width in classes) < 1:
            raise UserError(f"model.moe.expert_width={self.expert_width} must be at least 1")
        if len({width for _, width in classes}) < len(classes):
            raise UserError(
                f"model.moe.expert_width={self.expert_width} must hold equally wide experts side by side; "
                "sort it"
            )
        if self.shared_experts and not self.shared_width and len(classes) > 1:
            raise UserError(
                "model.moe.shared_width must say how wide the shared experts are where widths differ"
            )
        if self.shared_gate != "none" and not self.shared_experts:
            raise UserError(
                f"model.moe.shared_gate={self.shared_gate} weighs shared experts, but there are none; set "
                "model.moe.shared_experts=1 or leave it out"
            )
        if self.latent_width < 0:
            raise UserError(f"model.moe.latent_width={self.latent_width} must not be negative")
        if isinstance(self.routing, Blending) and (self.free_experts.count or len(classes) > 1):
            what = "free_experts" if self.free_experts.count else "expert_width"
            raise UserError(
                f"model.moe.{what}={getattr(self, what)} needs tokens that go to single experts; under "
                f"{routing} all experts must be of one kind and width"
            )

    def _check_router(self) -> None:
        if not self.routing.routes_by_logits and self.router != LinearRouter():
            raise UserError(
                f"model.moe.router={self.router} would not be used: {type(self.routing).__name__} routes "
                "without a router; leave it out"
            )
        for balancer in self.balance:
            if balancer.needs_router_matrix and not self.router.trains_matrix:
                raise UserError(
                    f"model.moe.balance has {type(balancer).__name__}, which acts on a trained router "
                    f"matrix; model.moe.router={self.router} has none"
                )

    def _check_balance(self) -> None:
        routing = type(self.routing).__name__
        controllers = [type(b).__name__ for b in self.balance if isinstance(b, Controller)]
        if len(controllers) > 1:
            raise UserError(
                f"model.moe.balance has {len(controllers)} controllers ({', '.join(controllers)}); keep one"
            )
        if controllers and not self.routing.takes_bias:
            raise UserError(
                f"model.moe.balance has {controllers[0]}, but {routing} makes no choice that a bias could "
                "steer; leave it out"
            )
        for balancer in self.balance:
            if not self.routing.can_be_balanced and isinstance(balancer, BalanceLoss | Controller):
                raise UserError(
                    f"model.moe.balance has {type(balancer).__name__}, but {routing} does not learn how many "
                    "tokens each expert gets, so there is nothing to balance; say balance=()"
                )
            if balancer.needs_outputs and isinstance(self.routing, Blending):
                raise UserError(
                    f"model.moe.balance has {type(balancer).__name__}, which reads each expert's outputs; "
                    f"under {routing} tokens have none of their own"
                )
            missing = [name for name in balancer.requires if name not in self.routing.observes]
            if missing:
                raise UserError(
                    f"model.moe.balance has {type(balancer).__name__}, which needs `{missing[0]}` from the "
                    f"strategy; {routing} does not tell it"
                )
            balancer.check(self.routing, self.num_choices, self.free_experts.count)
