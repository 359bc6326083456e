"""``python -m tests.tools.documents``: write the examples' responses and the generated sections of the documents."""

from concord.model.bundle import DEFAULT_BUNDLE, SOUND_BUNDLE
from tests.support.documents import README, SECTIONS, SERVICE_README, with_responses, with_section
from tests.support.server import running


def main() -> None:
    """Rewrite the documents; ask services of the built-in bundles for the responses."""
    with running("--bundle", DEFAULT_BUNDLE) as digits, running("--bundle", SOUND_BUNDLE) as sound:
        addresses = {DEFAULT_BUNDLE: digits.address, SOUND_BUNDLE: sound.address}
        for document in (README, SERVICE_README):
            text = with_responses(document.read_text(encoding="utf-8"), addresses)
            document.write_text(text, encoding="utf-8")
    for (document, name), content in SECTIONS.items():
        text = document.read_text(encoding="utf-8")
        document.write_text(with_section(text, name, content()), encoding="utf-8")


if __name__ == "__main__":
    main()
