"""Rubrics: what can be dialled, how an answer is measured on it, and what a client may ask for."""
