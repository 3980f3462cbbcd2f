"""python -m scripts.bench_training"""

import sys

from . import ladder, peers

words = sys.argv[1:]
if "--long" in words:
    sys.exit(ladder.main([word for word in words if word != "--long"]))
peers.main()
