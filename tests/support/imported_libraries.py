"""A script that imports Pointbook, and prints which libraries that imported.

The output is JSON with the number of Pointbook's modules, and the names of the libraries' modules. Optional libraries
do not count.
"""

import importlib
import json
import pkgutil
import sys

PACKAGES = ("pointbook_cli", "pointbook_common", "pointbook_server", "shopline_shim")
OWN = {*PACKAGES, "pointbook", "pointbook_client"}
OPTIONAL = {"opentelemetry", "psutil"}
"""Libraries of `pointbook[otel]`, which only servers with tracing import."""


def import_pointbook() -> None:
    """Import every module but migrations, which Alembic loads by their files."""
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".migrations.versions" not in module.name:
                importlib.import_module(module.name)


def main() -> None:
    """Print what importing everything has added."""
    loaded = set(sys.modules)
    import_pointbook()
    added = {name: name.partition(".")[0] for name in sorted(sys.modules.keys() - loaded)}
    ignored = {*OWN, *OPTIONAL, *sys.stdlib_module_names}
    libraries = [name for name, package in added.items() if package not in ignored]
    own = sum(package in OWN for package in added.values())
    sys.stdout.write(json.dumps({"own": own, "libraries": libraries}))


if __name__ == "__main__":
    main()
