"""The packages: configs/ becomes one of them. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    include_package_data=False,  # package_data alone says what is one
    packages=[
        *find_packages(include=["hyperlora_jax", "hyperlora_jax.*"]),
        "hyperlora_jax.configs",
    ],
    package_dir={"hyperlora_jax.configs": "configs"},
    package_data={"hyperlora_jax": ["assets/**/*"], "hyperlora_jax.configs": ["**/*.json"]},
)
