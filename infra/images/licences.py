"""Lists what an image holds with its licences: ``python licences.py SBOM.json [FOLDER of Debian's copyright files]``.

One line a package, tab-separated: where it is from, name, version, licences. Python packages are read from a CycloneDX
list, Debian's from ``dpkg-query`` and the copyright files that every package of Debian brings.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DOCUMENTS = Path("/usr/share/doc")
NOT_STATED = "not stated"


def python_packages(sbom: dict) -> Iterator[tuple[str, str, str]]:
    """``(name, version, licences)`` of a CycloneDX list."""
    for component in sbom.get("components", []):
        found = []
        for choice in component.get("licenses", []):
            licence = choice.get("license", {})
            # Some packages state the licence's whole text where its name belongs.
            name = choice.get("expression") or licence.get("id") or licence.get("name", "").partition("\n")[0]
            found += [name.strip()] if name.strip() else []
        yield component["name"], component.get("version", ""), " AND ".join(dict.fromkeys(found)) or NOT_STATED


def debian_packages(listed: str, documents: Path = DOCUMENTS) -> Iterator[tuple[str, str, str]]:
    """The same of lines ``name version`` as ``dpkg-query`` prints them."""
    for line in listed.splitlines():
        name, _, version = line.partition(" ")
        path = documents / name / "copyright"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = dict.fromkeys(re.findall(r"^License: *(\S.*?) *$", text, re.MULTILINE))
        # Older copyright files are prose; they name the texts that Debian keeps in one place.
        found = found or dict.fromkeys(re.findall(r"/usr/share/common-licenses/([\w.+-]*\w)", text))
        yield name, version, ", ".join(found) or NOT_STATED


def main() -> int:
    """The command line."""
    if len(sys.argv) not in (2, 3):
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    documents = Path(sys.argv[2]) if len(sys.argv) == 3 else DOCUMENTS
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    sbom = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for origin, packages in (("python", python_packages(sbom)), ("debian", debian_packages(listed, documents))):
        for package in sorted(packages):
            print(origin, *package, sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
