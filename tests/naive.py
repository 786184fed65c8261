"""Mixtures of experts and attention as their papers write them: loops over tokens, numpy, float64.

What tests compare with. Nothing here shares code or tricks with `moe`.
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def swiglu(x, w_gate, w_up, w_down):
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down


def experts(x, token, expert, combine_weight, kept, weights, y_bar):
    """Every kept assignment by itself: output and, for the cotangent `y_bar`, all gradients.

    Args:
        x: [T, D].
        token, expert, combine_weight, kept: [A].
        weights: w_gate, w_up [E, D, F], w_down [E, F, D].
        y_bar: [T, D].

    Returns:
        y [T, D], gradient of x, gradient of combine_weight, gradients of the weights by name.
    """
    x, y_bar = np.asarray(x, np.float64), np.asarray(y_bar, np.float64)
    weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    y, x_bar = np.zeros_like(x), np.zeros_like(x)
    weight_bar = np.zeros(len(token))
    weights_bar = {name: np.zeros_like(w) for name, w in weights.items()}
    for a, (t, e) in enumerate(zip(token, expert, strict=True)):
        if not kept[a]:
            continue
        w_gate, w_up, w_down = (weights[name][e] for name in ("w_gate", "w_up", "w_down"))
        gate, up = x[t] @ w_gate, x[t] @ w_up
        hidden = silu(gate) * up
        y[t] += combine_weight[a] * (hidden @ w_down)

        weight_bar[a] = y_bar[t] @ (hidden @ w_down)
        out_bar = combine_weight[a] * y_bar[t]
        hidden_bar = w_down @ out_bar
        gate_bar, up_bar = hidden_bar * up * silu_slope(gate), hidden_bar * silu(gate)
        weights_bar["w_down"][e] += np.outer(hidden, out_bar)
        weights_bar["w_gate"][e] += np.outer(x[t], gate_bar)
        weights_bar["w_up"][e] += np.outer(x[t], up_bar)
        x_bar[t] += w_gate @ gate_bar + w_up @ up_bar
    return y, x_bar, weight_bar, weights_bar


def kept(expert, combine_weight, per_token, num_experts, capacity_factor, priority):
    """Which assignments of one group find room, by queueing them one after the other."""
    count = len(expert)
    capacity = math.ceil(capacity_factor * count / num_experts)
    if priority == "score":
        queue = sorted(range(count), key=lambda a: -combine_weight[a])
    elif per_token:
        queue = [t * per_token + choice for choice in range(per_token) for t in range(count // per_token)]
    else:
        queue = range(count)
    free = [capacity] * num_experts
    result = np.zeros(count, bool)
    for a in queue:
        if expert[a] < num_experts and free[expert[a]]:
            free[expert[a]] -= 1
            result[a] = True
    return result


def scores(logits, function):
    """[T, E]; complex logits too, so that derivatives can be taken by a complex step."""
    if function == "sigmoid":
        return sigmoid(logits)
    powers = np.exp(logits - logits.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def choose(logits, bias, k, function):
    """[T, k]: for each token its k best experts, the best first."""
    ranked = scores(logits, function) + (0 if bias is None else bias)
    return np.array([sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in ranked])


def combine_weights(logits, chosen, function, renormalize, scale):
    """[T, k]: the weights of the chosen experts."""
    weights = np.array([row[experts] for row, experts in zip(scores(logits, function), chosen, strict=True)])
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return scale * weights


def logits_gradient(logits, chosen, weight_bar, *rule):
    """Gradient of sum(combine_weights * weight_bar) with respect to the logits, exact by a complex step."""
    step = 1e-30
    gradient = np.zeros_like(logits)
    for e in range(logits.shape[1]):
        moved = logits.astype(complex)
        moved[:, e] += 1j * step
        gradient[:, e] = (combine_weights(moved, chosen, *rule).imag * weight_bar).sum(-1) / step
    return gradient


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def rope(x, position, theta):
    """One head [h] at one position: the pairs (i, i + h / 2) turn as complex numbers."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    turned = pairs * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attention(
    x, weights, *, heads, kv_heads, head_width, qk_norm, theta, epsilon, positions=None, rotary_width=None
):
    """[S, D] -> [S, D]: causal grouped-query attention of one sequence, query by query."""
    length, rotated = len(x), rotary_width or head_width

    def turn(head, position):
        return np.concatenate([rope(head[:rotated], position, theta), head[rotated:]])

    positions = range(length) if positions is None else positions
    q, k, v = (x @ weights[f"w_{name}"] + weights.get(f"b_{name}", 0) for name in "qkv")
    if qk_norm == "full":
        q, k = rms_norm(q, weights["q_norm"], epsilon), rms_norm(k, weights["k_norm"], epsilon)
    q, k, v = (a.reshape(length, -1, head_width) for a in (q, k, v))
    if qk_norm == "head":
        q, k = rms_norm(q, weights["q_norm"], epsilon), rms_norm(k, weights["k_norm"], epsilon)
    out = np.zeros((length, heads, head_width))
    for s in range(length):
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = turn(q[s, h], positions[s])
            keys = [turn(k[t, g], positions[t]) for t in range(s + 1)]
            similar = np.array([query @ key for key in keys]) / head_width**0.5
            share = np.exp(similar - similar.max())
            out[s, h] = share / share.sum() @ v[: s + 1, g]
    return out.reshape(length, -1) @ weights["w_out"]


def latent_attention(x, weights, *, heads, plain, rotary, values, theta, epsilon):
    """[S, D] -> [S, D]: multi-head latent attention of one sequence (2405.04434 eq. 9-19), head by head.

    Each head's column blocks are queries [plain | rotary] and keys and values [plain | values]; positions
    turn neighbouring pairs.
    """
    length = len(x)
    if "w_q" in weights:
        q = x @ weights["w_q"]
    else:
        q = rms_norm(x @ weights["w_q_down"], weights["q_norm"], epsilon) @ weights["w_q_up"]
    latent, shared = np.split(x @ weights["w_kv_down"], [-rotary], axis=1)
    kv = rms_norm(latent, weights["kv_norm"], epsilon) @ weights["w_kv_up"]

    def turn(rows):
        apart = np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1)
        return np.array([rope(row, position, theta) for position, row in enumerate(apart)])

    out = np.zeros((length, heads * values))
    for h in range(heads):
        plain_q, turned_q = np.split(q[:, h * (plain + rotary) : (h + 1) * (plain + rotary)], [plain], axis=1)
        plain_k, v = np.split(kv[:, h * (plain + values) : (h + 1) * (plain + values)], [plain], axis=1)
        similar = (plain_q @ plain_k.T + turn(turned_q) @ turn(shared).T) / (plain + rotary) ** 0.5
        share = np.tril(np.exp(similar - similar.max(1, keepdims=True)))
        out[:, h * values : (h + 1) * values] = share / share.sum(1, keepdims=True) @ v
    return out @ weights["w_out"]
