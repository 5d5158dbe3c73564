"""Plug-ins for frameworks that build their Trainer themselves and load plug-ins by name."""
