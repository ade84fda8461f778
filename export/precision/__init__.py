"""Precision of an exported graph: casting, int8 quantisation."""
