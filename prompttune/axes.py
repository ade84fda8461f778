"""Named axes of task states. Their sizes differ between the tasks of one engine, and are padded to the largest."""

RANK, CLASSES, CLUSTERS = "rank", "classes", "clusters"
CHOICES = (CLASSES, CLUSTERS)
"""Axes along which a forward chooses one entry. A state tensor of the shape ``(axis,)`` is added to the scores and
padded with -inf instead of zeros, so that padding is never chosen."""
