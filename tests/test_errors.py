"""What errors say of themselves."""

import pytest

from lymphfeat.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("it fails"), "it fails"),
        (ValueError("\n  \nit fails\nand how"), "it fails"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_the_first_line_of_an_error_or_its_type(error: Exception, line: str) -> None:
    assert first_line(error) == line
