"""The embedded model: a tiny chat model that this repository makes itself (see `make.py`)."""
