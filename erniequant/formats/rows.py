"""The formats there are: by the name that `--format` has for each, the module of its ``FORMAT``.

Nothing is imported here, so that a command can list them at once.
"""

NATIVE = "native"

ROWS: dict[str, str] = {
    NATIVE: "erniequant.formats.native.format",
    "fastdeploy-wint2": "erniequant.formats.fastdeploy.format",
}
