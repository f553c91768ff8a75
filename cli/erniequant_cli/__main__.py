"""`python -m erniequant_cli`: the `erniequant` command."""

from erniequant_cli.main import main

if __name__ == "__main__":
    main()
