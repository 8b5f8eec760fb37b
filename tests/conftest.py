"""Options and paths of the tests:  python -m pytest [--golden FOLDER] [--peer-seed N] [-m slow] [-m gpu]"""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not torch.cuda.is_available():                    # Triton decides when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "golden")]


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT / "tests" / "golden"), metavar="FOLDER",
                     help="folder of golden cases (.npz) for test_golden.py")
    parser.addoption("--peer-seed", default="7", metavar="N", help="of the random configurations in test_peers.py")


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("*.npz"))
        metafunc.parametrize("golden_file", files or [None], ids=[f.stem for f in files] or ["no-cases"])


@pytest.fixture(scope="session", autouse=True)
def threads():
    import torch
    torch.set_num_threads(min(2, torch.get_num_threads()))
