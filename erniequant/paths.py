"""Paths as people write them."""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home folder.

    A user that is not known stays as it is: whoever opens the path says that it is not there.
    """
    return Path(os.path.expanduser(path))
