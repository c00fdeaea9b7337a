"""Devices, hosts, and being stopped from outside."""
