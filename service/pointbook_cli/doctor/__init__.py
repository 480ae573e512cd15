"""`pointbook doctor`: checks of an installation, each with a cause and a remedy."""
