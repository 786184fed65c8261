"""The search for tiles, with kernels that run here: what they compute, in plain JAX."""

import hopper_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import UserError
from moe.kernels import Groups, hopper, tune
from moe.kernels.hopper import Tiles, tiling, works
from moe.kernels.hopper.tiling import Case, Measured

SHAPE = "32,256,128,2,2"
KERNELS = {"product": 2, "weight_gradient": 1}  # that are tried, for so many shapes
WRONG, BROKEN = Tiles(256, 128, stages=4, strip=4), Tiles(128, 128, stages=6, strip=4)


@pytest.fixture
def on_hopper(monkeypatch):
    """Kernels that do not care for their tiles, but for two that the weight gradient cannot have."""
    monkeypatch.setattr(tiling, "present_chip", lambda: "H100")
    monkeypatch.setattr(tune, "SECONDS_OF_A_TURN", 0.0)
    monkeypatch.setattr(works, "STRIPS", (1, 4))

    def kernel(name):
        def run(*arguments, tiles, **options):
            result = getattr(hopper_reference, name)(*arguments, **options)
            if name == "weight_gradient" and tiles == BROKEN:
                raise ValueError("does not\ncompile")
            if name == "weight_gradient" and tiles == WRONG:
                return jax.tree.map(lambda a: a.at[0, 5].add(0.5), result)
            return result

        return run

    for name in KERNELS:
        monkeypatch.setattr(hopper, name, kernel(name))

    def some(shape, tile):
        return [work for work in works.works(shape, tile) if work.case.kernel in KERNELS]

    monkeypatch.setattr(tune, "works", some)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tune", *map(str, arguments)])
    tune.main()


def test_a_search_writes_the_best_and_keeps_what_it_did_not_measure(monkeypatch, tmp_path, capsys, on_hopper):
    out = tmp_path / "h100.json"
    earlier = Measured(Case("product", 4096, 4096, 8, 128), Tiles(strip=2), ms=1.0, rule_ms=1.5)
    out.write_text(tiling.to_json([earlier], {}))
    run(monkeypatch, "--shapes", SHAPE, "--tile", 64, "--out", out)
    table = tiling.from_json(out.read_text())
    assert earlier in table
    assert len(table) == 1 + sum(KERNELS.values())
    for line in table:
        assert line.case.takes(line.tiles)
        assert 0 < line.ms <= line.rule_ms

    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"T,D,F,E,K = {SHAPE}"
    assert sum("TF/s" in line for line in printed) == sum(KERNELS.values())
    rejected = [line for line in printed if "rejected" in line]
    assert any(tune.in_words(BROKEN) in line and "does not compile" in line for line in rejected)
    assert any(tune.in_words(WRONG) in line and "differs" in line for line in rejected)
    assert not {WRONG, BROKEN} & {line.tiles for line in table if line.case.kernel == "weight_gradient"}


def test_no_kernel_is_begun_after_the_time_is_up(monkeypatch, tmp_path, capsys, on_hopper):
    out = tmp_path / "h100.json"
    run(monkeypatch, "--shapes", SHAPE, SHAPE, "--seconds", 0.0, "--out", out)
    assert "time is up: 2 of 2 shapes are not measured" in capsys.readouterr().out
    assert not out.exists()


def test_results_are_compared_where_rows_are():
    """NaN behind the last group is nobody's; one wrong number before it is a wrong result."""
    groups = Groups(jnp.array([3, 1]), tile=4)
    inputs = {"weight": jnp.zeros(12), "groups": groups}
    a = jnp.ones((12, 8)).at[8:].set(jnp.nan)
    assert tune.agree(a, a.at[0, 0].multiply(1.01), inputs)
    assert not tune.agree(a, a.at[7, 0].multiply(1.1), inputs)
    assert not tune.agree(a.at[7, 0].set(jnp.nan), a, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2,3"], "'1,2,3' must be five numbers"),
        (["--shapes", "32,128,100,2,2"], "multiples of 128"),
        (["--tile", 100], "tile=100 must be a multiple of 64"),
        (["--out", "/dev/null/table.json"], "/dev/null/table.json cannot be written"),
    ],
)
def test_bad_input_is_refused(monkeypatch, on_hopper, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)


def test_what_is_no_table_is_left_alone(monkeypatch, on_hopper, tmp_path):
    out = tmp_path / "notes.json"
    out.write_text("my notes")
    with pytest.raises(UserError, match=r"notes\.json is no table of tiles"):
        run(monkeypatch, "--out", out)
    assert out.read_text() == "my notes"


@pytest.mark.parametrize("experts", [3, 64])
def test_rows_are_drawn_as_they_lie_in_groups(experts):
    """Tokens of an expert in order, no token's assignments lost, nothing but zeros in the padding."""
    shape = works.LayerShape(tokens=40, width=128, hidden=128, experts=experts, per_token=3)
    inputs = works.draw(shape, 64)
    used = hopper_reference.used_rows(inputs["groups"], len(inputs["token"]))
    token = np.asarray(inputs["token"])
    np.testing.assert_array_equal(np.bincount(token[used], minlength=40), 3)
    assert not token[~used].any()
    start = inputs["groups"].starts()
    for first, size in zip(start, inputs["groups"].group_sizes, strict=True):
        assert (np.diff(token[first : first + size]) >= 0).all()


def test_it_needs_a_hopper_gpu(monkeypatch):
    with pytest.raises(UserError, match="on a Hopper GPU, and this is cpu"):
        run(monkeypatch)
