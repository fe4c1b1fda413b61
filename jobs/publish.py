"""Publish a run: ray job submit --working-dir . -- python jobs/publish.py RUN DB/TABLE.lance"""

import sys

from bertray.cli import command

command(["publish", *sys.argv[1:]])
