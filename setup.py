"""Package discovery; everything else is in pyproject.toml. Device code builds are added here."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vreflection", "vreflection.*"]), "vreflection.configs"],
    package_dir={"vreflection.configs": "configs"},
)
