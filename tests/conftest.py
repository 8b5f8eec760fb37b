"""Options and paths of the tests:  python -m pytest [--golden FOLDER] [-m slow] [-m gpu]"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "golden")]


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT / "tests" / "golden"), metavar="FOLDER",
                     help="folder of golden cases (.npz) for test_golden.py")


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("*.npz"))
        metafunc.parametrize("golden_file", files or [None], ids=[f.stem for f in files] or ["no-cases"])


@pytest.fixture(scope="session", autouse=True)
def threads():
    import torch
    torch.set_num_threads(min(2, torch.get_num_threads()))
