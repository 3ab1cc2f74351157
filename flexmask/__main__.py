"""`python -m flexmask`, the same as the console script."""

from flexmask.tools.cli import main

if __name__ == "__main__":
    main()
