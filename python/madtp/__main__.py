"""`python -m madtp` is the `madtp` command."""

import sys

from .cli import main

sys.exit(main())
