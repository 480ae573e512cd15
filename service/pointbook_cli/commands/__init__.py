"""The command groups: options and help texts.

Each command imports its work when it runs, to start fast.
"""
