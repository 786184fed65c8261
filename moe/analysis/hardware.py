"""What chips can do: the one table of peaks, bandwidths and memory, which all that needs them asks.

Dense bf16 products, without sparsity (NVIDIA's sheets print most with 2:4 sparsity, twice the dense figure).
Every row names its source. Cards whose sheet could not be read again (H100 NVL, GH200) are not in the table.
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

    source: str = ""
    """Where the figures come from."""

    devices: int = 1
    """That JAX sees in a chip."""

    measured: bool = False
    """Whether they are of one machine, and not of all that bear the name."""

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which arithmetic binds and below which memory does."""
        return self.peak_flops / self.bandwidth


A100 = "NVIDIA A100 Tensor Core GPU data sheet, SXM"
A100_40GB = "NVIDIA A100 architecture white paper: 5 stacks of HBM2, 1,555 GB/s; peak as with 80 GB"
H100 = "NVIDIA H100 Tensor Core GPU data sheet, SXM5"
H100_PCIE = (
    "NVIDIA H100 data sheet as archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html gives it: 1,513 TFLOPS "
    "with sparsity, 2,000 GB/s; product brief PB-11133-001: above 2,000 GB/s"
)
H200 = "NVIDIA H200 Tensor Core GPU data sheet"
BLACKWELL = "NVIDIA Blackwell data sheet, an eighth of HGX B200"
B300 = (
    "NVIDIA's sheet of HGX B300, an eighth of a board: 36 PFLOPS with sparsity, 2.3 TB (as "
    "fibermall.com/blog/?p=17161 gives it); 8 TB/s: glennklockwood.com/garden/processors/B300"
)
GRACE = "NVIDIA GB200 NVL72 and GB300 NVL72 data sheets, a GPU's part"
TPU = '"System architecture" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}'
CPU = (
    "2 cores of an Intel Xeon with AMX: the fastest of many bf16 products of 2048 x 2048 through XLA "
    "(moe.analysis.compute.measured_peak); 2 GiB copied by both cores, bytes read and written"
)

# Of the kinds that a device's name begins with, the longest counts.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("a100", "NVIDIA A100", 312 * TERA, 2039 * GIGA, 80 * GIB, A100),
        Hardware("a100-40gb", "NVIDIA A100-SXM4-40GB", 312 * TERA, 1555 * GIGA, 40 * GIB, A100_40GB),
        Hardware("h100", "NVIDIA H100 80GB HBM3", 989 * TERA, 3350 * GIGA, 80 * GIB, H100),
        Hardware("h100-pcie", "NVIDIA H100 PCIe", 756 * TERA, 2000 * GIGA, 80 * GIB, H100_PCIE),
        Hardware("h200", "NVIDIA H200", 989 * TERA, 4800 * GIGA, 141 * GIGA, H200),
        Hardware("h200-nvl", "NVIDIA H200 NVL", 835 * TERA, 4800 * GIGA, 141 * GIGA, H200),
        Hardware("b200", "NVIDIA B200", 2250 * TERA, 8000 * GIGA, 180 * GIGA, BLACKWELL),
        Hardware("gb200", "NVIDIA GB200", 2500 * TERA, 8000 * GIGA, 186 * GIGA, GRACE),
        Hardware("b300", "NVIDIA B300", 2250 * TERA, 8000 * GIGA, 288 * GIGA, B300),
        Hardware("gb300", "NVIDIA GB300", 2500 * TERA, 8000 * GIGA, 288 * GIGA, GRACE),
        Hardware("v4", "TPU v4", 275 * TERA, 1228 * GIGA, 32 * GIB, TPU),
        Hardware("v5e", "TPU v5 lite", 197 * TERA, 819 * GIGA, 16 * GIB, TPU),
        Hardware("v5p", "TPU v5", 459 * TERA, 2765 * GIGA, 95 * GIB, TPU),
        Hardware("v6e", "TPU v6 lite", 918 * TERA, 1638 * GIGA, 32 * GIB, TPU),
        Hardware("tpu7x", "TPU7x", 2307 * TERA, 7380 * GIGA, 192 * GIB, TPU, devices=2),
        Hardware("cpu", "cpu", 0.5 * TERA, 21 * GIGA, 24 * GIB, CPU, measured=True),
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


def data_sheet(device_kind: str) -> Hardware | None:
    """The chip of a JAX device, by the device's kind; None where no data sheet gives its figures."""
    for other, name in ALIASES.items():
        device_kind = device_kind.replace(other, name)
    found = [h for h in HARDWARE.values() if not h.measured and device_kind.startswith(h.device_kind)]
    return max(found, key=lambda hardware: len(hardware.device_kind), default=None)


def data_sheet_peak(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device, None where no data sheet gives it."""
    chip = data_sheet(device_kind)
    return chip and chip.peak_flops / chip.devices
