"""Images: data, and what a saved image classifier needs to open again."""
