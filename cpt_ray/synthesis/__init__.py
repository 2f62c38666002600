"""From rubrics and prompts to pairs: directives, writing, pairing, the data set's card."""
