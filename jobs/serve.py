"""Serve a bundle over HTTP: ray job submit --working-dir . -- python jobs/serve.py BUNDLE"""

import sys

from bertray.cli import command

command(["serve", *sys.argv[1:]])
