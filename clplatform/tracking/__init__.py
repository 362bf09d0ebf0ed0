"""What is seen of a run while it goes on: the local record, W&B and other loggers, the terminal."""
