"""The embedded model: a tiny chat model made by `make.py` and shipped in `model/`."""
