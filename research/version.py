"""The suite's version; CHANGELOG.md says which versions change numbers."""

VERSION = "0.2.0"
