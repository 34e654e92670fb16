import pytest

from dsbp_jax.architecture.axes import UNIT, Axes


def test_products_are_united_digit_by_digit():
    axes = Axes()
    left, right = axes.new(24), axes.new(24)
    a, b = axes.deal([left], [4, 6])
    c, d, e = axes.deal([right], [2, 4, 3])
    axes.unite(left, right)
    # 4 × 6 and 2 × 4 × 3 have 2 × 2 × 2 × 3 in common.
    assert [axes.size(atom) for atom in axes.atoms(left)] == [2, 2, 2, 3]
    assert axes.atoms(left) == axes.atoms(right)
    assert axes.atoms(a) == [*axes.atoms(c), axes.atoms(d)[0]]
    assert axes.atoms(b) == [axes.atoms(d)[1], *axes.atoms(e)]


def test_sums_are_united_part_by_part():
    axes = Axes()
    parts = [axes.new(size) for size in (4, 4, 2)]
    whole = axes.sum(parts)
    other = axes.new(10)
    first, second = axes.split(other, [4, 6])
    axes.unite(whole, other)
    assert axes.find(first) == axes.find(parts[0])
    assert axes.atoms(second) == [axes.find(part) for part in parts[1:]]


def test_what_does_not_line_up_is_fixed():
    for one, two in (([4, 6], [6, 4]), ([3, 8], [8, 3])):
        axes = Axes()
        left, right = axes.new(24), axes.new(24)
        axes.deal([left], one)
        axes.deal([right], two)
        axes.unite(left, right)
        assert all("do not divide" in axes.reason(atom) for atom in axes.atoms(left))
    axes = Axes()
    product = axes.product([axes.new(2), axes.new(3)])
    total = axes.sum([axes.new(2), axes.new(4)])
    axes.unite(product, total)
    assert axes.reason(product)
    assert all(axes.reason(atom) for atom in axes.atoms(total))


def test_reasons_and_marks_reach_what_a_class_is_made_of():
    axes = Axes()
    whole = axes.new(6)
    axes.fix(whole, "an output")
    axes.mark(whole, "nonlinear")
    axes.fix(whole, "said later")
    for digit in axes.deal([whole], [2, 3]):
        assert axes.reason(digit) == "an output"
        assert axes.marks(digit) == {"nonlinear"}
    other = axes.new(6)
    axes.unite(other, whole)
    assert axes.reason(other) == "an output"


def test_deal_breaks_no_digit():
    axes = Axes()
    rows, columns = axes.new(4), axes.new(6)
    assert axes.deal([rows, columns], [6, 4]) is None
    assert axes.split(axes.product([rows, columns]), [12, 12]) is None


def test_sizes_follow_their_atoms():
    axes = Axes()
    heads, width, other = axes.new(2), axes.new(8), axes.new(5)
    whole = axes.sum(
        [axes.product([heads, width]), other, axes.product([heads, width])]
    )
    sizes = {axes.find(width): 3}
    assert axes.size(whole) == 37
    assert axes.resized(whole, sizes) == 17
    assert axes.moved(whole, 16, sizes) == 6
    assert axes.moved(whole, 21, sizes) == 11


def test_axes_of_size_one_say_nothing():
    axes = Axes()
    assert axes.new(1) == UNIT
    axes.fix(UNIT, "never")
    assert axes.reason(UNIT) is None
    assert axes.atoms(UNIT) == []


def test_two_sizes_are_never_one():
    axes = Axes()
    with pytest.raises(ValueError, match="sizes 2 and 3"):
        axes.unite(axes.new(2), axes.new(3))
