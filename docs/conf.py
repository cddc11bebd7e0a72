"""Sphinx settings: ``make doc`` builds the site into ``docs/_build/html``; warnings are errors."""

import sb3_qvpo

project = "sb3_qvpo"
author = "The sb3_qvpo maintainers"
copyright = author
release = sb3_qvpo.__version__

extensions = ["myst_parser", "sphinx_design", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]  # formulas without a network
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sb3_qvpo"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # else classes show what torch says of the constructor of any module
autoclass_content = "both"  # or types of a constructor's parameters would be missing
autodoc_typehints = "description"  # types beside each parameter; in the signature they would hide its description
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
