"""Parameters of the published configs against those that transformers counts (transformers_counts.py)."""

import json
from pathlib import Path

import pytest

from moe.analysis.compute import by_component
from moe.config import load_config
from moe.experiment import Experiment

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTS = json.loads(Path(__file__).with_name("transformers_counts.json").read_text())
PUBLISHED = [name for name in COUNTS if name != "transformers"]


def test_all_published_configs_are_compared():
    assert {path.stem for path in CONFIGS.glob("*b*.py") if "quickstart" not in path.stem} - {
        "olmoe_3b_h100"  # our own cut of OLMoE
    } == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_has_the_parameters_that_transformers_gives_it(name, one_device):
    model = load_config(str(CONFIGS / f"{name}.py"), Experiment)[0].model
    parts = {part: found.total_params for part, found in by_component(model, 128).items()}
    assert parts == COUNTS[name]["parameters"]
