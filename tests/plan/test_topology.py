"""Names of slices: what is known, and what is said of the rest."""

import pytest

from grok.errors import ConfigError
from grok.plan.topology import grown, parse_slice


def test_a_slice_knows_its_chips_and_rings():
    slice_ = parse_slice("v5p:4x4x6", 2)
    assert slice_.num_chips == 192
    assert [slice_.is_ring(side) for side in range(3)] == [True, True, False]
    assert [parse_slice("v6e:8x16").is_ring(side) for side in range(2)] == [False, True]
    assert str(slice_) == "2 slices of v5p:4x4x6"


def test_the_seventh_generation_has_two_names():
    assert parse_slice("tpu7x:4x4x4") == parse_slice("7x:4x4x4")


@pytest.mark.parametrize("name", ["v6e:1x1", "v5p:1x1x1", "v5e:2x4", "v4:2x2x1", "v5p:2x2x3"])
def test_names_that_are_known(name):
    assert parse_slice(name).name == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("v9:2x2", "is of no generation known here; v4:4x4x4, v5e:16x16, "),
        ("", "is of no generation"),
        ("v5p", "should have 3 sides"),
        ("v5p:4x4", "should have 3 sides, since chips of v5p are wired in 3 dimensions; v5p:4x4x8"),
        ("v5e:4x4x4", "should have 2 sides"),
        ("v5p:axbxc", "should have 3 sides"),
        ("v5p:3x3x3", "cannot be wired from hosts of 2x2 chips; v5p:4x4x3 would work."),
        ("v6e:0x4", "v6e:2x4 would work."),
        ("v6e:16x32", "has 512 chips, and a slice has 256 at most; several slices"),
    ],
)
def test_names_that_are_refused(name, problem):
    with pytest.raises(ConfigError, match=r"^topology ") as caught:
        parse_slice(name)
    assert problem in str(caught.value)


def test_larger_slices_double_their_shortest_side_up_to_the_largest():
    slice_ = parse_slice("v6e:4x8")
    assert [slice_.name, grown(slice_).name] == ["v6e:4x8", "v6e:8x8"]
    assert grown(parse_slice("v6e:16x16")) is None
