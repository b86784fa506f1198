"""The package's methods inside other people's merge tools, a folder each: docs/plugins.md."""
