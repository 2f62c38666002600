"""How well the dials work: measures, intervals, the report."""
