"""python -m scripts.bench_attention"""

import sys

from .run import main

sys.exit(main())
