"""Serve a bundle over HTTP: ray job submit --working-dir . -- python jobs/serve.py BUNDLE"""

import sys

from bertray.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
