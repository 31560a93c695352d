"""Task Arithmetic: the scaled sum of the task vectors.

Ilharco et al., "Editing models with task arithmetic", ICLR 2023: `theta = theta_0 + lambda sum_d tau_d`.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.vectors import TaskVector
from server.merging import Weight, merge_method
from server.merging._arithmetic import weighted_sum


@merge_method("task-arithmetic", paper="Ilharco et al., ICLR 2023", equation="tau = lambda sum_d tau_d")
def task_arithmetic(taus: Sequence[TaskVector], *, lambda_: Weight = 0.3) -> TaskVector:
    """`lambda` times the sum of the vectors. Raises ConfigError, VectorError."""
    return weighted_sum(taus, [lambda_] * len(taus))
