"""Batches over one device: admission, queues, the rows of its tasks, and the restarts of its worker."""
