"""The method in plain PyTorch: the star, its feedback and their estimates. Knows neither options nor the Trainer."""
