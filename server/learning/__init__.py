"""Merging with learned coefficients: pseudo-users from catalogs, teachers, losses, one loop."""

from server.learning.optimise import LearnedMerge, learn

__all__ = ["LearnedMerge", "learn"]
