"""Devices and processes: how they are started, and how they talk to each other."""
