"""Vision: DependencyViT, and images and scenes to train it on."""
