"""The page that is made of the results of a train step."""

import pytest

from benchmarks.gpu.train_step_report import mfu, page

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
