"""Mounts of a test's own, where it may make them."""

import os
import subprocess
import sys

import pytest

MOUNTED = """
mount -t tmpfs -o size=4m none {path} && cd / && {python} - <<'END'
{code}
END
"""
root_alone = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs mounts of one's own",
)


def in_mount(path, code, after=""):
    """Run code where ``path`` is the root of a file system of its own."""
    script = MOUNTED.format(path=path, python=sys.executable, code=code) + after
    ran = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
