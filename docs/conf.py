"""Sphinx settings: ``make doc`` builds the site into ``docs/_build/html``; warnings are errors."""

import sb3_qvpo

project = "sb3_qvpo"
author = "The sb3_qvpo maintainers"
copyright = author
release = sb3_qvpo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "sphinx_rtd_theme"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # else classes show what torch says of the constructor of any module
autoclass_content = "both"  # or types of a constructor's parameters would be missing
autodoc_typehints = "description"  # types beside each parameter; in the signature they would hide its description
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
