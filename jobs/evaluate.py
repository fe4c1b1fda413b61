"""Embed and fit what is missing, judge and report: ray job submit --working-dir . -- python jobs/evaluate.py SPEC"""

import sys

from bertray.cli import command

command(["evaluate", *sys.argv[1:]])
