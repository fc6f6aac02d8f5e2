"""Writes every page and picture of the documentation that is made from code and results.

python docs/write_pages.py
"""

from pathlib import Path

import module_map
import reference_pages
import results_picture

DOCS = Path(__file__).parent
MADE = {
    DOCS / "reference/command-line.md": reference_pages.command_line,
    DOCS / "reference/settings.md": reference_pages.settings,
    DOCS / "reference/modules.md": module_map.modules,
    DOCS / "assets/results.svg": results_picture.demo,
    DOCS / "assets/real-lm.svg": results_picture.real,
}


def main() -> None:
    """Write the files whose text has changed, and name them."""
    for path, make in MADE.items():
        text = make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path} has changed")


if __name__ == "__main__":
    main()
