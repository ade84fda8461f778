"""Benchmarks of the server: real processes, real clients, on one machine."""
