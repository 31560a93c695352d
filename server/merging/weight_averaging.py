"""Weight Averaging: the mean of the fine-tuned models.

Wortsman et al., "Model soups", ICML 2022: `theta = mean_d theta_d = theta_0 + mean_d tau_d`.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.vectors import TaskVector
from server.merging import merge_method
from server.merging._arithmetic import weighted_sum


@merge_method("weight-averaging", paper="Wortsman et al., ICML 2022", equation="tau = mean_d tau_d")
def weight_averaging(taus: Sequence[TaskVector]) -> TaskVector:
    """The mean of the vectors; no options. Raises VectorError for vectors that do not fit together."""
    return weighted_sum(taus, [1.0 / len(taus)] * len(taus))
