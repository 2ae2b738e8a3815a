"""``bumblebee preview``: what a recipe would do. Nothing is trained, and nothing written but the token cache."""
