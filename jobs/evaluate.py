"""Embed and fit what is missing, judge and report: ray job submit --working-dir . -- python jobs/evaluate.py SPEC"""

import sys

from bertray.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
