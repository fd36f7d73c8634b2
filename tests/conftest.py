"""One thread per process: the suite starts many, and a second thread on a busy machine makes each of them slower."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
