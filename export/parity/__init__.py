"""Parity: an engine compared with PyTorch or with another engine, with thresholds and reports."""
