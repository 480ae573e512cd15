"""The exit codes of commands."""

EXIT_PROBLEMS = 1
"""The command ran, and found problems: refused lines or items, differences, a server that is not serving."""
EXIT_USAGE = 2
"""The command could not run, because of its options, the settings or the server."""
EXIT_STOPPED = 130
"""The command was stopped before its end."""
