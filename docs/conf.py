"""How Sphinx builds the documentation: docs/layout.md, "Build the docs"."""

import pathlib
import sys

import mbn_jax

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

project: str = "mbn_jax"
author: str = "The mbn_jax authors"
copyright: str = author
release: str = mbn_jax.__version__

extensions: list[str] = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns: list[str] = ["_build", "_ext"]
highlight_language: str = "none"
default_role: str = "py:obj"  # `make_train_step` in a docstring is a link.

# Markdown.
myst_enable_extensions: list[str] = ["colon_fence"]
myst_heading_anchors: int = 3

# Notebooks. A build on the same folder executes them again only where their code has changed.
nb_execution_mode: str = "cache"
nb_execution_raise_on_error: bool = True
nb_execution_timeout: int = 300
nb_output_stderr: str = "remove"  # What JAX says about this computer's devices.

# Docstrings.
autodoc_member_order: str = "bysource"
autodoc_typehints: str = "none"  # Docstrings tell shapes and dtypes, which hints do not.
autodoc_preserve_defaults: bool = True
napoleon_numpy_docstring: bool = False
napoleon_custom_sections: list[tuple[str, str]] = [("Attributes", "params_style")]
python_maximum_signature_line_length: int = 88

# A link to a name that does not exist is a warning, and so an error; these are not links.
nitpick_ignore_regex: list[tuple[str, str]] = [
    ("py:obj", ".*"),  # Code in backticks of a docstring.
    ("py:.*", r"(jax|flax|optax|numpy|collections|contextlib|typing|nn|nnx|lax|jnp|struct)\..*"),
    ("py:class", "ArrayTree"),  # Of optax.OptState.
]

html_theme: str = "furo"
html_title: str = "mbn_jax"
html_static_path: list[str] = ["_static"]
html_css_files: list[str] = ["site.css"]
