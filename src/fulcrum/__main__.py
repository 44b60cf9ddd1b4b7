"""`python -m fulcrum` is `fulcrum`: for launchers that start modules, such as `accelerate launch -m fulcrum train ...`."""

from fulcrum.cli.main import main

if __name__ == "__main__":
    main()
