"""A worker process of a benchmark: ``python -m prompttune.protocols DESCRIPTOR PARENT THREADS OUTPUT``."""

import sys

from prompttune.protocols.worker import main

main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
