"""
What makes training and decisions fast. Nothing here defines mathematics: without it all is the same, only slower.

``settings`` is for users, the rest is internal. Read it when you change how fast something is.
"""
