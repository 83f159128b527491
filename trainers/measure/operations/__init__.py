"""The 42 operations that `trainers/tensor_check.py` compares, each with its NumPy counterpart.

Tolerances: float32 rounds by 6e-8 of a number, bfloat16 by 4e-3, float64 by 1e-16. Sums of n terms in another order
differ by some √n times that; Winograd's convolutions and iterative eigenvalues by more. They are wide enough for the
largest `--size`. Elements that are moved, compared, counted or added once must be equal.
"""

from trainers.measure.operations import arithmetic, structures

OPERATIONS = [*arithmetic.OPERATIONS, *structures.OPERATIONS]
