"""Checkpoints survive kills, damage, full disks and a change of mesh; what comes back is bit-equal."""

import errno
import json
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe.checkpoint import Checkpoints, CheckpointStore
from moe.errors import UserError


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


def make_state(seed: int, devices: int = 8) -> dict[str, Any]:
    """A state with everything a run may hold, its larger arrays sharded over the devices."""
    sharded = jax.NamedSharding(mesh(devices), jax.P("data"))
    whole = jax.NamedSharding(mesh(devices), jax.P())
    keys = jax.random.split(jax.random.key(seed), 8)
    w = jax.random.normal(keys[0], (16, 4))
    layer = nnx.split(nnx.Linear(8, 8, rngs=nnx.Rngs(seed)))[1]
    state = {
        "params": {"w": w, "half": w.astype(jnp.bfloat16), "int8": (w * 50).astype(jnp.int8)},
        "adam": optax.adamw(1e-3).init({"w": w}),
        "layer": layer,
        "keys": keys,
        "rbg": jax.random.split(jax.random.key(seed, impl="rbg"), 8),
        "words": jax.random.key_data(keys),
        "nothing": jnp.zeros((0, 3)),
        "pair": (jnp.arange(8) % 2 == 0, [jnp.full((8,), jnp.nan)]),
    }
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, sharded if leaf.ndim and leaf.size else whole), state
    )
    return placed | {"key": jax.device_put(jax.random.key(seed), whole), "count": jnp.int32(seed)}


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(leaf: jax.Array) -> bytes:
    words = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(words).tobytes()


def assert_same(restored: Any, saved: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for (path, got), want in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(saved), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), path
        assert bits(got) == bits(want), path


def small(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full((64,), value, jnp.float32), "count": jnp.int32(value)}


def store(directory: Path, **config: int) -> CheckpointStore:
    return CheckpointStore(directory, Checkpoints(**config))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


# What comes back


@pytest.mark.parametrize("saved_on, restored_on", [(8, 8), (8, 1), (1, 8)])
def test_state_comes_back_bit_equal_on_another_mesh(tmp_path: Path, saved_on: int, restored_on: int):
    saved = make_state(3, saved_on)
    target = abstract(make_state(4, restored_on))
    with store(tmp_path) as checkpoints:
        checkpoints.save(7, saved, {"documents": [1, 2], "offset": 5})
    with store(tmp_path) as checkpoints:
        restored = checkpoints.restore(target)
    assert restored is not None
    assert (restored.step, restored.position) == (7, {"documents": [1, 2], "offset": 5})
    assert_same(restored.state, saved)
    jax.tree.map(
        lambda got, want: got.sharding.is_equivalent_to(want.sharding, got.ndim), restored.state, target
    )
    shardings = [leaf.sharding for leaf in jax.tree.leaves(restored.state)]
    assert all(len(sharding.device_set) <= restored_on for sharding in shardings)
    assert shardings == [leaf.sharding for leaf in jax.tree.leaves(target)]
    # A restored key draws what the saved one would have drawn.
    assert int(jax.random.bits(restored.state["key"])) == int(jax.random.bits(saved["key"]))


def test_leaves_without_a_sharding_go_to_one_device(tmp_path: Path):
    saved = make_state(1)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        restored = checkpoints.restore(target)
    assert restored is not None
    assert_same(restored.state, saved)


def test_the_state_may_be_donated_right_after_save(tmp_path: Path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    sharded = jax.NamedSharding(mesh(8), jax.P("data"))
    with store(tmp_path, keep_last=8) as checkpoints:
        expected = {}
        for step in range(1, 5):
            state = {"w": jax.device_put(jnp.arange(1 << 18, dtype=jnp.float32) + step, sharded)}
            expected[step] = np.array(state["w"])
            target = abstract(state)
            checkpoints.save(step, state, {})
            jax.block_until_ready(overwrite(state))
        for step, want in expected.items():
            np.testing.assert_array_equal(checkpoints.restore_step(step, target).state["w"], want)


def test_save_returns_before_the_checkpoint_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Held before its last act, the write has not appeared although save returned; close waits for it."""
    import threading

    import moe.checkpoint

    gate = threading.Event()
    seal = moe.checkpoint.seal
    monkeypatch.setattr(moe.checkpoint, "seal", lambda directory: (gate.wait(60), seal(directory)))
    checkpoints = store(tmp_path)
    checkpoints.save(1, small(1), {})
    assert checkpoints.steps() == []
    gate.set()
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_wait_returns_when_the_checkpoint_is_on_disk(tmp_path: Path):
    checkpoints = store(tmp_path)
    checkpoints.save(1, small(1), {}, wait=True)
    assert store(tmp_path).steps() == [1]
    checkpoints.close()


def test_an_empty_directory_has_nothing_to_restore(tmp_path: Path):
    with store(tmp_path / "absent") as checkpoints:
        assert checkpoints.restore(abstract(small(0))) is None
        assert checkpoints.steps() == []
        assert checkpoints.best_step() is None
    assert not (tmp_path / "absent").exists()


# What is kept


@pytest.mark.parametrize(
    "config, metrics, kept, best",
    [
        ({"keep_last": 2, "keep_best": 1}, [5, 1, 3, 4, 2], [2, 4, 5], 2),
        ({"keep_last": 1, "keep_best": 2}, [5, 1, 3, 4, 6], [2, 3, 5], 2),
        ({"keep_last": 2, "keep_best": 1}, [5, 4, 3, 2, 1], [4, 5], 5),
        ({"keep_last": 1, "keep_best": 0}, [1, 2, 3], [3], 3),
        ({"keep_last": 2, "keep_best": 1}, [None, 2, None, None, None], [2, 4, 5], 2),
        ({"keep_last": 2, "keep_best": 1}, [None, None, None], [2, 3], None),
        ({"keep_last": 1, "keep_best": 1}, [float("nan"), 3, float("nan")], [2, 3], 2),
        ({"keep_last": 1, "keep_best": 1}, [2, 2, 3], [2, 3], 2),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, config, metrics, kept, best):
    with store(tmp_path, **config) as checkpoints:
        for step, metric in enumerate(metrics, start=1):
            checkpoints.save(step, small(step), {}, metric)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept
    assert checkpoints.steps() == kept
    assert store(tmp_path, **config).best_step() == best


def test_the_best_is_remembered_across_restarts(tmp_path: Path):
    for step, metric in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        with store(tmp_path) as checkpoints:
            checkpoints.save(step, small(step), {}, metric)
    assert checkpoints.steps() == [2, 4, 5]


def test_a_step_is_written_once(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"a": 1})
        checkpoints.save(1, small(2), {"a": 2})
        restored = checkpoints.restore(abstract(small(0)))
    assert restored is not None
    assert restored.position == {"a": 1}


@pytest.mark.parametrize("field, value", [("every", -1), ("keep_last", 0), ("keep_best", -1)])
def test_impossible_configs_name_their_field(field: str, value: int):
    with pytest.raises(UserError, match=rf"checkpoints\.{field} is {value}"):
        Checkpoints(**{field: value})


# Damage


@pytest.mark.parametrize("damage", [flip_bit, cut, delete])
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, damage, capsys):
    with store(tmp_path / "good") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {"step": step}, 1 / step)
    rng = random.Random(0)
    names = [path.relative_to(tmp_path / "good/2") for path in files_of(tmp_path / "good/2")]
    assert {"contents.json", "SHA256SUMS", "state/_METADATA"} <= {str(name) for name in names}
    for name in names:
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        damage(tmp_path / "bad/2" / name, rng)
        with store(tmp_path / "bad") as checkpoints:
            assert checkpoints.best_step() in (1, 2)
            restored = checkpoints.restore(abstract(small(0)))
            with pytest.raises(UserError, match=r"checkpoint 2 .*is damaged"):
                checkpoints.restore_step(2, abstract(small(0)))
        assert restored is not None
        assert (restored.step, restored.position) == (1, {"step": 1})
        assert_same(restored.state, small(1))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, name
        assert "checkpoint 2 is damaged" in lines[0]
        assert "using checkpoint 1" in lines[0]
        if name.name != "SHA256SUMS":
            assert str(name) in lines[0]
        shutil.rmtree(tmp_path / "bad")


def test_damage_to_every_checkpoint_is_an_error_that_names_them(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {})
    for step in (1, 2):
        delete(tmp_path / str(step) / "contents.json", random.Random(0))
    with (
        store(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"2 \(contents.json is missing\); 1 \(contents.json is missing\)"),
    ):
        checkpoints.restore(abstract(small(0)))
    assert checkpoints.steps() == [1, 2]


def test_the_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {})
    flip_bit(files_of(tmp_path / "2/state")[0], random.Random(0))
    with store(tmp_path) as checkpoints:
        checkpoints.restore(abstract(small(0)))
        checkpoints.save(2, small(5), {})
    with store(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(small(0)))
    assert restored is not None
    assert restored.step == 2
    assert_same(restored.state, small(5))


def test_damaged_checkpoints_do_not_push_out_intact_ones(tmp_path: Path):
    """keep_last counts the intact only: after 2 and 3 turned out damaged, 1 stays beside the new one."""
    with store(tmp_path, keep_last=3, keep_best=0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {})
    for step in (2, 3):
        delete(tmp_path / str(step) / "contents.json", random.Random(0))
    with store(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        checkpoints.restore(abstract(small(0)))
        checkpoints.save(4, small(4), {})
    assert checkpoints.steps() == [1, 4]


@pytest.mark.parametrize(
    "other, named",
    [
        ({"w": jnp.zeros((65,)), "count": jnp.int32(0)}, r"w is float32\[64\] in it and float32\[65\]"),
        (
            small(0) | {"w": jnp.zeros((64,), jnp.bfloat16)},
            r"w is float32\[64\] in it and bfloat16\[64\]",
        ),
        ({"w": jnp.zeros((64,))}, r"count is int32\[\] in it and absent"),
        ({"b": jnp.zeros(2)} | small(0), r"b is absent in it and float32\[2\]"),
    ],
)
def test_another_architecture_is_an_error_that_names_the_leaf(tmp_path: Path, other, named, capsys):
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        with pytest.raises(UserError, match=named):
            checkpoints.restore(abstract(other))
    assert capsys.readouterr().err == ""


def test_a_part_can_be_restored_without_the_rest(tmp_path: Path):
    state = make_state(0)
    wanted = {name: state[name] for name in ("params", "keys")}
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for restored in (
            checkpoints.restore(abstract(wanted), whole=False),
            checkpoints.restore_step(1, abstract(wanted), whole=False),
        ):
            assert restored is not None
            assert_same(restored.state, wanted)
        with pytest.raises(UserError, match="another architecture"):
            checkpoints.restore(abstract(wanted))
        with pytest.raises(UserError, match=r"more is absent in it"):
            checkpoints.restore(abstract(wanted | {"more": jnp.zeros(3)}), whole=False)


def test_asking_for_a_step_that_is_not_there_lists_those_that_are(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        with pytest.raises(UserError, match=r"no checkpoint 5 in .*: there are \[1\]"):
            checkpoints.restore_step(5, abstract(small(0)))


# Failed and killed writes


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    checkpoints = store(tmp_path)
    checkpoints.save(1, small(1), {}, wait=True)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", no_space)
        checkpoints.save(2, small(2), {})
        with pytest.raises(UserError, match=r"^disk full: checkpoint 2 .* \[1\][^\n]*$"):
            checkpoints.save(3, small(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.save(4, small(4), {})  # room was made
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def test_a_write_refused_to_orbax_is_reported_on_close(tmp_path: Path):
    """A limit on the size of files stops tensorstore itself in the middle of the arrays."""
    checkpoints = store(tmp_path)
    checkpoints.save(1, small(1), {}, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = jax.random.bits(jax.random.key(0), (1 << 20,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        checkpoints.save(2, {"w": noise}, {})
        with pytest.raises(UserError, match=r"^cannot write [^\n]*checkpoint 2 [^\n]*$"):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with store(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(small(0)))
    assert restored is not None
    assert_same(restored.state, small(1))


def test_a_position_that_is_no_json_fails_at_once(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, small(1), {"position": object()})
        checkpoints.save(2, small(2), {})
    assert checkpoints.steps() == [2]


def test_reading_leaves_a_write_under_way_alone_and_the_next_write_removes_leftovers(tmp_path: Path):
    with store(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
    for leftover in ("2.writing/state", "0.deleting/state"):
        (tmp_path / leftover).mkdir(parents=True)
    with store(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(small(0)))
        assert restored is not None
        assert restored.step == 1
        assert (tmp_path / "2.writing").exists()
        checkpoints.save(2, small(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


RUN_UNTIL_KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    import numpy as np
    from moe.checkpoint import Checkpoints, CheckpointStore

    directory, kills = Path(sys.argv[1]), int(sys.argv[2])

    def train():
        state = lambda step: {"w": jnp.arange(1 << 16, dtype=jnp.float32) * step}
        store = CheckpointStore(directory, Checkpoints(keep_last=1))
        restored = store.restore(jax.eval_shape(lambda: state(0)))
        step = 0 if restored is None else restored.step
        if restored is not None:
            np.testing.assert_array_equal(restored.state["w"], state(step)["w"])
        while True:
            step += 1
            store.save(step, state(step), {"step": step}, metric=-step)

    # Forked before JAX has a backend, so that the import is paid once for all the kills.
    for kill in range(kills):
        before = max((int(p.name) for p in directory.glob("*") if p.name.isdecimal()), default=0)
        if (child := os.fork()) == 0:
            train()
            os._exit(1)
        rng = random.Random(kill)
        deadline = time.monotonic() + 60
        while not (directory / f"{before + 2}").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        while kill % 2 and not list(directory.glob("*.writing")):
            pass
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        print("killed after", sorted(p.name for p in directory.iterdir()), flush=True)
"""


def test_kills_at_random_moments_never_leave_a_half_checkpoint(tmp_path: Path):
    """A run that does nothing but save, killed again and again, always goes on from a whole checkpoint."""
    kills = 6
    script = [sys.executable, "-c", textwrap.dedent(RUN_UNTIL_KILLED), str(tmp_path), str(kills)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("killed after") == kills
    assert "damaged" not in run.stderr
    with store(tmp_path) as checkpoints:
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((1 << 16,), jnp.float32)})
        assert restored is not None
        assert restored.step >= kills
        assert restored.position == {"step": restored.step}
        np.testing.assert_array_equal(
            restored.state["w"], np.arange(1 << 16, dtype=np.float32) * restored.step
        )
        checkpoints.save(restored.step + 1, restored.state, {})
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())
    assert (
        json.loads((tmp_path / str(restored.step + 1) / "contents.json").read_text())["step"]
        == restored.step + 1
    )
