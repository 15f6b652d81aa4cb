"""`python -m ebt_jax`: the command line, where the script `ebt` is not installed."""

from ebt_jax.cli import main

if __name__ == "__main__":
    main()
