"""Settings every test runs under: an explicit Ray auth mode, one OpenMP thread per process, no hub."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
