"""Encode the rows that are not encoded yet: ray job submit --working-dir . -- python jobs/embed.py SPEC"""

import sys

from bertray.cli import command

command(["embed", *sys.argv[1:]])
