"""`python -m fastvim`: the command line."""

from fastvim_cli import main

raise SystemExit(main())
