"""The meshes that tests run on, by name: devices along `fsdp` x devices along `expert`."""

MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}
