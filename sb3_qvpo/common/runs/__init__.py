"""A training run that can stop anywhere and go on. Nothing here knows what is trained."""
