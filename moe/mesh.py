"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Five mesh axes:

    data       splits the batch; parameters are repeated (between hosts or pods with a slow network)
    fsdp       splits the batch, and the parameters in storage, gathered where they are used (2304.11277)
    expert     the same to all but the experts, which it splits for good: a device keeps E / expert of them
    sequence   splits the tokens of every sequence, and the parameters in storage
    tensor     splits heads and hidden units of every matrix, experts' too (Megatron, 1909.08053)

Attention and experts so use the devices differently: those along `expert` are data-parallel to attention and
hold different experts, those along `sequence` see all of a sequence in attention, for some of the heads.

One device is a mesh of ones; no code asks how many devices there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH = ("data", "fsdp", "expert")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH,
    "sequence": "sequence",
    "group": (*BATCH, "sequence"),  # groups of tokens, which router and experts see
    "attended_heads": ("tensor", "sequence"),  # within attention, where sequences are whole
    "loss_sequence": ("sequence", "tensor"),  # where the output head is whole
    # parameters: one dimension of each large matrix is split in storage
    "embed": ("fsdp", "expert", "sequence"),
    "expert": "expert",
    "expert_embed": ("fsdp", "sequence"),
    # and one where it is used
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",  # in storage only: an output head is used whole
    # never split
    "layer": None,
    "norm": None,
    "router": None,
    "head_dim": None,
    None: None,
}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis. In a config: mesh=MeshConfig(fsdp=4, expert=2)."""

    data: int = 1
    """Devices along `data`, each with a copy of all that the others split; -1 takes all that is left."""

    fsdp: int = -1
    """Devices along `fsdp`, over which parameters are stored in parts; -1 takes all that is left."""

    expert: int = 1
    """Devices along `expert`: each keeps num_experts / expert of every layer's experts."""

    sequence: int = 1
    """Devices along `sequence`: each has a part of every sequence, for inputs too long for one device."""

    tensor: int = 1
    """Devices along `tensor`: each multiplies with a part of every matrix."""

    def sizes(self, count: int) -> dict[str, int]:
        """Devices along each axis, of `count` in all.

        Raises:
            UserError: the axes do not multiply to that.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        open_axes = [name for name, size in sizes.items() if size == -1]
        for name, size in sizes.items():
            if size != -1 and (size < 1 or count % size):
                raise UserError(
                    f"mesh.{name}={size} does not divide the {count} devices; choose a divisor of {count}"
                )
        if len(open_axes) > 1:
            raise UserError(f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; give one a number")
        known = prod(size for size in sizes.values() if size != -1)
        if open_axes and count % known == 0:
            return sizes | {open_axes[0]: count // known}
        if known != count:
            product = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size > 1)
            raise UserError(
                f"{product or 'the mesh'} needs {known} devices, here are {count}; set mesh.fsdp=-1 to take "
                "what is left"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """Build the mesh over all devices (or those given).

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # Not `jax.make_mesh`, which refuses to cut a side of a TPU's torus into two axes.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*logical: str | None) -> P:
    """The PartitionSpec of logical axis names, by the table."""
    return P(*(_entry(name) for name in logical))


def abstract[Tree](make: Callable[[], Tree]) -> Tree:
    """Shapes, dtypes and shardings of what a function would make on the mesh that is set, at no cost."""
    mesh = jax.sharding.get_mesh()

    def on_devices(x):
        sharding = jax.sharding.NamedSharding(mesh, x.sharding.spec if x.sharding else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(on_devices, jax.eval_shape(make))


def layouts(tree):
    """The PartitionSpec of each array."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis: those of the table along which there are several devices."""
    entry = _entry(logical)
    return (entry,) if isinstance(entry, str) else entry or ()


def _entry(logical: str | None) -> str | tuple[str, ...] | None:
    """The table's entry without axes of one device, so that types name only what is split."""
    entry, mesh = RULES[logical], jax.sharding.get_abstract_mesh()
    if entry is None or mesh.empty:
        return entry
    names = (entry,) if isinstance(entry, str) else entry
    split = tuple(name for name in names if mesh.shape[name] > 1)
    return split if len(split) > 1 else split[0] if split else None


def axis_size(name: str) -> int:
    """Devices along one mesh axis of the mesh that is set."""
    return jax.sharding.get_abstract_mesh().shape[name]


def axis_index(name: str):
    """Inside `jax.shard_map`: which of the devices along a mesh axis this is."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


def varying[Tree](tree: Tree, over: tuple[str, ...]) -> Tree:
    """Inside `jax.shard_map`: the arrays as ones that may differ along these mesh axes, too.

    Their gradients are then sums over the axes.
    """

    def cast(x):
        missing = tuple(name for name in over if name not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def logical_rules():
    """Context in which `nnx.Param(..., out_sharding=<logical names>)` follows the table."""
    return nnx.logical_axis_rules(tuple((name, _entry(name)) for name in RULES if name))
