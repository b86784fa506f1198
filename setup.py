"""Builds the two packages of one distribution: the numerics at the top, the application under ``python/``."""

from setuptools import find_packages, setup

numerics = find_packages(include=["r2m_kernels", "r2m_kernels.*"])
application = find_packages("python", include=["r2m", "r2m.*"])

setup(
    packages=numerics + application,
    package_dir={"r2m_kernels": "r2m_kernels", "r2m": "python/r2m"},
    package_data={"r2m_kernels": ["py.typed", "README.md", "_triton/launch.json"], "r2m": ["py.typed"]},
)
