"""The order of test files: the longest first, each in one piece."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SECONDS, pytest_collection_modifyitems

from lesslib.util.paths import ROOT


@pytest.mark.parametrize("file", SECONDS)
def test_the_files_that_are_said_to_take_long_are_there(file):
    assert (ROOT / file).is_file()


def test_the_longest_begin_and_the_tests_of_a_file_keep_their_order():
    longest = max(SECONDS, key=SECONDS.__getitem__)
    shortest = min(SECONDS, key=SECONDS.__getitem__)
    files = ["tests/quick.py", shortest, "tests/quick.py", longest, longest, shortest]
    items = [SimpleNamespace(path=ROOT / file, number=i) for i, file in enumerate(files)]
    pytest_collection_modifyitems(SimpleNamespace(rootpath=Path(ROOT)), items)
    assert [item.number for item in items] == [3, 4, 1, 5, 0, 2]
