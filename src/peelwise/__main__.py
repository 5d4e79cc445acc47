"""``python -m peelwise``, which is how torchrun starts it: the command line."""

from peelwise.cli.main import main

if __name__ == "__main__":
    main()
