"""`python -m fastvim.cli`, for where the `fastvim` script is not on the path."""

import sys

from fastvim.cli import main

sys.exit(main())
