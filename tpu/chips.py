"""What TPUs can do, by their makers' public figures, and how long a collective takes on their torus.

Peak, memory and its bandwidth: `moe.analysis.hardware`. Sources of the rest: the "System architecture" tables
of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Links: the bidirectional bandwidth of a chip there,
over its ports and two directions (v4: 50 GB/s a link, 2304.01433 table 4). Clock: peak / (2 x multiply-adds
that the matrix units make in a cycle): four units of 128 x 128 a core, from v6e on of 256 x 256
(jax-ml.github.io/scaling-book/tpus). Die to die: a TPU7x chip's two devices, six times a link
(docs.cloud.google.com/tpu/docs/tpu7x).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe.analysis.hardware import HARDWARE
from moe.errors import UserError
from tpu.collectives import Collective


@dataclass(frozen=True)
class Chip:
    """One TPU chip; JAX sees `devices` of them in it."""

    name: str
    device_kind: str
    """How JAX calls its devices."""

    peak_flops: float
    """Dense bf16, FLOP/s."""

    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes/s."""

    link_bandwidth: float
    """Bytes/s of one link in one direction."""

    dimensions: int
    """Of the torus: two links for each."""

    clock: float
    """Hz."""

    flags: str
    """For LIBTPU_INIT_ARGS: what lets collectives run beside the core on this generation."""

    devices: int = 1

    configuration: str = "default"
    """Of libtpu's: how a chip's cores are seen. A v4's two are one device only if asked for."""

    def wraps(self, length: int) -> bool:
        """Whether so many chips in a row close to a ring.

        Only a whole side of the pod does on two-dimensional chips; multiples of four do where optical
        switches join cubes.
        """
        return length == 16 if self.dimensions == 2 else length % 4 == 0


# v5e gathers in steps beside products, generations with SparseCores send by those (each compiler refuses the
# other's way); the flags are those with which MaxText trains (its benchmarks/xla_flags_library.py).
BESIDE_PRODUCTS = " ".join(
    f"--xla_{flag}=true"
    for flag in (
        "tpu_enable_async_collective_fusion",
        "tpu_enable_async_collective_fusion_fuse_all_gather",
        "tpu_enable_async_collective_fusion_multiple_steps",
        "tpu_overlap_compute_collective_tc",
        "enable_async_all_gather",
    )
)
ON_SPARSE_CORES = " ".join(
    f"--xla_{flag}"
    for flag in (
        "tpu_enable_sparse_core_collective_offload_all_gather=true",
        "tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
        "tpu_enable_sparse_core_collective_offload_all_reduce=true",
        "tpu_enable_all_gather_offload_tracing=true",
        "tpu_use_tc_device_shape_on_sc=true",
        "sc_disable_megacore_partitioning=true",
        "tpu_enable_async_collective_fusion_fuse_all_gather=false",
        "enable_async_all_gather=true",
        "enable_async_all_reduce=true",
    )
)


def _chip(name: str, link_bandwidth: float, dimensions: int, clock: float, flags: str, **rest) -> Chip:
    h = HARDWARE[name]
    known = (name, h.device_kind, h.peak_flops, h.memory, h.bandwidth)
    return Chip(*known, link_bandwidth, dimensions, clock, flags, devices=h.devices, **rest)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", 50e9, 3, 1.05e9, "", configuration="megacore"),
        _chip("v5e", 50e9, 2, 1.5e9, BESIDE_PRODUCTS),
        _chip("v5p", 100e9, 3, 1.75e9, ON_SPARSE_CORES),
        _chip("v6e", 100e9, 2, 1.75e9, ON_SPARSE_CORES),
        _chip("tpu7x", 100e9, 3, 2.2e9, ON_SPARSE_CORES),
    )
}
DIE_TO_DIE = 6  # times a link


@dataclass(frozen=True)
class Place:
    """Where a device lies: on a chip of the torus, which may hold several."""

    coords: tuple[int, ...]
    core: int = 0


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, `v6e:16x16`.

    Raises:
        UserError: no such chip, or no shape behind it.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {topology!r}: no such chip; choose from {', '.join(CHIPS)}")
    sides = shape.split("x")
    dimensions = CHIPS[name].dimensions
    if not all(side.isdigit() and int(side) for side in sides) or len(sides) != dimensions:
        like = {2: "16x16", 3: "4x4x8"}[dimensions]
        raise UserError(f"--topology {topology!r}: write {name}:{like}, its {dimensions} sides in chips")
    return CHIPS[name]


def seconds(chip: Chip, collective: Collective, places: Sequence[Place]) -> float:
    """Time of a collective at full bandwidth, all its groups at once and nothing else on the links.

    Each torus dimension along which the group extends carries its share in both directions; without a ring
    the ends hear from one side only. Where the members stand apart, groups in between share the links.

    Args:
        chip: what the devices are.
        collective: what is sent.
        places: of all partitions.
    """
    group = [places[i] for i in collective.group]
    lanes: list[tuple[int, float]] = []  # length and bandwidth of each dimension
    for d in range(len(group[0].coords)):
        line = sorted({place.coords[d] for place in group})
        if len(line) == 1:
            continue
        side = 1 + max(place.coords[d] for place in places)
        stride = min(b - a for a, b in pairwise(line))
        closed = len(line) * stride == side and chip.wraps(side)
        lanes.append((len(line), (2 if closed else 1) * chip.link_bandwidth / stride))
    if not lanes:
        lanes = [(2, DIE_TO_DIE * chip.link_bandwidth)]
    elif len({place.core for place in group}) == 1:
        # The chip's other devices send over the same links.
        lanes = [(length, bandwidth / chip.devices) for length, bandwidth in lanes]
    if "all-to-all" in collective.kind:
        # Half of all that is sent crosses the middle of the longest dimension, half of that either way.
        length, bandwidth = max(lanes)
        return collective.payload * length / 4 / bandwidth
    return collective.sent / sum(bandwidth for _, bandwidth in lanes)
