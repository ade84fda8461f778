"""Precision of the frozen model: half precision with norms in float32, channels balanced for int8."""
