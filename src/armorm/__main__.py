"""`python -m armorm`."""

from armorm.cli.app import main

if __name__ == "__main__":
    main()
