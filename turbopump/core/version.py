"""The version that every artefact carries."""

from importlib.metadata import version

VERSION = version("turbopump")
