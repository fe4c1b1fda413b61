"""Label files with a bundle: ray job submit --working-dir . -- python jobs/predict.py BUNDLE INPUT --output OUT"""

import sys

from bertray.cli import command

command(["predict", *sys.argv[1:]])
