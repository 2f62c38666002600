"""From pairs to the tuned model: rows, reference, DPO, export and publishing."""
