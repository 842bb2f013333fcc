"""One thread, so that results do not depend on the machine; the repository on the path."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

torch.set_num_threads(1)
