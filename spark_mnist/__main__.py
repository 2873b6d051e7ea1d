"""``python -m spark_mnist ...`` and ``spark-submit .../spark_mnist/__main__.py ...``."""

import os
import sys

if not __package__:  # run as a file, its folder comes first: put the package's parent there instead
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from spark_mnist.cli.app import main

sys.exit(main())
