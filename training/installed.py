"""One line where the trainer's packages, which are an extra, are not installed. Imported before any of them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

missing = [name for name in ("hydra", "numpy", "rich", "safetensors", "tokenizers") if find_spec(name) is None]
if missing:
    print(
        f"error: {', '.join(missing)} not installed: the trainer's packages are an extra; "
        "pip install -c constraints.txt -e '.[train]'",
        file=sys.stderr,
    )
    sys.exit(2)
