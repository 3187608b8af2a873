"""`python -m foveate`, for launchers that take a module: torchrun, accelerate."""

from foveate.cli import main

if __name__ == "__main__":
    main()
