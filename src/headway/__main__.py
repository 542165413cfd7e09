"""``python -m headway``: the same as ``headway``."""

from headway.cli import main

if __name__ == "__main__":
    main()
