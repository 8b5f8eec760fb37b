"""Every golden case, numbers recorded from the published implementations, against our computation. The checks of each
published library are in a file golden_<name>.py of their own. A case of an unknown architecture fails and is named.
`pytest tests/test_golden.py --golden FOLDER` runs a folder of other cases."""

from importlib import import_module
from pathlib import Path

import golden
import pytest

CHECKS = {}
for path in sorted(Path(__file__).parent.glob("golden_*.py")):
    CHECKS |= import_module(path.stem).CHECKS


def test_golden(golden_file):
    assert golden_file is not None, "the folder given by --golden holds no .npz"
    case = golden.load(golden_file)
    if case.arch not in CHECKS:
        pytest.fail(f"{golden_file.name}: no check is written for architecture {case.arch!r}")
    CHECKS[case.arch](case)
