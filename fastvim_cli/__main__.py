"""`python -m fastvim_cli`: the command line without the console script, as for `torchrun -m`."""

from fastvim_cli import main

raise SystemExit(main())
