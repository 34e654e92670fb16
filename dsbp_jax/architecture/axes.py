"""Which axes of a model have one size: union-find over axes that reshapes take apart.

An *axis class* stands for all axes that must keep one size. A reshape may say that a
class is a product (heads and their features), a concatenation that it is a sum of
parts; then its digits or parts are classes of their own. To unite two classes is to
unify them, as types are: their digits are united pairwise, and split further where one
side is split more finely than the other. What cannot be lined up is fixed, with a
reason.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

UNIT = 0  # the class of all axes of size one, which say nothing

_PRODUCT = "product"
_SUM = "sum"
_MISFIT = "laid out in two ways that do not divide each other"


class Axes:
    """A union-find over axis classes; classes are small integers.

    Example:
      >>> axes = Axes()
      >>> model, heads, width = axes.new(6), axes.new(2), axes.new(3)
      >>> axes.unite(model, axes.product([heads, width]))
      >>> axes.atoms(model) == [heads, width]
      True
      >>> axes.fix(model, "an output")
      >>> axes.reason(width)
      'an output'
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._form: list[tuple[str, tuple[int, ...]] | None] = []
        self._reason: list[str | None] = []
        self._marks: list[set[str]] = []
        self._add(1)

    def _add(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._form.append(None)
        self._reason.append(None)
        self._marks.append(set())
        return len(self._parent) - 1

    def new(self, size: int) -> int:
        """A class of its own for an axis of `size`; those of size one share one."""
        return UNIT if size == 1 else self._add(size)

    def find(self, axis: int) -> int:
        """The representative of a class."""
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def size(self, axis: int) -> int:
        """The size of an axis in the model as it is."""
        return self._size[self.find(axis)]

    def reason(self, axis: int) -> str | None:
        """Why a class keeps its size, or None."""
        return self._reason[self.find(axis)]

    def marks(self, axis: int) -> frozenset[str]:
        """What `mark` said of a class."""
        return frozenset(self._marks[self.find(axis)])

    def fix(self, axis: int, reason: str) -> None:
        """Says that a class keeps its size, and why; the first reason stays."""
        axis = self.find(axis)
        if axis == UNIT or self._reason[axis] is not None:
            return
        self._reason[axis] = reason
        for child in self._children(axis):
            self.fix(child, reason)

    def mark(self, axis: int, mark: str) -> None:
        """Notes something about a class and all that it is made of."""
        axis = self.find(axis)
        if axis == UNIT or mark in self._marks[axis]:
            return
        self._marks[axis].add(mark)
        for child in self._children(axis):
            self.mark(child, mark)

    def _children(self, axis: int) -> tuple[int, ...]:
        form = self._form[axis]
        return form[1] if form else ()

    def _shape(self, axis: int, kind: str, children: Sequence[int]) -> None:
        """Gives a class without a form one, and its children what is known of it."""
        self._form[axis] = (kind, tuple(children))
        for child in children:
            if (reason := self._reason[axis]) is not None:
                self.fix(child, reason)
            for mark in self._marks[axis]:
                self.mark(child, mark)

    def _flat(self, axis: int, kind: str) -> list[int]:
        """The digits or the parts that a class is made of, in order."""
        axis = self.find(axis)
        form = self._form[axis]
        if form is None or form[0] != kind:
            return [] if kind == _PRODUCT and axis == UNIT else [axis]
        return [part for child in form[1] for part in self._flat(child, kind)]

    def is_sum(self, axis: int) -> bool:
        """Whether a class is made of parts side by side."""
        form = self._form[self.find(axis)]
        return form is not None and form[0] == _SUM

    def digits(self, axis: int) -> list[int]:
        """The classes that a class is a product of, the slowest first."""
        return self._flat(axis, _PRODUCT)

    def parts(self, axis: int) -> list[int]:
        """The classes that lie side by side in a class."""
        return self._flat(axis, _SUM)

    def atoms(self, axis: int) -> list[int]:
        """The classes at the bottom: neither products nor sums, in order."""
        axis = self.find(axis)
        found = [atom for child in self._children(axis) for atom in self.atoms(child)]
        return found or ([] if axis == UNIT else [axis])

    def product(self, digits: Sequence[int]) -> int:
        """A class that is the product of others."""
        digits = [digit for axis in digits for digit in self.digits(axis)]
        return self._made(_PRODUCT, digits, math.prod(map(self.size, digits)))

    def sum(self, parts: Sequence[int]) -> int:
        """A class in which others lie side by side."""
        parts = [part for axis in parts for part in self.parts(axis)]
        return self._made(_SUM, parts, sum(map(self.size, parts)))

    def _made(self, kind: str, children: Sequence[int], size: int) -> int:
        if len(children) == 1:
            return children[0]
        if not children:
            return UNIT
        axis = self._add(size)
        self._shape(axis, kind, children)
        return axis

    def unite(self, left: int, right: int) -> None:
        """Says that two axes have one size, digit by digit and part by part."""
        left, right = self.find(left), self.find(right)
        if left == right:
            return
        if self._size[left] != self._size[right]:
            sizes = f"{self._size[left]} and {self._size[right]}"
            raise ValueError(f"axes of sizes {sizes} cannot be one")
        forms = self._form[left], self._form[right]
        if forms[0] and forms[1] and not self._line_up(left, right):
            self.fix(left, _MISFIT)
            self.fix(right, _MISFIT)
        left, right = self.find(left), self.find(right)
        if self._form[left] is None:
            left, right = right, left
        self._parent[right] = left
        if (reason := self._reason[right]) is not None:
            self.fix(left, reason)
        for mark in self._marks[right]:
            self.mark(left, mark)

    def _line_up(self, left: int, right: int) -> bool:
        """Unites the digits or parts of two classes that have such."""
        (kind, _), (other, _) = self._form[left], self._form[right]  # type: ignore[misc]
        if kind != other:
            return False
        a, b = self._flat(left, kind), self._flat(right, kind)
        while a and b:
            x, y = a.pop(0), b.pop(0)
            size = min(self.size(x), self.size(y))
            for whole, queue in ((x, a), (y, b)):
                if self.size(whole) > size:
                    pieces = self._cut(kind, whole, size)
                    if pieces is None:
                        return False
                    queue[:0] = pieces
                else:
                    queue.insert(0, whole)
            self.unite(a.pop(0), b.pop(0))
        return True

    def _cut(self, kind: str, axis: int, size: int) -> tuple[int, int] | None:
        """Takes the first `size` off a class, as a digit or a part."""
        axis, whole = self.find(axis), self.size(axis)
        form = self._form[axis]
        if form is not None:
            return None
        if kind == _PRODUCT:
            if size == 0 or whole % size:
                return None
            pieces = self.new(size), self.new(whole // size)
        else:
            pieces = self.new(size), self.new(whole - size)
        self._shape(axis, kind, pieces)
        return pieces

    def deal(self, axes: Iterable[int], sizes: Sequence[int]) -> list[int] | None:
        """Classes for axes of `sizes`, after a reshape of axes of the same product.

        Returns:
          One class for each size, or None where a digit would have to be broken.
        """
        queue = [digit for axis in axes for digit in self.digits(axis)]
        return self._dealt(_PRODUCT, queue, sizes)

    def split(self, axis: int, sizes: Sequence[int]) -> list[int] | None:
        """Classes for the pieces of an axis, of `sizes`; None as in `deal`."""
        return self._dealt(_SUM, self.parts(axis), sizes)

    def _dealt(
        self, kind: str, queue: list[int], sizes: Sequence[int]
    ) -> list[int] | None:
        step = (lambda a, b: a // b) if kind == _PRODUCT else (lambda a, b: a - b)
        nothing = 1 if kind == _PRODUCT else 0
        join = self.product if kind == _PRODUCT else self.sum
        found = []
        for size in sizes:
            taken: list[int] = []
            rest = size
            while rest != nothing:
                if not queue:
                    return None
                piece = queue.pop(0)
                have = self.size(piece)
                fits = rest % have == 0 if kind == _PRODUCT else have <= rest
                if not fits:
                    cut = self._cut(kind, piece, rest)
                    if cut is None:
                        return None
                    piece, left = cut
                    queue.insert(0, left)
                    have = rest
                taken.append(piece)
                rest = step(rest, have)
            found.append(join(taken) if taken else self.new(size))
        return found

    def resized(self, axis: int, sizes: Mapping[int, int]) -> int:
        """The size of an axis once some atoms have others.

        Args:
          axis: Any class.
          sizes: Sizes of atoms, by representative; all others keep theirs.
        """
        axis = self.find(axis)
        form = self._form[axis]
        if form is None:
            return sizes.get(axis, self._size[axis])
        inner = [self.resized(child, sizes) for child in form[1]]
        return math.prod(inner) if form[0] == _PRODUCT else sum(inner)

    def moved(self, axis: int, offset: int, sizes: Mapping[int, int]) -> int:
        """Where the piece that began at `offset` along an axis begins then."""
        before = after = 0
        for part in self.parts(axis):
            if before == offset:
                return after
            before += self.size(part)
            after += self.resized(part, sizes)
        return after if before == offset else offset
