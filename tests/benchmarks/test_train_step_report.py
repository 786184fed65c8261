"""The profile of a train step: kernels to parts of the model, overlaps and gaps, and the page made of it."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.kernel_time import REST, Event, account, parts
from benchmarks.gpu.train_step_report import mfu, page
from moe.kernels import linear, linear_cross_entropy
from moe.mesh import spec
from moe.routing import Context, TopK


def test_instructions_count_under_the_innermost_file_that_is_a_part(one_device):
    def step(x, w, targets):
        routing = TopK(k=1)(linear(x, w)[0].astype(jnp.float32), None, Context(targets[0], targets[0] > 0))
        return linear_cross_entropy(x, w, targets, 1)[0] + routing.combine_weight.sum()

    split = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec("batch"))
    x = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32, sharding=split)
    targets = jax.ShapeDtypeStruct((2, 4), jnp.int32, sharding=split)
    text = jax.jit(step).lower(x, jax.ShapeDtypeStruct((8, 16), jnp.float32), targets).compile().as_text()
    assert set(parts(text).values()) == {"routing", "output head and loss", REST}


PART_OF = {"fusion.1": "norms", "custom-call.2": "attention"}


def test_overlap_counts_once_and_for_the_first():
    events = [
        Event("fusion_1", "", 100.0, 200.0),  # named after its instruction
        Event("flash", "custom-call.2", 150.0, 400.0),
        Event("flash", "custom-call.2", 160.0, 300.0),  # hidden behind the other
        Event("memset", "", 1000.0, 1100.0),
    ]
    times = account(reversed(events), PART_OF)
    assert times.span == pytest.approx(1000e-9)
    assert times.by_part() == pytest.approx({"attention": 200e-9, "norms": 100e-9, REST: 100e-9})
    assert next(iter(times.by_part())) == "attention"
    first = times.kernels[0]
    assert (first.name, first.instruction, first.calls) == ("flash", "custom-call.2", 2)
    assert times.busy == pytest.approx(400e-9)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1))
def test_busy_is_the_length_of_the_union(intervals):
    events = [Event("k", "", float(start), float(start + length)) for start, length in intervals]
    covered = {at for start, length in intervals for at in range(start, start + length)}
    times = account(events, {})
    assert times.busy == pytest.approx(len(covered) / 1e9)
    assert times.span == pytest.approx((max(covered) + 1 - min(covered)) / 1e9)


RESULTS = {
    "date": "2026-01-02",
    "commit": "abc1234",
    "modified": False,
    "python": "3.12",
    "hardware": {"processor": "some processor"},
    "gpu": {"name": "NVIDIA H100"},
    "config": "configs/some.py",
    "overrides": [],
    "versions": {"jax": "0.11.2"},
    "shape": {
        "layers": "MM",
        "width": 64,
        "num_experts": 8,
        "expert_width": 32,
        "experts_per_token": 2,
        "vocab_size": 100,
        "sequences": 4,
        "sequence_length": 250,
        "accumulation": 1,
        "loss_chunks": 2,
        "compute_dtype": "bfloat16",
        "remat": "none",
        "unroll": True,
        "optimizer": "AdamW()",
    },
    "devices_used": 1,
    "parameters": 2_000_000,
    "active_parameters": 500_000.0,
    "flops_of_a_token": 4e9,
    "tokens_of_a_step": 1000,
    "peak": 1e15,
    "compile_seconds": 12.0,
    "seconds": [0.01, 0.008, 0.1],
    "peak_bytes": 3 * 2**30,
    "loss": [9.0, 8.0],
    "profile": {
        "span": 0.01,
        "idle": 0.0005,
        "busy": 0.012,
        "parts": {"experts": 0.006, "norms": 0.003},
        "kernels": [
            {
                "name": "k" * 80,
                "instruction": "custom-call.1",
                "part": "experts",
                "calls": 6.0,
                "seconds": 0.006,
            }
        ],
    },
}


def test_the_page_gives_medians_and_shares():
    assert mfu(RESULTS) == pytest.approx(0.4)
    text = page(RESULTS)
    for cell in (
        "10.0 ms (8.0–100.0)",
        "100,000",
        "400.0 TF/s",
        "40.0% of 1000 TF/s",
        "3.0 GiB",
        "2,000,000",
    ):
        assert cell in text
    assert "| experts | 6.00 | 50.0% |" in text
    assert "no kernel runs for 0.50 ms, 5.0% of it" in text
    assert f"`{'k' * 57}...` | custom-call.1 | experts | 6 | 6.00 | 50.0% |" in text


def test_a_page_without_peak_or_profile():
    text = page(RESULTS | {"peak": None, "peak_bytes": None, "profile": None})
    assert "peak not known" in text
    assert "kernel" not in text
    assert "No profile: why" in page(RESULTS | {"profile": {"failed": "why"}})
