"""The interpreter that has transformers; tests that need it are skipped where it is missing.

`uv run python -m benchmarks.peers.environment transformers` makes that environment, as CI does.
"""

from pathlib import Path

import pytest

from moe.data import Bytes
from moe.export.hugging_face import Text

PYTHON = Path(__file__).parents[2] / ".peers" / "transformers" / "bin" / "python"


@pytest.fixture(scope="session")
def transformers_python() -> Path:
    if not PYTHON.exists():
        pytest.skip("transformers is not installed: python -m benchmarks.peers.environment transformers")
    return PYTHON


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Text:
    """How a model of bytes was fed."""
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    Bytes().build([]).save(str(path))
    return Text(path, "<|endoftext|>", 64)
