"""The packages of the competitors' environments."""

import json
import re
import subprocess
import sys
from importlib.metadata import requires

from tests.benchmarks.environments import MODEL_PACKAGES, model_requirements
from tests.support.server import ROOT

MODULES = """
import json, sys
from importlib.metadata import packages_distributions
import tests.benchmarks.competitors.digits
distributions = packages_distributions()
modules = {name for name in sys.modules if "." not in name and not name.startswith("_")}
print(json.dumps({name: distributions[name] for name in modules & distributions.keys()}))
"""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(packages: list[str]) -> set[str]:
    """Return the packages and all their dependencies, without those of extras."""
    found: set[str] = set()
    while packages:
        package = normalised(packages.pop())
        if package not in found:
            found.add(package)
            lines = [line for line in requires(package) or () if "extra ==" not in line]
            packages += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]
    return found


def test_model_packages_include_everything_that_the_encoder_imports() -> None:
    result = subprocess.run([sys.executable, "-c", MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {
        module: set(map(normalised, names)) for module, names in json.loads(result.stdout).items() if module != "concord"
    }
    assert set(MODEL_PACKAGES) <= set().union(*imported.values())
    installed = installed_with(list(MODEL_PACKAGES))
    assert not {module: names for module, names in imported.items() if not names & installed}


def test_model_requirements_have_the_versions_of_pyproject() -> None:
    requirements = model_requirements()
    assert [re.split(r"[<>=~]", line, maxsplit=1)[0] for line in requirements] == list(MODEL_PACKAGES)
    assert all(re.search(r"[=~]=|>=", line) for line in requirements)
