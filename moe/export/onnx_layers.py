"""The layers of a model as ONNX operators, with ONNX Runtime's for attention and experts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from moe.export import onnx_products
from moe.export.onnx_graph import Graph
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.quant import Format
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

NEVER = -1e30  # a logit that no softmax and no choice sees


@dataclass(frozen=True)
class Layer:
    """Adds one layer's operators; values are named by strings."""

    graph: Graph
    """To add them to."""

    model: TransformerConfig
    """The model."""

    number: int
    """Of the layer."""

    read: Callable[[str], np.ndarray | None]
    """The layer's parameters by name; None where it has none of that name."""

    format: Format | None
    """Of matrices; None: float32."""

    def __call__(self, x: str, context: dict[str, str]) -> str:
        """x + attention(norm(x)), then x + feed-forward(norm(x)).

        Args:
            x: tokens [B, S, D].
            context: what attention needs to know of the past: `lengths`, `longest`, `cos`, `sin`.
        """
        x = self.graph.add("Add", x, self._attention(self.norm(x, "attention_norm"), context))
        h = self.norm(x, "feed_forward_norm")
        mixed = self.model.layers[self.number] == "M"
        return self.graph.add("Add", x, self._mixture(h) if mixed else self._feed_forward(h, "dense"))

    def norm(self, x: str, name: str) -> str:
        """RMSNorm over the last axis."""
        scale = self._array(f"{name}/scale")
        return self.graph.add(
            "SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=self.model.norm_epsilon, stash_type=1
        )

    def _parameter(self, name: str) -> np.ndarray:
        found = self.read(name)
        assert found is not None, name
        return found

    def _array(self, name: str) -> str:
        return self.graph.array(f"layers.{self.number}/{name}", self._parameter(name))

    def _linear(self, x: str, name: str) -> str:
        where = f"layers.{self.number}/{name}"
        return onnx_products.multiply(self.graph, x, where, self._parameter(name), self.format)

    def _attention(self, x: str, context: dict[str, str]) -> str:
        config, graph = self.model.attention, self.graph
        assert isinstance(config, AttentionConfig), "nothing else is carried"
        q, k, v = (self._linear(x, f"attention/w_{name}") for name in "qkv")
        if config.bias:
            biases = [self._array(f"attention/b_{name}") for name in "qkv"]
            q, k, v = (graph.add("Add", a, b) for a, b in zip((q, k, v), biases, strict=True))
        if config.qk_norm != "none":
            q, k = self._normed(q, "q", config), self._normed(k, "k", config)
        here = f"layers.{self.number}/attended"
        names = [f"{self.number}.{what}" for what in ("key", "value")]
        graph.add_named(
            "GroupQueryAttention",
            *(q, k, v),
            *(f"past_key_values.{name}" for name in names),
            *(context[name] for name in ("lengths", "longest", "cos", "sin")),
            outputs=[here, *(f"present.{name}" for name in names)],
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=int(config.rotary_width > 0),
            scale=config.head_width**-0.5,
        )
        return self._linear(here, "attention/w_out")

    def _normed(self, x: str, name: str, config: AttentionConfig) -> str:
        """Queries or keys [B, S, (H h)] normalised, over each head or all together."""
        if config.qk_norm == "full":
            return self.norm(x, f"attention/{name}_norm")
        heads = self.graph.add("Reshape", x, self.graph.integers(0, 0, -1, config.head_width))
        return self.graph.add(
            "Reshape", self.norm(heads, f"attention/{name}_norm"), self.graph.integers(0, 0, -1)
        )

    def _feed_forward(self, x: str, name: str) -> str:
        gate, up = self._linear(x, f"{name}/w_gate"), self._linear(x, f"{name}/w_up")
        silu = self.graph.add("Mul", gate, self.graph.add("Sigmoid", gate))
        return self._linear(self.graph.add("Mul", silu, up), f"{name}/w_down")

    def _mixture(self, x: str) -> str:
        graph, moe = self.graph, self.model.moe
        assert isinstance(moe.routing, TopK), "no other strategy is carried"
        logits, factor = self._route(graph.add("MatMul", x, self._array("moe/router/w")), moe.routing)
        gate, up, down = (self._parameter(f"moe/experts/w_{name}") for name in ("gate", "up", "down"))
        y = onnx_products.experts(
            graph,
            x,
            graph.add("Reshape", logits, graph.integers(-1, moe.num_experts)),
            f"layers.{self.number}/moe/experts",
            (gate, up, down),
            moe.routing.k,
            self.format,
        )
        y = graph.add("Mul", y, factor) if factor else y
        return self._with_shared(x, y, moe) if moe.shared_experts else y

    def _with_shared(self, x: str, routed: str, moe: MoEConfig) -> str:
        """Routed and shared experts together; see `moe.nn.shared_experts`."""
        graph, shared = self.graph, self._feed_forward(x, "moe/shared")
        if moe.shared_gate == "none":
            return graph.add("Add", routed, shared)
        gate = graph.add("MatMul", x, self._array("moe/shared/w_shared_gate"))
        if moe.shared_gate == "sigmoid":
            return graph.add("Add", routed, graph.add("Mul", shared, graph.add("Sigmoid", gate)))
        of_routed, of_shared = (f"layers.{self.number}/{what}" for what in ("of_routed", "of_shared"))
        graph.add_named(
            "Split",
            graph.add("Softmax", gate, axis=-1),
            outputs=[of_routed, of_shared],
            axis=-1,
            num_outputs=2,
        )
        return graph.add("Add", graph.add("Mul", routed, of_routed), graph.add("Mul", shared, of_shared))

    def _route(self, logits: str, routing: TopK) -> tuple[str, str]:
        """Logits for the experts' operator, which takes a softmax of the k largest; a factor, or nothing.

        Other rules than that choose here: the operator then gets the logarithms of their weights.
        """
        graph, bias = self.graph, self.read("moe/controller_state/bias")
        scale = graph.number(routing.scale) if routing.scale != 1.0 else ""
        if type(routing) is TopK and routing.scores == "softmax" and routing.renormalize and bias is None:
            return logits, scale
        scores = ranked = self._scores(logits, routing)
        if bias is not None:
            ranked = graph.add("Add", scores, self._array("moe/controller_state/bias"))
        if isinstance(routing, GroupLimitedTopK):
            ranked = self._in_best_groups(ranked, routing)
        _, expert = self._top(ranked, routing.k)
        weight = graph.add("GatherElements", scores, expert, axis=-1)
        # A weight that underflows is none: its logarithm must stay finite.
        kept = graph.add("Log", graph.add("Max", weight, graph.number(1e-30)))
        chosen = graph.add("ScatterElements", self._filled(scores), expert, kept, axis=-1)
        if routing.renormalize:
            return chosen, scale
        total = graph.add("ReduceSum", weight, graph.integers(-1))
        return chosen, graph.add("Mul", total, scale) if scale else total

    def _scores(self, logits: str, routing: TopK) -> str:
        """See `moe.routing.scores`."""
        graph = self.graph
        if routing.scores == "softmax":
            return graph.add("Softmax", logits, axis=-1)
        if routing.scores == "sigmoid":
            return graph.add("Sigmoid", logits)
        return graph.add("Sqrt", graph.add("Softplus", graph.add("Max", logits, graph.number(-80.0))))

    def _in_best_groups(self, ranked: str, routing: GroupLimitedTopK) -> str:
        """Experts outside a token's best groups ranked last."""
        graph = self.graph
        grouped = graph.add("Reshape", ranked, graph.integers(0, 0, routing.num_groups, -1))
        best, _ = self._top(grouped, routing.best_of_group)
        strength, group = self._top(
            graph.add("ReduceSum", best, graph.integers(-1), keepdims=0), routing.kept_groups
        )
        dropped = self._filled(graph.add("ReduceSum", grouped, graph.integers(-1), keepdims=0))
        penalty = graph.add("ScatterElements", dropped, group, graph.add("Sub", strength, strength), axis=-1)
        kept = graph.add("Add", grouped, graph.add("Unsqueeze", penalty, graph.integers(-1)))
        return graph.add("Reshape", kept, graph.integers(0, 0, -1))

    def _top(self, x: str, k: int) -> tuple[str, str]:
        """The k largest along the last axis, and where they are."""
        values, where = f"{x}/top", f"{x}/where"
        self.graph.add_named("TopK", x, self.graph.integers(k), outputs=[values, where], axis=-1)
        return values, where

    def _filled(self, like: str) -> str:
        never = helper.make_tensor("value", TensorProto.FLOAT, [1], [NEVER])
        return self.graph.add("ConstantOfShape", self.graph.add("Shape", like), value=never)
