"""Measurements on the bundled models and data: accuracy with paired statistics, speed by interleaved pairs, reports.

Modules are imported by the command line when a command needs them; none is imported by ``import tokred``.
"""
