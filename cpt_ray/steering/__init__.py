"""Few-shot steering: a user's choices set the dial (Kobalczyk et al., arXiv 2412.13998, and directive inference)."""
