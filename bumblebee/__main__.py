"""``python -m bumblebee``, for launchers that start a module."""

from bumblebee.cli.main import main

if __name__ == "__main__":
    main()
