"""`python -m erniequant`: the `erniequant` command, also where its script is not on the path.

The one file of the library that knows of the command line above it; nothing imports this file.
"""

if __name__ == "__main__":
    from erniequant_cli.main import main

    main()
