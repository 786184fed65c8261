"""What `benchmarks/decode.py` counts, and the page it makes."""

import numpy as np
import pytest

from benchmarks.decode import joined
from benchmarks.gpu.decode_report import decode_page
from benchmarks.gpu.decode_shapes import DECODED, choices, touched_bytes
from benchmarks.gpu.shapes import LayerShape

SHAPE = LayerShape("small", 16, 8, 4, 12, 3)


@pytest.mark.parametrize("shape", [SHAPE, *DECODED.values()])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_token_goes_to_different_experts_and_alone_to_all_before_any_again(shape, tokens):
    chosen = choices(shape, tokens, steps=16)
    assert chosen.shape == (16, tokens, shape.k)
    assert all(len(set(each)) == shape.k for each in chosen.reshape(-1, shape.k))
    round_trip = chosen[: shape.experts // shape.k, 0].reshape(-1)
    assert len(set(round_trip)) == len(round_trip)


def test_bytes_are_those_of_experts_once_a_step():
    chosen = np.array([[[0, 1, 2], [2, 3, 0]], [[5, 6, 7], [5, 6, 7]]])  # four experts, then three
    assert touched_bytes(SHAPE, chosen, 16) == 7 * 3 * 8 * 4 * 2
    assert touched_bytes(SHAPE, chosen, 8) == 7 * (3 * 8 * 4 + 4 * (4 + 4 + 8))


def test_parts_measured_on_one_card_are_kept_side_by_side():
    def run(card, **parts):
        told = [{"part": part, "records": [n]} for part, n in parts.items()]
        return {"gpu": {"name": card}, "programs": told}

    both = joined(run("H100", layers=1, model=2), run("H100", layers=3))
    assert {told["part"]: told["records"] for told in both["programs"]} == {"model": [2], "layers": [3]}
    assert joined(run("H100", layers=1), run("H200", model=2)) == run("H200", model=2)


def test_the_page():
    def record(kind, format, program="Switchyard", **figures):
        return {"program": program, "case": "small", "kind": kind, "format": format} | figures

    step = {"tokens": 8, "steps": 2, "flops": 1}
    records = [
        record("copy", "", bytes=4e12, seconds=[2.0, 1.0, 1.0]),
        record("decode", "bfloat16", bytes=6e8, seconds=[4e-4], **step),
        record("decode", "int8", bytes=3e8, seconds=[1e-4], **step),
        record("prefill", "bfloat16", bytes=0, seconds=[2.0], **step | {"flops": 4e14}),
        record("model", "bfloat16", "transformers", batch=64, prefill=1234.0, decode=56.0),
        record("request", "int8", milliseconds=[float(n) for n in range(1, 102)]),
        {"program": "Switchyard", "case": "small", "kind": "int8-dynamic", "failed": "no room"},
    ]
    page = decode_page(
        {
            "date": "2026-11-23",
            "commit": "abc",
            "modified": False,
            "python": "3.12",
            "hardware": {"processor": "x"},
            "gpu": {},
            "rounds": 3,
            "programs": [
                {
                    "records": records,
                    "part": "layers",
                    "date": "2026-11-22",
                    "commit": "ab",
                    "modified": True,
                },
                {"records": [], "part": "model", "date": "2026-11-23", "commit": "abc", "modified": False},
            ],
        }
    )
    assert "- layers: commit ab and uncommitted changes (2026-11-22); model: commit abc (2026-11-23)" in page
    assert "A copy in the same run: 4.000 TB/s" in page
    assert "| small | 8 | 200 | 1.500 | 38% | 50 | 3.000 | 75% | 4.00 |" in page
    assert "| small | 8 | 200 | – | – |" in page
    assert "| 64 | bfloat16 | transformers | 1,234 | 56 |" in page
    assert "| int8 | 51.0 | 100.0 | 101 |" in page
    assert "no room" in page
