"""`python -m fulcrum` is `fulcrum`, for launchers that start modules.

An example is `accelerate launch -m fulcrum train ...`.
"""

from fulcrum.cli.main import main

if __name__ == "__main__":
    main()
