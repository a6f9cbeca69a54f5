"""Print the project's dependencies and those of the named extras, one a line: ``python requirements.py gpu eval``.

So that an image's dependency layer needs no source code and stays cached while only the code changes.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [requirement for extra in sys.argv[1:] for requirement in project["optional-dependencies"][extra]]
print("\n".join(project["dependencies"] + extras))
