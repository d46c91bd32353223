"""The error of numerics: a stored number that is no finite number."""


class NonFiniteError(ValueError):
    """A weight or a scale is NaN or infinite, or an F32 scale is not positive.

    Attributes:
        row, column: where it is, in the weight's logical [R, C] or, if `in_scale`, in the scale's array.
        found: what is there, for people, for example "NaN (E4M3 byte 0x7F)".
        in_scale: whether the number is a scale.
    """

    def __init__(self, row: int, column: int, found: str, *, in_scale: bool = False) -> None:
        super().__init__(f"{'scale' if in_scale else 'weight'}[{row}, {column}] is {found}")
        self.row = row
        self.column = column
        self.found = found
        self.in_scale = in_scale
