"""What models are asked: conversations, and how a model's chat template renders them."""
