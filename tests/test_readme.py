"""The README's example runs as it stands, on the path a newcomer without a GPU takes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", ROOT / "docs" / "parallel.md"]
EXAMPLES = [e for p in PAGES for e in re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL)]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "from_pretrained" not in e])
def test_python_example_runs(example, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment | ALONE | {"MASTER_PORT": port},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
