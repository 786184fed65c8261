"""Eight simulated CPU devices for every test, and the meshes over them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Set before JAX is imported. Tests compile much and compute little, so machine code is not optimised.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest
from hypothesis import HealthCheck, settings
from meshes import MESHES

from moe.mesh import MeshConfig, make_mesh

# A compilation takes longer than any deadline. A fixture that sets the mesh holds for all examples of a test.
settings.register_profile(
    "switchyard",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("switchyard")


def pytest_addoption(parser):
    parser.addoption("--strategy", help="a routing strategy of your own, for test_every_strategy.py")
    parser.addoption("--every-mesh", action="store_true", help="test_meshes.py on all meshes of 8 devices")


@pytest.fixture(params=MESHES)
def mesh(request):
    """Each mesh in turn, set for the test; `indirect` parametrisation by name takes some of them."""
    fsdp, expert = MESHES[request.param]
    with jax.set_mesh(
        make_mesh(MeshConfig(fsdp=fsdp, expert=expert), jax.devices()[: fsdp * expert])
    ) as mesh:
        yield mesh


@pytest.fixture
def one_device():
    """The 1 x 1 mesh, set for the test."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def _no_mesh_left_behind():
    """Commands set a mesh for their process; called in a test they would set it for all tests behind it."""
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)
