"""The whole job: ray job submit --working-dir . -- python jobs/pipeline.py SPEC"""

import sys

from bertray.cli import command

command(["run", *sys.argv[1:]])
