"""``python -m tests.tools.documents``: write the examples' responses and the generated sections of the documents."""

from tests.support.documents import README, SECTIONS, SERVICE_README, with_responses, with_section
from tests.support.server import running


def main() -> None:
    """Rewrite the documents; ask a service of the built-in bundle for the responses."""
    with running() as service:
        for document in (README, SERVICE_README):
            text = with_responses(document.read_text(encoding="utf-8"), service.address)
            document.write_text(text, encoding="utf-8")
    for (document, name), content in SECTIONS.items():
        text = document.read_text(encoding="utf-8")
        document.write_text(with_section(text, name, content()), encoding="utf-8")


if __name__ == "__main__":
    main()
