"""Run the command as `python -m lightning_prune`."""

from lightning_prune.cli import main

if __name__ == "__main__":
    main()
