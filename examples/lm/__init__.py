"""What train_lm.py is made of: text, checkpoints, the loss plot."""


class BadInput(Exception):
    """Something the user gave cannot be used. The message is the one line that they read."""
