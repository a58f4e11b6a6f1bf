"""What plans are asked for instead of the options: checked as they are, and only for as long as it was asked."""

from __future__ import annotations

import math
from typing import Any

import pytest

import hetegen_compile
from hetegen_compile.errors import OptionError
from hetegen_compile.options import parse_options
from hetegen_compile.overrides import overridden_split


@pytest.mark.parametrize("split", ["auto", 0, 0.25, 1])
def test_a_split_holds_inside_and_no_longer(split: Any) -> None:
    with hetegen_compile.override_split(0.5):
        with hetegen_compile.override_split(split):
            assert overridden_split() == split
        assert overridden_split() == 0.5
    assert overridden_split() is None


@pytest.mark.parametrize("split", [-1, 3.0, math.nan, "half", True, None])
def test_what_the_option_may_not_be_is_refused_as_there(split: Any) -> None:
    with pytest.raises(OptionError) as option:
        parse_options({"split": split})
    with pytest.raises(OptionError) as override:
        hetegen_compile.override_split(split)
    assert str(override.value) == str(option.value)
