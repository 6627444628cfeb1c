"""`python -m indexer.cli`, as the `photoblip` command."""

from indexer.cli import main

if __name__ == "__main__":
    main()
