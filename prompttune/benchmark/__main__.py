"""A worker process of a benchmark: ``python -m prompttune.benchmark DESCRIPTOR PARENT THREADS OUTPUT``."""

import sys

from prompttune.benchmark.worker import main

main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
