"""Embed what is missing and fit the head: ray job submit --working-dir . -- python jobs/fit.py SPEC"""

import sys

from bertray.cli import command

command(["fit", *sys.argv[1:]])
