"""`python -m drotator` is `drotator`."""

from __future__ import annotations

import sys

from drotator.cli import main

if __name__ == "__main__":
    sys.exit(main())
