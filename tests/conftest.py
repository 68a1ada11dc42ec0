"""What every test needs before torch or transformers is imported, here and in the processes that tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and -n 2 runs two tests side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
