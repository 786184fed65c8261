"""What chips can do: the one table of peaks, bandwidths and memory, which all that needs them asks.

Dense bf16 products, without sparsity (NVIDIA's sheets print most with 2:4 sparsity, twice the dense figure).
Sources, by the name under which a row stands:

    a100, a100-40gb        NVIDIA A100 Tensor Core GPU data sheet (SXM)
    h100, h100-pcie, -nvl  NVIDIA H100 Tensor Core GPU data sheet (SXM5), product briefs of H100 PCIe and NVL
    h200, h200-nvl         NVIDIA H200 Tensor Core GPU data sheet
    gh200                  NVIDIA GH200 Grace Hopper Superchip data sheet (96 GB of HBM3)
    b200, b300             NVIDIA Blackwell data sheet, HGX B200 and B300, an eighth of a board
    gb200, gb300           NVIDIA GB200 NVL72 and GB300 NVL72 data sheets, a GPU's part
    v4 to tpu7x            "System architecture" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}
    cpu                    measured, see `Hardware.source` there

Memory is what the driver shows, not what programs may have: a CUDA context and XLA take some of it.
"""

from dataclasses import dataclass

from moe.errors import UserError

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """One chip: what is rented, and what has one memory."""

    name: str
    """As on the command line."""

    device_kind: str
    """How the name that JAX gives its devices begins."""

    peak_flops: float
    """Dense bf16, FLOP/s."""

    bandwidth: float
    """Of the memory, bytes/s."""

    memory: float
    """Bytes."""

    devices: int = 1
    """That JAX sees in a chip."""

    source: str = ""
    """Where the figures come from, if not from the data sheet that the module's docstring names."""

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which arithmetic binds and below which memory does."""
        return self.peak_flops / self.bandwidth


MEASURED_CPU = (
    "2 cores of an Intel Xeon with AMX: the fastest of many bf16 products of 2048 x 2048 through XLA "
    "(moe.analysis.compute.measured_peak); 2 GiB copied by both cores, bytes read and written"
)

# Of the kinds that a device's name begins with, the longest counts.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("a100", "NVIDIA A100", 312 * TERA, 2039 * GIGA, 80 * GIB),
        Hardware("a100-40gb", "NVIDIA A100-SXM4-40GB", 312 * TERA, 1555 * GIGA, 40 * GIB),
        Hardware("h100", "NVIDIA H100", 989 * TERA, 3350 * GIGA, 80 * GIB),
        Hardware("h100-pcie", "NVIDIA H100 PCIe", 756 * TERA, 2039 * GIGA, 80 * GIB),
        Hardware("h100-nvl", "NVIDIA H100 NVL", 835 * TERA, 3938 * GIGA, 94 * GIB),
        Hardware("h200", "NVIDIA H200", 989 * TERA, 4800 * GIGA, 141 * GIGA),
        Hardware("h200-nvl", "NVIDIA H200 NVL", 835 * TERA, 4800 * GIGA, 141 * GIGA),
        Hardware("gh200", "NVIDIA GH200", 989 * TERA, 4000 * GIGA, 96 * GIGA),
        Hardware("b200", "NVIDIA B200", 2250 * TERA, 8000 * GIGA, 180 * GIGA),
        Hardware("gb200", "NVIDIA GB200", 2500 * TERA, 8000 * GIGA, 186 * GIGA),
        Hardware("b300", "NVIDIA B300", 2250 * TERA, 8000 * GIGA, 288 * GIGA),
        Hardware("gb300", "NVIDIA GB300", 2500 * TERA, 8000 * GIGA, 288 * GIGA),
        Hardware("v4", "TPU v4", 275 * TERA, 1228 * GIGA, 32 * GIB),
        Hardware("v5e", "TPU v5 lite", 197 * TERA, 819 * GIGA, 16 * GIB),
        Hardware("v5p", "TPU v5", 459 * TERA, 2765 * GIGA, 95 * GIB),
        Hardware("v6e", "TPU v6 lite", 918 * TERA, 1638 * GIGA, 32 * GIB),
        Hardware("tpu7x", "TPU7x", 2307 * TERA, 7380 * GIGA, 192 * GIB, devices=2),
        Hardware("cpu", "cpu", 0.5 * TERA, 21 * GIGA, 24 * GIB, source=MEASURED_CPU),
    )
}

# Other names that JAX has had for a kind of device.
ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}


def hardware_named(names: str, field: str = "hardware") -> list[Hardware]:
    """The chips of a list like `h100,v5e`.

    Raises:
        UserError: one of them is not in the table.
    """
    unknown = [name for name in names.split(",") if name not in HARDWARE]
    if unknown:
        raise UserError(
            f"--{field} {names}: no figures for {unknown[0]!r}; choose from {', '.join(HARDWARE)}"
        )
    return [HARDWARE[name] for name in dict.fromkeys(names.split(","))]


def data_sheet_peak(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device, None where no data sheet gives it."""
    for other, name in ALIASES.items():
        device_kind = device_kind.replace(other, name)
    found = [h for h in HARDWARE.values() if not h.source and device_kind.startswith(h.device_kind)]
    chip = max(found, key=lambda hardware: len(hardware.device_kind), default=None)
    return chip and chip.peak_flops / chip.devices
