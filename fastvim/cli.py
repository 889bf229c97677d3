"""Another address of the command line, `fastvim_cli`."""

from fastvim_cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
