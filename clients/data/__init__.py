"""Private interaction data: readers, checks, k-core, leave-one-out, and the canonical domain folder."""
